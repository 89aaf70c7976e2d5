"""Dry loads of cells: against what `scan` says without one, and against real loads.

Of every checkpoint: a dry load says what the rules say, with the same tensors re-quantized or reordered, but for the
findings about what happens after loading; and what a repair writes loads. A real load stops where the dry load does,
and makes as many quantized parameters, with quant states bound to as many.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import SECONDS, make

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
    return Severity.WRONG if answer.requantized or answer.reordered else Severity.LOADS


def words(answer: DryLoad) -> object:
    """Why it is so."""
    return answer.error or answer.requantized or answer.reordered or answer.unbound


def compare(folder: Path, release: str, answer: DryLoad) -> list[str]:
    """Where a dry load disagrees with the rules."""
    findings = [f for f in bnbfix.scan(folder, release).findings if f.counts]
    said = max((f.severity for f in findings if f.code not in AFTER_LOADING), default=Severity.LOADS)
    seen = verdict(answer)
    faults = []
    if said != seen and not (said == Severity.DEGRADED and seen == Severity.LOADS):
        faults.append(f"the rules say {said}, a dry load {seen}: {words(answer)}")
    for what, codes, names in (
        ("re-quantized", REQUANTIZED, answer.requantized),
        ("reordered", (Code.REORDERED,), answer.reordered),
    ):
        named = {name for f in findings if f.code in codes for name in f.tensors}
        if seen == Severity.WRONG and not named.issuperset(names):
            faults.append(f"{what} and in no finding: {sorted(set(names) - named)}")
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


@dataclass(frozen=True)
class DryCells:
    """What dry loads said of a release's cells."""

    answers: dict[str, DryLoad]
    loaded: int  # of them loaded for real as well
    repaired: int  # outputs that were dry-loaded
    faults: list[str]

    def verdict(self, name: str) -> str:
        """What the dry load of a cell amounts to."""
        return str(verdict(self.answers[name]))


def load_dry(work: Path, release: str, python: Path, names: Sequence[str], real: int = 0) -> DryCells:
    """Dry-loads cells in one vLLM process, `real` of them for real as well, and in another what repairs write."""
    live = LiveVllm(str(python), seconds=SECONDS * 3)
    sources = [make(work, name) for name in names]
    answers = live.dry_load([open_folder(source) for source in sources])
    found = list(zip(names, sources, answers, strict=True))
    faults = [f"{name}: {fault}" for name, source, answer in found for fault in compare(source, release, answer)]
    sample = random.Random(release).sample(found, min(real, len(found)))
    folders = [source for _, source, _ in sample]
    loaded = run_worker("load", folders, seconds=SECONDS * 6, python=str(python)) if folders else []
    for (name, _, answer), seen in zip(sample, loaded, strict=True):
        faults += [f"{name}: {fault}" for fault in compare_real(answer, seen)]
    with tempfile.TemporaryDirectory() as scratch:
        written = [s for s in sources if write_repair(s, Path(scratch) / s.name, release)]
        repaired = live.dry_load([open_folder(Path(scratch) / s.name) for s in written]) if written else []
    for source, answer in zip(written, repaired, strict=True):
        if not answer.ok:
            faults.append(f"{source.name}: repaired, {words(answer)}")
    return DryCells(dict(zip(names, answers, strict=True)), len(sample), len(written), faults)
