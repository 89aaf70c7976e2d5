"""The words that all reports share: names, ranges of releases, the conclusion; and what depends on none of them."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from rich.text import Text

from bnbfix.engines.targets import resolve_target
from bnbfix.engines.vllm.releases import ranges
from bnbfix.hub.push import Pushed
from bnbfix.report.next_step import after_repair
from bnbfix.report.outcome import ScanOutcome
from bnbfix.report.results import show
from bnbfix.report.sarif import fingerprint
from bnbfix.report.terminal import progress_bar, show_status
from bnbfix.report.text import collapse, conclude, matrix, natural_order
from bnbfix.rules.rule import Code, Severity
from bnbfix.rules.scan import Finding, ReleaseVerdict, ScanResult
from bnbfix.writer.write import RepairResult
from tests.support.build import Make, planned


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ([5], "m.layers.5.mlp.up.weight"),
        ([11, 5], "m.layers.{5,11}.mlp.up.weight x2"),
        ([2, 10, 1], "m.layers.{1,2,10}.mlp.up.weight x3"),
        (range(30), "m.layers.{0-29}.mlp.up.weight x30"),
        ([0, 1, 2, 3, 5], "m.layers.{0-3,5}.mlp.up.weight x5"),
        ([5, 11, 17, 23], "m.layers.{5,11,17,23}.mlp.up.weight x4"),
        (range(59, 0, -6), "m.layers.{5,11,...,59}.mlp.up.weight x10"),
    ],
)
def test_names_keep_their_layer_numbers(layers: list[int], want: str) -> None:
    assert collapse(f"m.layers.{n}.mlp.up.weight" for n in layers) == [want]


def test_names_with_several_numbers_and_none_are_collapsed_too() -> None:
    names = [f"layers.{n}.experts.{m}.up" for n in (0, 1) for m in range(8)]
    assert collapse([*names, "lm_head.weight"]) == ["layers.{0,1}.experts.{0-7}.up x16", "lm_head.weight"]
    assert collapse(["moe.experts.7", "moe.experts.30"]) == ["moe.experts.{7,30} x2"]
    assert collapse([]) == []


@pytest.mark.parametrize(
    "name", ["layers.007.x", "layers.\u0663.x", "layers." + "9" * 5000 + ".x", "12.x", "a.{1,2}.b"]
)
def test_other_numbers_are_left_unchanged(name: str) -> None:
    (shown,) = collapse([name])
    assert shown == name if name.isascii() else name.replace("\u0663", r"\u0663")


def test_numbers_sort_as_numbers() -> None:
    names = ["layers.10.q", "layers.9.q", "layers.2.v", "layers.2.q", "lm_head"]
    assert sorted(names, key=natural_order) == ["layers.2.q", "layers.2.v", "layers.9.q", "layers.10.q", "lm_head"]


def test_the_matrix_joins_neighbours_that_agree() -> None:
    rows = matrix([ReleaseVerdict(r, Severity.LOADS, (), 0) for r in ranges()])
    assert [(row.releases, row.verdict) for row in rows] == [("0.19.0-0.33.0", "loads")]


def outcome(target: str, *verdicts: Severity) -> ScanOutcome:
    """A scan with a verdict for each range, the last given one for the rest."""
    padded = verdicts + (verdicts[-1],) * (len(ranges()) - len(verdicts))
    releases = tuple(
        ReleaseVerdict(r, v, (Code.INDEX,) if v.counts else (), 0) for r, v in zip(ranges(), padded, strict=True)
    )
    chosen = resolve_target(target)
    worst = max(v.verdict for v in releases if v.release in chosen.ranges)
    return ScanOutcome("m", ScanResult("m", "Gemma4", chosen, worst, releases, (), (), 1))


LOADS, WRONG, FAILS, DEGRADED = Severity.LOADS, Severity.WRONG, Severity.FAILS, Severity.DEGRADED


@pytest.mark.parametrize(
    ("target", "verdicts", "words"),
    [
        ("portable", [LOADS], "Loads in every vLLM release."),
        ("portable", [FAILS], "Fails in every vLLM release."),
        ("portable", [WRONG], "Loads with wrong weights in every vLLM release."),
        ("portable", [LOADS] * 8 + [FAILS] * 2, "Fails in 2 of 10 release ranges (0.31.0-0.33.0)."),
        ("portable", [FAILS, LOADS, FAILS, LOADS], "Fails in 2 of 10 release ranges (0.19.0-0.22.1, 0.24.0)."),
        (
            "portable",
            [FAILS, WRONG],
            "Fails in 1 of 10 release ranges (0.19.0-0.22.1). "
            "Loads with wrong weights in 9 of 10 release ranges (0.23.0-0.33.0).",
        ),
        ("0.22.1", [FAILS, LOADS], "Fails in vLLM 0.22.1."),
        ("0.22.1", [LOADS, FAILS], "Loads in vLLM 0.22.1."),
        ("0.22.1", [WRONG, LOADS], "Loads with wrong weights in vLLM 0.22.1."),
        ("0.22.1", [DEGRADED, LOADS], "Degraded in vLLM 0.22.1."),
    ],
)
def test_the_conclusion_says_in_which_releases(target: str, verdicts: list[Severity], words: str) -> None:
    assert conclude(outcome(target, *verdicts)).words == words


def test_the_conclusion_counts_only_releases_that_know_the_class() -> None:
    o = outcome("portable", FAILS, LOADS)
    assert o.result is not None
    unknown = replace(o.result.releases[0], codes=(Code.UNKNOWN_CLASS,))
    o = replace(o, result=replace(o.result, releases=(unknown, *o.result.releases[1:]), verdict=LOADS))
    assert conclude(o).words == "Loads in every vLLM release that knows the model."


def test_fingerprints_stay_the_same_over_versions_of_bnbfix() -> None:
    names = ("model.layers.5.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight")
    f = Finding(Code.INDEX, Severity.WRONG, names, ranges(), "a message about 2 names", "fix", None)
    assert fingerprint(f, "folder/model-00001-of-00002.safetensors") == "8cdcda9039e9fcdc"


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_only_a_pipe_loses_trailing_blanks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show([Text("one  "), Text("two")])
    assert capsys.readouterr().out == ("one  \ntwo\n" if terminal else "one\ntwo\n")


def test_what_is_waited_for_is_shown_in_one_line_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status = show_status(quiet=False)
    status("loading \x1b[31m")
    assert capsys.readouterr() == ("", "\r\033[Kloading \\x1b[31m ...")
    status("")
    assert capsys.readouterr() == ("", "\r\033[K")
    show_status(quiet=True)("loading")
    assert capsys.readouterr() == ("", "")


def test_progress_fills_one_bar_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar({"first": 2, "none": 0, "second": 4}, quiet=False) as step:
        step(5)
    out, err = capsys.readouterr()
    shown = err[err.rindex("first") :]
    assert out == "" and "none" not in err
    assert "2/2 bytes" in shown and "3/4 bytes" in shown[shown.index("second") :]


def test_after_a_repair_that_wrote_and_pushed_nothing_there_is_no_step(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "skip"), "0.22.1")
    assert not plan.nothing_to_do and list(after_repair(RepairResult(plan, None, {}), None)) == []
    (step,) = after_repair(RepairResult(plan, None, {}), Pushed("me/x", "https://x", "a" * 40))
    assert step.commands == (f"bnbfix scan me/x@{'a' * 40} --vllm 0.22.1",)
