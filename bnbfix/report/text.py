"""Text that every report of a scan shares: names of tensors and releases, the matrix, the conclusion."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..engines.targets import format_ranges
from ..rules.rule import Code, Severity
from ..rules.scan import Finding, ReleaseVerdict, ScanResult
from .outcome import ScanOutcome

SHOWN = 4  # name patterns of a finding, where not all are wanted
RUNS = 4  # runs of numbers that a name pattern spells out; of more, the first two and the last
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.|$)")  # a layer or an expert; short, so that int() is cheap


def escape_control_chars(text: str) -> str:
    """Text from a checkpoint made harmless: control characters and terminal escapes are spelled out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(n: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{n} {noun}{'s' if n != 1 else ''}"


def format_size(n: int) -> str:
    """`19.1 GB`, `0.6 MB`, `1.4 kB`."""
    unit, size = ("GB", 10**9) if n >= 10**9 else ("MB", 10**6) if n >= 10**5 else ("kB", 10**3)
    return f"{n / size:,.1f} {unit}"


def format_growth(before: int, after: int) -> str:
    """`4.9 -> 5.3 GB`, or `900.0 MB -> 1.1 GB`."""
    a, b = format_size(before), format_size(after)
    return f"{a.removesuffix(b[-3:])} -> {b}"


def contents(result: ScanResult) -> str:
    """Class, shards and forms of weights, in a line."""
    forms = ", ".join(f"{n} {form}" for form, n in result.counts)
    return escape_control_chars(f"{result.family}, {count(result.shards, 'shard')}, {forms}")


class MatrixRow(NamedTuple):
    """A row of the matrix of releases."""

    releases: str
    verdict: Severity
    tensors: int
    codes: str


def matrix(verdicts: Sequence[ReleaseVerdict]) -> list[MatrixRow]:
    """The verdicts; neighbouring ranges that say the same are joined."""
    groups: list[list[ReleaseVerdict]] = []
    for v in verdicts:
        last = groups[-1][0] if groups else None
        if last and (last.verdict, last.codes, last.tensors) == (v.verdict, v.codes, v.tensors):
            groups[-1].append(v)
        else:
            groups.append([v])
    joined = [(format_ranges(v.release for v in group), group[0]) for group in groups]
    return [MatrixRow(names, v.verdict, v.tensors, " ".join(c.value for c in v.codes)) for names, v in joined]


def by_code(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one code together, in order."""
    groups: dict[Code, list[Finding]] = {}
    for f in findings:
        groups.setdefault(f.code, []).append(f)
    return list(groups.values())


def natural_order(name: str) -> list[tuple[str, int]]:
    """A sort key that takes the numbers in a name for numbers: layer 2 before layer 10."""
    found = re.findall(r"([^0-9]*)([0-9]{0,9})", name)
    return [(words, int(digits or -1)) for words, digits in found]


def collapse(names: Iterable[str]) -> list[str]:
    """Names that differ only in their numbers as one pattern, with the numbers and the count.

    `layers.5.mlp.up_proj` stays what it is; of several it makes `layers.{0-3,5}.mlp.up_proj x5`.
    """
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for name in map(escape_control_chars, names):
        groups.setdefault(tuple(_NUMBER.split(name)), []).append([int(n) for n in _NUMBER.findall(name)])
    patterns = []
    for (first, *rest), numbers in groups.items():
        columns = [_join_numbers(column) for column in zip(*numbers, strict=True)]
        pattern = first + "".join(c + part for c, part in zip(columns, rest, strict=True))
        patterns.append(pattern if len(numbers) == 1 else f"{pattern} x{len(numbers)}")
    return patterns


def _join_numbers(numbers: Iterable[int]) -> str:
    """`5`, `{0-3,5}` or `{5,11,...,59}`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][-1] + 1 == n:
            runs[-1].append(n)
        else:
            runs.append([n])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if len(words) > RUNS:
        words = [*words[:2], "...", words[-1]]
    text = ",".join(words)
    return text if text.isdecimal() else f"{{{text}}}"


def fix_text(finding: Finding) -> str:
    """What a repair does about a finding, or why it does nothing."""
    return f"No fix here: {escape_control_chars(finding.reason)}" if finding.reason else f"Fix: {finding.fix}"


class Conclusion(NamedTuple):
    """The last words on a model, and whether a repair for the target fixes what counts."""

    verdict: Severity
    words: str
    fixable: bool


_VERDICTS = {Severity.FAILS: "Fails", Severity.WRONG: "Loads with wrong weights", Severity.DEGRADED: "Degraded"}


def target_label(result: ScanResult) -> str:
    """The target in words: `vLLM 0.22.1`, or `every vLLM release`, as far as it knows the model."""
    several = len(result.target.ranges) > 1
    unknown = several and any(Code.UNKNOWN_CLASS in v.codes for v in result.releases)
    return result.target.label + (" that knows the model" if unknown else "")


def conclude(outcome: ScanOutcome) -> Conclusion:
    """The last words on a model that was scanned."""
    result = outcome.result
    assert result is not None
    text = " ".join(_verdict_sentences(result))
    if outcome.left_out:
        text += f" {count(outcome.left_out, 'finding')} left out by --select or --ignore."
    remaining = [f for f in result.findings if f.counts]
    unfixable = any(f.blocking and f.reason is not None for f in remaining)
    return Conclusion(result.verdict, text, not unfixable and any(f.reason is None for f in remaining))


def _verdict_sentences(result: ScanResult) -> list[str]:
    """`Fails in 2 of 8 release ranges (0.31.0-0.33.0).`, worst verdict first."""
    label, target = target_label(result), result.target
    judged = [v for v in result.releases if v.release in target.ranges and Code.UNKNOWN_CLASS not in v.codes]
    if len(target.ranges) > 1:
        sentences = []
        for verdict, words in _VERDICTS.items():
            found = [v.release for v in judged if v.verdict is verdict]
            if found and len(found) < len(judged):
                where = f"{len(found)} of {len(judged)} release ranges ({format_ranges(found)})"
                sentences.append(f"{words} in {where}.")
        if sentences:
            return sentences
    return [f"{_VERDICTS.get(result.verdict, 'Loads')} in {label}."]


class Summary(NamedTuple):
    """A row of the summary: the model, its verdict or "error", and the codes or the error's words."""

    model: str
    verdict: str
    because: str


def summarize(outcome: ScanOutcome) -> Summary:
    """A model in a row."""
    model = escape_control_chars(outcome.model)
    if outcome.result is None:
        kind = "skipped" if outcome.error is not None and outcome.error.exit_code == 3 else "error"
        return Summary(model, kind, escape_control_chars(str(outcome.error).removeprefix(f"{outcome.model}: ")))
    counting = sorted({f.code.value for f in outcome.result.findings if f.counts})
    return Summary(model, outcome.result.verdict, " ".join(counting))


def totals(rows: Iterable[Summary]) -> str:
    """`3 models: 1 loads, 2 fails`."""
    counts = Counter(row.verdict for row in rows)
    order = ("loads", "note", "degraded", "wrong", "fails", "skipped", "error")
    parts = ", ".join(f"{counts[v]} {v}" for v in order if counts[v])
    return f"{count(sum(counts.values()), 'model')}: {parts}"
