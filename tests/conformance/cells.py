"""The checkpoints that releases are judged by: every shape of Gemma4 in every form, and the samples of them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(HERE)]

import tiny_gemma4
import venvs

FAMILIES = ("dense31b", "e4b", "e4b-noshared", "e2b", "moe26b", "unified12b")
QUANTS = ("all", "skip", "mixed", "partial", "fp4", "single", "storage-bf16", "int8")
NEW_CONFIG = "+per-layer-config"  # a checkpoint whose config.json has the newer form
CELLS = [f"{f}-{q}" for f in FAMILIES for q in QUANTS] + [f"dense31b-skip{NEW_CONFIG}", f"e4b-all{NEW_CONFIG}"]
SMOKE = [
    "dense31b-all",
    "dense31b-partial",
    "dense31b-storage-bf16",
    "e4b-noshared-skip",
    "moe26b-skip",
    "unified12b-all",
    f"dense31b-skip{NEW_CONFIG}",
]
BOUNDARIES = [
    *SMOKE,
    "dense31b-skip",
    "dense31b-fp4",
    "dense31b-int8",
    "e4b-all",
    "e4b-single",
    "e2b-mixed",
    "moe26b-all",
    "unified12b-skip",
]
SMOKE_RELEASES = ["0.22.1", "0.32.0"]
WAY_RELEASES = ["0.22.1", "0.27.1", "0.32.0"]
SECONDS = 600


def make(work: Path, name: str) -> Path:
    """The checkpoint of a cell."""
    folder = work / "checkpoints" / name
    if not (folder / "config.json").exists():
        family, quant = split(name)
        tiny_gemma4.make(folder, family, quant, per_layer_config=name.endswith(NEW_CONFIG))
    return folder


def split(name: str) -> tuple[str, str]:
    """(family, quant) of a cell's name."""
    name = name.removesuffix(NEW_CONFIG)
    family = max((f for f in FAMILIES if name.startswith(f + "-")), key=len)
    return family, name[len(family) + 1 :]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every script here has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--venvs", type=Path, help="where environments are or go; default: below --work")
    parser.add_argument("--releases", help="comma-separated")
    return parser


def choose_releases(options: argparse.Namespace) -> list[str]:
    """The releases that are named, all of pins.json with --all, else those in which dry loads are compared."""
    named = options.releases.split(",") if options.releases else None
    return named or (list(venvs.PINS["releases"]) if options.all else WAY_RELEASES)


def environment(release: str, folder: Path) -> Path:
    """A release's interpreter. Ends with 75 where it cannot be built: no network, no disk."""
    try:
        return venvs.build(release, folder / release)
    except (subprocess.CalledProcessError, OSError) as e:
        print(f"the environment of vLLM {release} could not be built: {e}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
