"""Asks the vLLM installed beside bnbfix, in a process of its own: what it makes of a config, and of a whole folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.source import LocalSource
from ...errors import EngineError, UsageError
from ...models.gemma4 import Model
from ...rules.scan import check_applicable
from .parameters import Parameter, parameters, projections
from .releases import Installed, ReleaseRange, find_installed, find_range, ranges

PROBE_SECONDS = 300.0
LOAD_SECONDS = 1800.0
HEADROOM = 1.2  # memory asked for, as a multiple of the checkpoint's size


@dataclass(frozen=True)
class Disagreement:
    """One module for which the release table and the installed vLLM differ."""

    module: str
    table: str
    vllm: str


@dataclass(frozen=True)
class ProbeResult:
    """What the installed vLLM makes of a checkpoint's config. `modules` maps each projection to quantized or not."""

    versions: Mapping[str, str | None]
    release: ReleaseRange
    modules: Mapping[str, bool]
    skips: Mapping[str, tuple[str, ...]]  # for each skip entry, the modules that this vLLM skips for it
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True)
class LoadResult:
    """What the installed vLLM did with a folder. Names are vLLM's; `error` is None when it ran."""

    versions: Mapping[str, str | None]
    error: str | None
    parameters: int
    quantized: int
    unbound: tuple[str, ...]  # quantized, but without a quant state
    requantized: tuple[str, ...]  # ordinary in the folder, quantized in the engine
    forward: bool

    @property
    def ok(self) -> bool:
        return self.error is None and self.forward and not self.unbound and not self.requantized


def require_vllm() -> tuple[Installed, ReleaseRange]:
    """The installed vLLM and its row; of a release newer than the table, the last row. Raises UsageError if none."""
    here = find_installed()
    if here is None:
        raise UsageError(
            "no vLLM is installed beside bnbfix", hint="Run bnbfix from the environment that serves the model."
        )
    return here, find_range(here.version) or ranges()[-1]


def probe(folder: Path) -> ProbeResult:
    """Builds the model's skeleton in the installed vLLM and holds the release table against it.

    Raises UsageError without a vLLM, EngineError when it gives no answer, and the errors of `open_checkpoint`.
    """
    _, release = require_vllm()
    checkpoint = open_checkpoint(LocalSource.open(folder))
    model = check_applicable(checkpoint)
    answer = ask("probe", folder, PROBE_SECONDS)
    if answer["error"]:
        raise EngineError(f"vLLM cannot build the model: {answer['error']}", where=str(folder))
    modules = {m["name"]: bool(m["quantized"]) for m in answer["modules"]}
    expected = parameters(projections(checkpoint), model, release, checkpoint.skip_modules)
    skips = {entry: tuple(names) for entry, names in answer["skips"].items()}
    return ProbeResult(answer["versions"], release, modules, skips, compare(expected, modules, release, model))


def compare(
    expected: Sequence[Parameter], modules: Mapping[str, bool], release: ReleaseRange, model: Model
) -> tuple[Disagreement, ...]:
    """Where the table's parameters and vLLM's modules differ. Pure."""
    out = []
    words = {True: "quantized", False: "an ordinary parameter", None: "no such module"}
    for p in expected:
        if p.role not in ("expert", "other") and modules.get(p.module) is not p.quantized:
            out.append(Disagreement(p.module, words[p.quantized], words[modules.get(p.module)]))
    experts = {name: quantized for name, quantized in modules.items() if ".experts" in name}
    if model.moe and release.moe is not None:
        for name, quantized in sorted(experts.items()):
            if f".{release.moe}" not in name or (release.moe == "experts" and ".moe.experts" in name):
                out.append(Disagreement(name, f"experts under {release.moe}", "another prefix"))
            elif quantized is not ("expert" in release.quantized):
                out.append(Disagreement(name, words["expert" in release.quantized], words[quantized]))
    return tuple(out)


def load(folder: Path, seconds: float = LOAD_SECONDS) -> LoadResult:
    """Loads a folder in the installed vLLM and runs a forward pass.

    Raises UsageError without a vLLM, EngineError when the machine is too small or no answer comes within `seconds`,
    and the errors of `open_checkpoint`.
    """
    _, release = require_vllm()
    source = LocalSource.open(folder)
    checkpoint = open_checkpoint(source)
    _check_memory(sum(source.files[s] for s in checkpoint.shards))
    answer = ask("load", folder, seconds)
    found = answer.get("parameters", [])
    error = answer["error"]
    if error is None and not answer.get("finite"):
        error = "the forward pass gave no finite numbers"
    return LoadResult(
        versions=answer["versions"],
        error=error,
        parameters=len(found),
        quantized=sum(p["quantized"] for p in found),
        unbound=tuple(p["name"] for p in found if p["quantized"] and not p["states"]),
        requantized=requantized(checkpoint, release, {p["name"] for p in found if p["quantized"]}),
        forward=bool(answer.get("forward")),
    )


def requantized(checkpoint: Checkpoint, release: ReleaseRange, quantized: set[str]) -> tuple[str, ...]:
    """Parameters that are quantized in the engine though the checkpoint has full precision for them."""
    if not checkpoint.quantization:
        return tuple(sorted(quantized))
    model = check_applicable(checkpoint)
    expected = parameters(projections(checkpoint), model, release, checkpoint.skip_modules)
    plain = (p.module + ".weight" for p in expected if not all(m.quantized for m in p.members))
    return tuple(sorted(quantized.intersection(plain)))


def ask(what: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs vllm_worker.py on a folder; raises EngineError when no answer comes."""
    with tempfile.TemporaryDirectory(prefix="bnbfix-") as scratch:
        answer, log = Path(scratch) / "answer.json", Path(scratch) / "log"
        command = [sys.executable, "-m", "bnbfix.engines.vllm.worker", what, str(folder.resolve()), str(answer)]
        here = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        with log.open("wb") as out:
            try:
                done = subprocess.run(  # noqa: S603  # our own module under our own interpreter
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=scratch,
                    timeout=seconds,
                    env=os.environ | {"PYTHONPATH": path},
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise EngineError(f"vLLM gave no answer within {seconds:.0f} s", where=str(folder)) from None
        if answer.exists():
            return dict(json.loads(answer.read_text()))
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        killed = done.returncode < 0
        hint = "It was killed; was there too little memory?" if killed else "".join(tail) or None
        raise EngineError(f"vLLM ended with status {done.returncode} and no answer", where=str(folder), hint=hint)


def _check_memory(size: int) -> None:
    """Raises EngineError when neither a GPU nor this machine's memory will hold the weights."""
    free = _free_memory()
    if free is not None and not Path("/dev/nvidia0").exists() and free < size * HEADROOM:
        raise EngineError(
            f"the machine is too small to load it: {size / 1e9:,.1f} GB of weights, {free / 1e9:,.1f} GB of memory free"
        )


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no such file on this system: then nothing is known, and nothing is refused
    return None
