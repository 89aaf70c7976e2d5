"""A scan for people at a terminal: the matrix, the findings and the map, for 80 columns and for pipes.

It is laid out without rich, whose import takes longer than the scan; `terminal` adds the colours at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engines.targets import label_ranges
from ..rules.rule import Severity
from ..rules.scan import Finding, ReleaseVerdict, ScanResult
from .next_step import after_scan
from .outcome import ScanOutcome
from .terminal import StyledLine, StyledText, TableOptions, fold
from .text import (
    SHOWN,
    Summary,
    by_code,
    collapse,
    conclude,
    contents,
    count,
    escape_control_chars,
    fix_text,
    matrix,
    natural_order,
    summarize,
    totals,
)

if TYPE_CHECKING:
    from .layer_map import LayerMap, Section, State

STYLES = {
    Severity.LOADS: "green",
    Severity.NOTE: "cyan",
    Severity.DEGRADED: "yellow",
    Severity.WRONG: "magenta",
    Severity.FAILS: "red",
}
VERDICTS = {str(s): style for s, style in STYLES.items()} | {"error": "red", "skipped": "dim"}
CELL_STYLES = {  # by the name of a cell's state
    "QUANTIZED": "cyan",
    "REPAIRED": "green",
    "FIXABLE": "bold yellow",
    "CONFLICT": "bold red",
    "ABSENT": "dim",
}


def render_table(
    outcomes: Iterable[ScanOutcome], options: TableOptions, *, several: bool, with_map: bool
) -> Iterator[StyledLine]:
    """The report of every model as its outcome comes, and for `several` a summary at the end."""
    rows: list[Summary] = []
    repairs: list[str] = []
    for outcome in outcomes:
        rows.append(summarize(outcome))
        if outcome.result is not None and conclude(outcome).fixable:
            repairs += [command for step in after_scan(outcome) for command in step.commands]
        if options.quiet:
            if several or outcome.result is not None:  # the command line itself reports a single model's error
                yield from _quiet(rows[-1])
        else:
            yield from _report(outcome if with_map else replace(outcome, layer_map=None), options, several)
    if several:
        if not options.quiet:
            yield from _grid(("model", "verdict", "because of"), [_summary(row) for row in rows], options)
            yield ()
        yield (StyledText(totals(rows), "bold"),)
        if repairs and not options.quiet:
            yield (StyledText(f"Repair {'them' if len(repairs) > 1 else 'it'}:"),)
            yield from _commands(repairs[:SHOWN])
            if len(repairs) > SHOWN:
                yield (StyledText(f"  # and {len(repairs) - SHOWN} more"),)


def _commands(commands: Iterable[str]) -> Iterator[StyledLine]:
    """Commands in whole lines, to be pasted."""
    for command in commands:
        yield (StyledText(f"  {command}"),)


def _quiet(row: Summary) -> Iterator[StyledLine]:
    yield (
        StyledText(f"{row.model}: "),
        StyledText(row.verdict, VERDICTS[row.verdict]),
        StyledText(f" {row.because}".rstrip()),
    )


def _summary(row: Summary) -> list[StyledText]:
    return [StyledText(row.model), StyledText(row.verdict, VERDICTS[row.verdict]), StyledText(row.because)]


def _report(outcome: ScanOutcome, options: TableOptions, several: bool) -> Iterator[StyledLine]:
    if outcome.result is None:
        if several:
            yield from _wrapped(escape_control_chars(outcome.model), options, "bold")
            yield from _wrapped(f"error: {escape_control_chars(str(outcome.error))}", options, "red")
            yield ()
        return
    yield from scan_lines(outcome, outcome.result, options)
    if several:
        yield ()


def scan_lines(outcome: ScanOutcome, result: ScanResult, options: TableOptions) -> Iterator[StyledLine]:
    """The matrix of releases, every finding of the target, the map where there is one, and the conclusion."""
    yield from _wrapped(escape_control_chars(result.model), options, "bold")
    yield from _wrapped(contents(result), options)
    yield ()
    if result.releases:
        yield from _matrix(result.releases, options)
        yield ()
    for same in by_code(f for f in result.findings if f.counts or options.verbose):
        yield from _code(same, options)
    notes = [f for f in result.findings if not f.counts]
    if notes and not options.verbose:
        codes = ", ".join(sorted({f.code.value for f in notes}))
        yield from _wrapped(f"{count(len(notes), 'note')} ({codes}), shown with --verbose", options, "dim")
    if outcome.layer_map is not None:
        if notes and not options.verbose:
            yield ()
        yield from layer_map_lines(outcome.layer_map, options)
        yield ()
    last = conclude(outcome)
    yield from _wrapped(last.words, options, f"bold {STYLES[last.verdict]}")
    for step in after_scan(outcome):
        yield from _wrapped(step.words, options)
        yield from _commands(step.commands)


def _matrix(verdicts: Sequence[ReleaseVerdict], options: TableOptions) -> Iterator[StyledLine]:
    rows = [
        [
            StyledText(v.releases),
            StyledText(v.verdict, STYLES[v.verdict]),
            StyledText(str(v.tensors or "")),
            StyledText(v.codes),
        ]
        for v in matrix(verdicts)
    ]
    return _grid((verdicts[0].release.engine, "verdict", "tensors", "because of"), rows, options, right=2)


def _grid(
    heads: Sequence[str], rows: Sequence[Sequence[StyledText]], options: TableOptions, right: int = -1
) -> Iterator[StyledLine]:
    """Columns with a rule below their heads. What the first and the last have no room for is wrapped."""
    widths = [max([len(head), *(len(row[i].text) for row in rows)]) for i, head in enumerate(heads)]
    room = options.width - sum(widths[1:-1]) - 2 * (len(heads) - 1)
    widths[-1] = min(widths[-1], max(room - widths[0], room // 2, 8))
    widths[0] = min(widths[0], max(room - widths[-1], 8))
    yield _columns([StyledText(head, "bold") for head in heads], widths, right)
    yield (StyledText(options.rule * (sum(widths) + 2 * (len(widths) - 1))),)
    for row in rows:
        parts = [fold(span.text, width) for span, width in zip(row, widths, strict=True)]
        for n in range(max(map(len, parts))):
            cells = [StyledText(p[n] if n < len(p) else "", s.style) for p, s in zip(parts, row, strict=True)]
            yield _columns(cells, widths, right)


def _columns(cells: Sequence[StyledText], widths: Sequence[int], right: int) -> StyledLine:
    line: list[StyledText] = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        blank = StyledText(" " * (width - len(cell.text)))
        line += [blank, cell] if i == right else [cell, blank]
        line.append(StyledText("  "))
    return tuple(line)


def _code(findings: Sequence[Finding], options: TableOptions) -> Iterator[StyledLine]:
    """All findings of one code: releases, verdicts and tensors of each, and the fix once."""
    worst = max(f.severity for f in findings)
    yield (
        StyledText(findings[0].code.value, "bold"),
        StyledText(f" {worst}", STYLES[worst]),
        StyledText(f": {findings[0].code.explanation.title}"),
    )
    shown: tuple[str, ...] | None = None
    for f in findings:
        yield from _wrapped(
            f"{label_ranges(f.releases)} {f.severity}: {escape_control_chars(f.message)}", options, by=2
        )
        if f.tensors != shown:
            yield from _names(f.tensors, options)
        shown = f.tensors
    for words in dict.fromkeys(map(fix_text, findings)):
        yield from _wrapped(words, options, by=2)
    yield ()


def _names(tensors: Sequence[str], options: TableOptions) -> Iterator[StyledLine]:
    names = (
        list(map(escape_control_chars, sorted(tensors, key=natural_order))) if options.verbose else collapse(tensors)
    )
    shown = names if options.verbose else names[:SHOWN]
    for name in shown:  # in one line, however long, to be found and copied
        yield (StyledText(f"    {name}"),)
    if more := len(names) - len(shown):
        yield from _wrapped(f"and {count(more, 'more pattern')}; --verbose shows all", options, by=4)


def _wrapped(text: str, options: TableOptions, style: str = "", by: int = 0) -> Iterator[StyledLine]:
    for part in fold(text, options.width - by):
        yield (StyledText(" " * by + part, style),)


def layer_map_lines(layer_map: LayerMap, options: TableOptions) -> Iterator[StyledLine]:
    """The map, transposed to be small: modules down, layers across, a character for each cell, and a legend."""
    for section in layer_map.sections:
        yield from _around(section, options) if section.columns == ("",) else _stack(section, options)
    for state in layer_map.counts():
        yield StyledText("  "), _mark(state), StyledText(f" {state.meaning}", CELL_STYLES.get(state.name, ""))


def _mark(state: State) -> StyledText:
    return StyledText(state.mark, CELL_STYLES.get(state.name, ""))


def _stack(section: Section, options: TableOptions) -> Iterator[StyledLine]:
    label = max(map(len, section.columns)) + 4
    step = max((options.width - label) // 10, 1) * 10
    for start in range(0, len(section.rows), step):
        rows = section.rows[start : start + step]
        yield (StyledText(f"{section.title}, layers {rows[0].label} to {rows[-1].label}", "bold"),)
        yield (StyledText(" " * label + "".join(f"{row.label:<10}"[:10] for row in rows[::10]).rstrip(), "dim"),)
        if any(row.kind for row in rows):
            kinds = "".join("|" if row.kind.startswith("full") else " " for row in rows)
            yield StyledText(f"  {'full':<{label - 2}}", "dim"), StyledText(kinds, "dim")
        for column in section.columns:
            cells = [row.cells.get(column) for row in rows]
            marks = [_mark(cell.state) if cell else StyledText(" ") for cell in cells]
            yield (StyledText(f"  {column:<{label - 2}}"), *marks)
        yield ()


def _around(section: Section, options: TableOptions) -> Iterator[StyledLine]:
    yield (StyledText(section.title, "bold"),)
    for row in section.rows:
        cell = row.cells[""]
        first, *rest = fold(escape_control_chars(f"{row.label} ({cell.note})"), options.width - 4)
        yield StyledText("  "), _mark(cell.state), StyledText(f" {first}")
        yield from ((StyledText("    " + part),) for part in rest)
    yield ()
