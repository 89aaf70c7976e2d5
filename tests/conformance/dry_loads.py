"""Holds dry loads against what `scan` says without one, and a sample of them against real loads.

    python tests/conformance/dry_loads.py                     0.22.1, 0.27.1 and 0.32.0, every cell, 15 minutes
    python tests/conformance/dry_loads.py --real 20           and 20 of a release's cells loaded for real
    python tests/conformance/dry_loads.py --all               every release of pins.json
    python tests/conformance/dry_loads.py --smoke             the cells and releases of run.py --smoke
    python tests/conformance/dry_loads.py --releases 0.27.1 --work WORK

Of every checkpoint: a dry load says what the rules say, with the same tensors re-quantized, but for the findings about
what happens after loading; and what a repair writes loads. Of the sample: the real load stops where the dry load does,
and makes as many quantized parameters, with quant states bound to as many. A release's checkpoints share one vLLM
process. Exits as run.py does.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import run
from run import CELLS, SMOKE, SMOKE_RELEASES, WAY_RELEASES, environment, make
from venvs import PINS

import bnbfix
from bnbfix.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.vllm.live import DryLoad, LiveVllm
from bnbfix.engines.vllm.process import run_worker
from bnbfix.rules.rule import AFTER_LOADING, Code, Severity

REQUANTIZED = (
    Code.UNQUANTIZED_IN_QUANTIZED,
    Code.PARTIALLY_QUANTIZED,
)  # the rules that name tensors quantized at load time


def open_folder(folder: Path) -> Checkpoint:
    """A folder as a dry load takes it."""
    return open_checkpoint(LocalSource.open(folder))


def verdict(answer: DryLoad) -> Severity:
    """What a dry load amounts to."""
    if answer.error is not None or answer.unbound:
        return Severity.FAILS
    return Severity.WRONG if answer.requantized else Severity.LOADS


def words(answer: DryLoad) -> object:
    """Why it is so."""
    return answer.error or answer.requantized or answer.unbound


def compare(folder: Path, release: str, answer: DryLoad) -> list[str]:
    """Where a dry load disagrees with the rules."""
    findings = [f for f in bnbfix.scan(folder, release).findings if f.counts]
    said = max((f.severity for f in findings if f.code not in AFTER_LOADING), default=Severity.LOADS)
    seen = verdict(answer)
    faults = []
    if said != seen and not (said == Severity.DEGRADED and seen == Severity.LOADS):
        faults.append(
            f"the rules say {said}, a dry load {seen}: {answer.error or answer.requantized or answer.unbound}"
        )
    named = {name for f in findings if f.code in REQUANTIZED for name in f.tensors}
    if seen == Severity.WRONG and not named.issuperset(answer.requantized):
        faults.append(f"re-quantized and in no finding: {sorted(set(answer.requantized) - named)}")
    return faults


def compare_real(answer: DryLoad, real: dict[str, Any]) -> list[str]:
    """Where a dry load disagrees with a real one, up to the first forward pass."""
    if (answer.error is None) != real["loaded"]:
        return [f"a real load says {real['error'] or 'loads'}, a dry load {answer.error or 'loads'}"]
    quantized = [p for p in real["parameters"] if p["quantized"]]
    unbound = sum(not p["states"] for p in quantized)
    if real["loaded"] and (len(quantized), unbound) != (answer.quantized, len(answer.unbound)):
        seen = f"{answer.quantized} quantized parameters, {len(answer.unbound)} without a quant state"
        return [f"a real load makes {len(quantized)} quantized parameters, {unbound} without; a dry load {seen}"]
    return []


def write_repair(source: Path, out: Path, release: str) -> bool:
    """A repair as run.py makes it. False where there is nothing to do, or nothing can be done."""
    for bf16 in (False, True):
        try:
            return bnbfix.repair(source, out, release, bf16=bf16, device="cpu").written
        except bnbfix.Unrepairable:
            continue
    return False


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--releases", help="comma-separated")
    parser.add_argument("--all", action="store_true", help="every release of pins.json")
    parser.add_argument("--real", type=int, default=0, metavar="N", help="load N cells a release for real")
    parser.add_argument("--smoke", action="store_true", help="two releases, a few cells")
    parser.add_argument("--venvs", type=Path, help="where environments are or go; default: below --work")
    a = parser.parse_args()
    chosen = list(PINS["releases"]) if a.all else SMOKE_RELEASES if a.smoke else WAY_RELEASES
    releases = a.releases.split(",") if a.releases else chosen
    names = SMOKE if a.smoke else CELLS
    bad = 0
    for release in releases:
        python = str(environment(release, a.venvs or a.work / "venvs"))
        live = LiveVllm(python, seconds=run.SECONDS * 3)
        sources = [make(a.work, name) for name in names]
        answers = live.dry_load([open_folder(source) for source in sources])
        found = list(zip(names, sources, answers, strict=True))
        faults = [f"{name}: {fault}" for name, source, answer in found for fault in compare(source, release, answer)]
        sample = random.Random(release).sample(found, min(a.real, len(found)))
        folders = [source for _, source, _ in sample]
        real = run_worker("load", folders, seconds=run.SECONDS * 6, python=python) if folders else []
        for (name, _, answer), loaded in zip(sample, real, strict=True):
            faults += [f"{name}: {fault}" for fault in compare_real(answer, loaded)]
        with tempfile.TemporaryDirectory() as scratch:
            written = [s for s in sources if write_repair(s, Path(scratch) / s.name, release)]
            repaired = live.dry_load([open_folder(Path(scratch) / s.name) for s in written])
        for source, answer in zip(written, repaired, strict=True):
            if not answer.ok:
                faults.append(f"{source.name}: repaired, {words(answer)}")
        print(f"{release}: {len(names)} dry loads ({len(sample)} against real ones), {len(written)} repaired outputs")
        print(*(f"  NO {fault}" for fault in faults), f"  {len(faults)} disagreements", sep="\n", flush=True)
        bad += len(faults)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
