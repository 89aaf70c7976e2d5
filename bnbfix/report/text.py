"""Words that every report of a scan shares: names, ranges of releases, conclusions. All of it plain text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..engines.engine import ReleaseRange
from ..engines.vllm.releases import ranges
from ..rules.rule import Code, Severity
from ..rules.scan import Finding, ReleaseVerdict, ScanResult
from .outcome import ScanOutcome

SHOWN = 4  # name patterns of a finding, where not all are wanted


def escape_control_chars(text: str) -> str:
    """Text from a checkpoint made harmless: control characters and terminal escapes are spelled out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(n: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{n} {noun}{'s' if n != 1 else ''}"


def contents(result: ScanResult) -> str:
    """Class, shards and kinds of weights, in a line."""
    forms = ", ".join(f"{n} {form}" for form, n in result.counts)
    return escape_control_chars(f"{result.family}, {count(result.shards, 'shard')}, {forms}")


def range_name(releases: Sequence[ReleaseRange]) -> str:
    """Neighbouring ranges as one."""
    first, last = releases[0].first, releases[-1].last
    return first if first == last else f"{first}-{last}"


def runs(releases: Sequence[ReleaseRange]) -> str:
    """`vLLM 0.19.0-0.22.1, 0.28.0`: ranges, neighbours together."""
    table, found = list(ranges()), list[list[ReleaseRange]]()
    for r in releases:
        if found and table.index(found[-1][-1]) + 1 == table.index(r):
            found[-1].append(r)
        else:
            found.append([r])
    return "vLLM " + ", ".join(range_name(run) for run in found)


class Line(NamedTuple):
    """A line of the matrix of releases."""

    releases: str
    verdict: Severity
    tensors: int
    codes: str


def matrix(verdicts: Sequence[ReleaseVerdict]) -> list[Line]:
    """The verdicts, neighbouring ranges that say the same together."""
    groups: list[list[ReleaseVerdict]] = []
    for v in verdicts:
        if groups and _key(groups[-1][-1]) == _key(v):
            groups[-1].append(v)
        else:
            groups.append([v])
    return [
        Line(range_name([v.release for v in g]), g[0].verdict, g[0].tensors, " ".join(c.value for c in g[0].codes))
        for g in groups
    ]


def _key(v: ReleaseVerdict) -> tuple[Severity, tuple[Code, ...], int]:
    return v.verdict, v.codes, v.tensors


def by_code(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one code together, in order."""
    groups: dict[Code, list[Finding]] = {}
    for f in findings:
        groups.setdefault(f.code, []).append(f)
    return list(groups.values())


def collapse(names: Iterable[str]) -> list[str]:
    """Names with their numbers taken out, and how many stand behind each."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "N", escape_control_chars(n)) for n in names)
    return [f"{name} x{n}" if n > 1 else name for name, n in counts.items()]


def fix_text(finding: Finding) -> str:
    """What a repair does about it, or why it does nothing."""
    return f"No fix here: {escape_control_chars(finding.reason)}" if finding.reason else f"Fix: {finding.fix}"


@dataclass(frozen=True)
class Conclusion:
    """The last word on a model, and the command that fixes it if there is one."""

    verdict: Severity
    words: str
    command: str | None = None


def conclude(outcome: ScanOutcome) -> Conclusion:
    """The last word on a model that was scanned."""
    result = outcome.result
    assert result is not None
    several = len(result.target.ranges) > 1
    name = "every release" if several else f"vLLM {result.target.name}"
    if several and any(Code.UNKNOWN_CLASS in v.codes for v in result.releases):
        name = "every release that knows the model"
    words = {
        Severity.LOADS: "Loads",
        Severity.DEGRADED: "Degraded",
        Severity.WRONG: "Loads with wrong weights",
        Severity.FAILS: "Does not load",
    }[result.verdict]
    text = f"{words} in {name}."
    if outcome.left_out:
        text += f" {count(outcome.left_out, 'finding')} left out by --select or --ignore."
    remaining = [f for f in result.findings if f.counts]
    blocked = [f for f in remaining if f.reason is not None and f.code is not Code.PLUGIN]
    if blocked or all(f.reason is not None for f in remaining):
        return Conclusion(result.verdict, text)
    return Conclusion(result.verdict, text, f"bnbfix repair MODEL --out DIR --vllm {result.target.name}")


class Summary(NamedTuple):
    """A row of the summary: the model, its verdict or "error", and the codes or the error's words."""

    model: str
    verdict: str
    because: str


def summarize(outcome: ScanOutcome) -> Summary:
    """A model in a row."""
    if outcome.result is None:
        kind = "skipped" if outcome.error is not None and outcome.error.exit_code == 3 else "error"
        return Summary(
            escape_control_chars(outcome.model),
            kind,
            escape_control_chars(str(outcome.error).removeprefix(f"{outcome.model}: ")),
        )
    counting = sorted({f.code.value for f in outcome.result.findings if f.counts})
    return Summary(escape_control_chars(outcome.model), outcome.result.verdict, " ".join(counting))


def totals(rows: Iterable[Summary]) -> str:
    """`3 models: 1 loads, 2 fails`."""
    counts = Counter(row.verdict for row in rows)
    order = ("loads", "degraded", "wrong", "fails", "skipped", "error")
    parts = ", ".join(f"{counts[v]} {v}" for v in order if counts[v])
    return f"{count(sum(counts.values()), 'model')}: {parts}"
