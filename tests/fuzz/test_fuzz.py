"""Ten thousand mutations of headers, indexes, configs and quant states; tests/fuzz/run.py does more on demand.

Half of them are the same in every run. The other half come from a fresh seed, which a failure names: set
BNBFIX_FUZZ_SEED to it to see the failure again.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from bnbfix.checkpoint import checkpoint
from bnbfix.checkpoint.checkpoint import open_checkpoint
from bnbfix.engines import transformers
from bnbfix.engines.targets import resolve_target
from bnbfix.errors import InputError
from bnbfix.models.inspection import inspect_checkpoint
from bnbfix.rules.scan import scan_checkpoint
from tests.fuzz import runner
from tests.fuzz.cases import SURFACES, case, corpus, families
from tests.fuzz.judges import Disagreement, judge_checkpoint
from tests.fuzz.memory import MemorySource
from tests.fuzz.runner import Figures, run_cases

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
    # Mutations that are all refused, or never, would test only one half of the code.
    for surface, ends in figures.by_surface().items():
        assert ends["accepted"] > 0 and ends["refused"] > 0, (surface, ends)
    assert set(figures.by_surface()) == {surface.__name__ for surface in SURFACES}


def test_mutations_of_a_fresh_seed_are_right_or_refused() -> None:
    print(f"BNBFIX_FUZZ_SEED={FRESH}")
    check(run_cases(FRESH, range(MUTATIONS)), MUTATIONS)


# What bounds time and memory


def test_files_that_are_long_to_read_are_read_or_refused_in_little_memory() -> None:
    """At a thirtieth of their size; `python tests/fuzz/explode.py` has them whole."""
    script = Path(__file__).parent / "explode.py"
    command = [sys.executable, str(script), "--scale", "0.03", "--seconds", "10", "--memory", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "Unrepairable" in done.stdout and "InputError" in done.stdout


def small_limits(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(checkpoint, name, value)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("MAX_HEADERS", "bytes of headers exceed the limit of"),
        ("MAX_TENSORS", "tensors exceed the limit of"),
        ("MAX_SKIP", "entries exceed the limit of"),
    ],
)
def test_more_than_any_model_has_is_refused(limit: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource(corpus()[2])
    opened = open_checkpoint(source)
    there = {
        "MAX_HEADERS": sum(h.data_start for h in opened.shards.values()),
        "MAX_TENSORS": sum(len(h.tensors) for h in opened.shards.values()),
        "MAX_SKIP": len(opened.skip_modules),
    }[limit]
    assert there > 1
    small_limits(monkeypatch, **{limit: there})
    scan_checkpoint(open_checkpoint(source), resolve_target("portable"))
    small_limits(monkeypatch, **{limit: there - 1})
    with pytest.raises(InputError, match=rf"{there:,} {words}|has {there:,} {words}"):
        scan_checkpoint(open_checkpoint(source), resolve_target("portable"))


def test_more_comparisons_than_seconds_allow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource(corpus()[2])
    opened = open_checkpoint(source)
    forms = {form for entry in opened.skip_modules for form, _ in transformers.transformers_skips.keys(entry)}
    there = len(forms) * len(inspect_checkpoint(opened).linears)
    monkeypatch.setattr(transformers, "MAX_COMPARISONS", there)
    scan_checkpoint(open_checkpoint(source), resolve_target("portable"))
    monkeypatch.setattr(transformers, "MAX_COMPARISONS", there - 1)
    with pytest.raises(InputError, match=r"has \d+ kinds of entries, too many for \d+ linear modules"):
        scan_checkpoint(open_checkpoint(source), resolve_target("portable"))


# The tests' tools


def test_the_same_seed_and_number_make_the_same_case() -> None:
    def ends() -> list[tuple[str, str]]:
        return [(name, run()) for name, run in (case(FRESH, number) for number in range(200, 300))]

    assert ends() == ends()


def test_the_corpus_is_what_the_library_and_bnbfix_read() -> None:
    for files in corpus():
        opened = open_checkpoint(MemorySource(files))
        judge_checkpoint(opened, files)
        assert not opened.damaged and any(w.quantized for w in opened.weights.values())


def test_a_crash_a_hang_and_a_disagreement_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("layers", [4_097, 10_001, 2**31, 2**63, 2**64, 10**30])
def test_more_layers_than_any_model_has_are_refused(layers: int) -> None:
    files = families()[0]
    config = json.loads(files["config.json"]) | {"num_hidden_layers": layers}
    checkpoint = open_checkpoint(MemorySource(files | {"config.json": json.dumps(config).encode()}))
    with pytest.raises(InputError, match=r"asks for [0-9,]+ model.layers, as no model has"):
        scan_checkpoint(checkpoint, resolve_target("0.32.0"))
