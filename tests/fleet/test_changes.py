"""What changed between two scans of a fleet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bnbfix.engines.targets import resolve_target
from bnbfix.engines.vllm.releases import ranges
from bnbfix.fleet.changes import Change, changes_code, find_changes, render_changes
from bnbfix.fleet.results import Row, Verdict
from tests.support.build import Make
from tests.support.command_line import Cli

PORTABLE = resolve_target("portable")
TABLE = [(r.first, r.last) for r in ranges()]
(FIRST, LAST), (NEWEST, NEWEST_LAST) = TABLE[0], TABLE[-1]
NEW, BY_RELEASE, FIXED = "new findings", "broken by a new release", "fixed"


def row(model: str = "a/b", known: int = len(TABLE), **codes: str) -> Row:
    """A model's row with `known` releases; `codes` are those of the range of a number: r0="BNB102"."""
    releases = []
    for i, (first, last) in enumerate(TABLE[:known]):
        words = codes.get(f"r{i}", "")
        verdict = "loads" if not words else "wrong" if words.endswith("w") else "fails"
        releases.append(Verdict(first, last, verdict, tuple(words.rstrip("w").split())))
    return Row(model, "c", ("0.1.0", "portable"), "loads", "", tuple(releases), 0)


def error(verdict: str = "error", model: str = "a/b") -> Row:
    return Row(model, "c", ("0.1.0", "portable"), verdict, "no such model", (), 2)


LAST_ROW = f"r{len(TABLE) - 1}"


@pytest.mark.parametrize(
    ("old", "new", "what", "releases", "because"),
    [
        (row(), row(r0="BNB102"), NEW, f"{FIRST}-{LAST}", "BNB102"),
        (row(r0="BNB102"), row(r0="BNB102 BNB103"), NEW, f"{FIRST}-{LAST}", "BNB103"),
        (row(r0="BNB102"), row(), FIXED, f"{FIRST}-{LAST}", "BNB102"),
        (row(r0="BNB102w"), row(r0="BNB102"), NEW, f"{FIRST}-{LAST}", "wrong became fails"),
        (row(known=len(TABLE) - 1), row(**{LAST_ROW: "BNB105"}), BY_RELEASE, f"{NEWEST}-{NEWEST_LAST}", "BNB105"),
        (None, row(r0="BNB102"), NEW, f"{FIRST}-{LAST}", "BNB102"),
        (row(), error(), "can no longer be read", "", "no such model"),
        (None, error(), "can no longer be read", "", "no such model"),
    ],
)
def test_a_change(old: Row | None, new: Row, what: str, releases: str, because: str) -> None:
    before = {old.model: old} if old else {}
    assert find_changes(before, [new], PORTABLE) == [Change("a/b", what, releases, because)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (row(r0="BNB102"), row(r0="BNB102")),
        (error(), error()),
        (error(), row()),
        (row(), error("skipped")),
        (None, row(r0="BNB303")),  # the release does not know the class
        # What the newest known release finds is not news in the next one, nor is it fixed by it.
        (row(known=len(TABLE) - 1, **{f"r{len(TABLE) - 2}": "BNB105"}), row(**{f"r{len(TABLE) - 2}": "BNB105"})),
        (
            row(known=len(TABLE) - 1, **{f"r{len(TABLE) - 2}": "BNB105"}),
            row(**{f"r{len(TABLE) - 2}": "BNB105", LAST_ROW: "BNB105"}),
        ),
    ],
)
def test_no_change(old: Row | None, new: Row) -> None:
    assert find_changes({old.model: old} if old else {}, [new], PORTABLE) == []


def test_releases_that_say_the_same_are_together_and_bad_changes_first() -> None:
    old = {r.model: r for r in (row("a/fixed", r0="BNB101"), row("a/gone"), row("a/worse"))}
    found = find_changes(old, [row("a/fixed"), row("a/worse", r0="BNB102", r1="BNB102", r2="BNB103")], PORTABLE)
    assert [(c.model, c.what) for c in found] == [
        ("a/worse", NEW),
        ("a/worse", NEW),
        ("a/fixed", FIXED),
        ("a/gone", "no longer in the fleet"),
    ]
    assert found[0].releases == f"{FIRST}-{LAST}, {TABLE[1][0]}" and found[1].because == "BNB103"


def test_only_releases_of_the_target_count() -> None:
    assert find_changes({"a/b": row()}, [row(r0="BNB102")], resolve_target(NEWEST)) == []
    assert find_changes({"a/b": row()}, [row(r0="BNB102")], resolve_target(FIRST)) != []


def test_exit_codes() -> None:
    codes = {"fixed": 0, "no longer in the fleet": 0, NEW: 1, BY_RELEASE: 1, "can no longer be read": 2}
    for what, code in codes.items():
        assert changes_code([Change("a/b", "fixed", "", ""), Change("a/b", what, "", "")]) == code
    assert changes_code([]) == 0


def test_the_table_is_markdown_that_names_cannot_break() -> None:
    lines = "".join(render_changes([Change("a/b", NEW, "0.31.0", "<b>|*x*\x1b[31m")])).splitlines()
    assert lines[0] == "1 model changed, 1 for the worse."
    assert lines[2:4] == ["| model | change | vLLM | because of |", "|---|---|---|---|"]
    assert lines[4].startswith("| `a/b` | new findings | 0.31.0 | &lt;b&gt;\\|\\*x\\*") and "\x1b" not in lines[4]
    assert "".join(render_changes([])) == "Nothing changed.\n"


def test_a_baseline_on_the_command_line(pristine: Make, checkpoint: Make, tmp_path: Path, run: Cli) -> None:
    bad, good = pristine("dense31b", "partial", shards=2), pristine("e4b", "all")
    listed = tmp_path / "list"
    listed.write_text(f"{bad}\n{good}\n")
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"

    def fleet(output: Path, *more: object) -> Any:
        return run("fleet", "scan", "--from", listed, "--output", output, "--jobs", "1", "--vllm", "portable", *more)

    assert fleet(old).code == 1
    same = fleet(new, "--baseline", old)
    assert same.code == 0 and same.out.endswith("Nothing changed.\n")
    documents = [json.loads(line) for line in old.read_text().splitlines()]
    documents[0]["releases"] = documents[0]["releases"][:-1]  # as an older table has it
    documents[0]["releases"][-1] |= {"verdict": "loads", "codes": []}
    del documents[1]
    old.write_text("".join(json.dumps(d) + "\n" for d in documents))
    changed = fleet(new, "--baseline", old)
    assert changed.code == 1
    assert f"| `{bad}` | broken by a new release | {NEWEST}-{NEWEST_LAST} | BNB102 BNB103 |" in changed.out
    assert f"| `{bad}` | new findings | 0.31.0 | BNB102 BNB103 |" in changed.out
    assert f"`{good}` | new findings" in changed.out
