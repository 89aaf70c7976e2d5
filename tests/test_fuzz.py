"""Ten thousand mutations of headers, indexes, configs and quant states; tests/fuzz/run.py does more on demand.

Half of them are the same in every run. The other half come from a fresh seed, which a failure names: set
BNBFIX_FUZZ_SEED to it to see the failure again.
"""

from __future__ import annotations

import os
import secrets

import pytest
from fuzz import runner
from fuzz.cases import SURFACES, MemorySource, case, corpus
from fuzz.judges import Disagreement, judge_checkpoint
from fuzz.runner import Figures, run_cases

from bnbfix.checkpoint import open_checkpoint

MUTATIONS = 5000
FIXED = 20260101
FRESH = int(os.environ.get("BNBFIX_FUZZ_SEED") or secrets.randbelow(2**32))


def check(figures: Figures, mutations: int) -> None:
    print(*figures.lines(), sep="\n")
    assert not figures.failures, "\n".join(figures.failures)
    assert sum(figures.ends.values()) == mutations
    assert figures.count("crash", "hang", "disagreement") == 0


def test_mutations_of_a_fixed_seed_are_right_or_refused() -> None:
    figures = run_cases(FIXED, range(MUTATIONS))
    check(figures, MUTATIONS)
    # Mutations that are all refused, or never, would test one half of the code alone.
    for surface, ends in figures.by_surface().items():
        assert ends["accepted"] > 0 and ends["refused"] > 0, (surface, ends)
    assert set(figures.by_surface()) == {surface.__name__ for surface in SURFACES}


def test_mutations_of_a_fresh_seed_are_right_or_refused() -> None:
    print(f"BNBFIX_FUZZ_SEED={FRESH}")
    check(run_cases(FRESH, range(MUTATIONS)), MUTATIONS)


# The tests' tools


def test_the_same_seed_and_number_make_the_same_case() -> None:
    def ends() -> list[tuple[str, str]]:
        return [(name, run()) for name, run in (case(FRESH, number) for number in range(200, 300))]

    assert ends() == ends()


def test_the_corpus_is_what_the_library_and_bnbfix_read() -> None:
    for files in corpus():
        checkpoint = open_checkpoint(MemorySource(files))
        judge_checkpoint(checkpoint, files)
        assert not checkpoint.damaged and any(w.packed for w in checkpoint.weights.values())


def test_a_crash_a_hang_and_a_lie_that_gets_through_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(seed: int, number: int) -> tuple[str, object]:
        def run() -> str:
            if number == 0:
                raise KeyError("x")
            if number == 1:
                raise Disagreement("x")
            while number == 2:
                pass
            return "accepted"

        return "surface", run

    monkeypatch.setattr(runner, "case", wrong)
    monkeypatch.setattr(runner, "LIMIT", 0.1)
    figures = run_cases(7, range(4))
    assert dict(figures.ends) == {("surface", end): 1 for end in ("crash", "disagreement", "hang", "accepted")}
    assert len(figures.failures) == 3
    for failure, number, end in zip(figures.failures, range(3), ("crash", "disagreement", "hang"), strict=True):
        assert failure.startswith(f"seed 7, case {number}, surface: {end}")
