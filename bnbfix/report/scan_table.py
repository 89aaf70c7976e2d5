"""A scan for people at a terminal: the matrix, the findings, the map, good at 80 columns and in a pipe.

Laid out here, without rich, which would cost more time than the scan; a terminal's colours are laid over it at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ..rules.rule import Severity
from ..rules.scan import Finding, ReleaseVerdict, ScanResult
from .lines import Layout, Line, Span, fold
from .outcome import ScanOutcome
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
    runs,
    summarize,
    totals,
)

STYLES = {Severity.FAILS: "red", Severity.WRONG: "magenta", Severity.DEGRADED: "yellow", Severity.LOADS: "green"}
VERDICTS = {str(s): style for s, style in STYLES.items()} | {"error": "red", "skipped": "dim"}


def table(outcomes: Iterable[ScanOutcome], layout: Layout, *, several: bool, with_map: bool) -> Iterator[Line]:
    """The report of every model as its outcome comes, and for `several` a summary at the end."""
    rows: list[Summary] = []
    for outcome in outcomes:
        rows.append(summarize(outcome))
        if layout.quiet:
            if several or outcome.result is not None:  # of a single model's error, the command line itself tells
                yield from _quiet(rows[-1])
        else:
            yield from _report(outcome if with_map else replace(outcome, grid=None), layout, several)
    if several:
        if not layout.quiet:
            yield from _grid(("model", "verdict", "because of"), [_summary(row) for row in rows], layout)
            yield ()
        yield (Span(totals(rows), "bold"),)


def _quiet(row: Summary) -> Iterator[Line]:
    yield Span(f"{row.model}: "), Span(row.verdict, VERDICTS[row.verdict]), Span(f" {row.because}".rstrip())


def _summary(row: Summary) -> list[Span]:
    return [Span(row.model), Span(row.verdict, VERDICTS[row.verdict]), Span(row.because)]


def _report(outcome: ScanOutcome, layout: Layout, several: bool) -> Iterator[Line]:
    if outcome.result is None:
        if several:
            yield from _wrapped(escape_control_chars(outcome.model), layout, "bold")
            yield from _wrapped(f"error: {escape_control_chars(str(outcome.error))}", layout, "red")
            yield ()
        return
    yield from scan_lines(outcome, outcome.result, layout)
    if several:
        yield ()


def scan_lines(outcome: ScanOutcome, result: ScanResult, layout: Layout) -> Iterator[Line]:
    """The matrix of releases, every finding of the target, the map where there is one, and the conclusion."""
    yield from _wrapped(escape_control_chars(result.model), layout, "bold")
    yield from _wrapped(contents(result), layout)
    yield ()
    yield from _matrix(result.releases, layout)
    yield ()
    for same in by_code(f for f in result.findings if f.counts or layout.verbose):
        yield from _code(same, layout)
    notes = [f for f in result.findings if not f.counts]
    if notes and not layout.verbose:
        codes = ", ".join(sorted({f.code.value for f in notes}))
        yield from _wrapped(f"{count(len(notes), 'note')} ({codes}), shown with --verbose", layout, "dim")
    if outcome.grid is not None:
        from .report_map import layer_map_lines

        if notes and not layout.verbose:
            yield ()
        yield from layer_map_lines(outcome.grid, layout)
        yield ()
    last = conclude(outcome)
    words = last.words + (f" Repair it: {last.command}" if last.command else "")
    for i, text in enumerate(fold(words, layout.width)):
        end = len(last.words) if i == 0 else 0  # the command is told more quietly than the verdict
        yield Span(text[:end], f"bold {STYLES[last.verdict]}"), Span(text[end:])


def _matrix(verdicts: Sequence[ReleaseVerdict], layout: Layout) -> Iterator[Line]:
    rows = [
        [Span(v.releases), Span(v.verdict, STYLES[v.verdict]), Span(str(v.tensors or "")), Span(v.codes)]
        for v in matrix(verdicts)
    ]
    return _grid(("vLLM", "verdict", "tensors", "because of"), rows, layout, right=2)


def _grid(heads: Sequence[str], rows: Sequence[Sequence[Span]], layout: Layout, right: int = -1) -> Iterator[Line]:
    """Columns with a rule below their heads. What the first and the last have no room for is wrapped."""
    widths = [max([len(head), *(len(row[i].text) for row in rows)]) for i, head in enumerate(heads)]
    room = layout.width - sum(widths[1:-1]) - 2 * (len(heads) - 1)
    widths[-1] = min(widths[-1], max(room - widths[0], room // 2, 8))
    widths[0] = min(widths[0], max(room - widths[-1], 8))
    yield _columns([Span(head, "bold") for head in heads], widths, right)
    yield (Span(layout.rule * (sum(widths) + 2 * (len(widths) - 1))),)
    for row in rows:
        parts = [fold(span.text, width) for span, width in zip(row, widths, strict=True)]
        for n in range(max(map(len, parts))):
            cells = [Span(p[n] if n < len(p) else "", s.style) for p, s in zip(parts, row, strict=True)]
            yield _columns(cells, widths, right)


def _columns(cells: Sequence[Span], widths: Sequence[int], right: int) -> Line:
    line: list[Span] = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        blank = Span(" " * (width - len(cell.text)))
        line += [blank, cell] if i == right else [cell, blank]
        line.append(Span("  "))
    return tuple(line)


def _code(findings: Sequence[Finding], layout: Layout) -> Iterator[Line]:
    """All findings of one code: what each range of releases makes of which tensors, and the fix once."""
    worst = max(f.severity for f in findings)
    style = STYLES.get(worst, "cyan")
    yield (
        Span(findings[0].code.value, "bold"),
        Span(f" {worst}", style),
        Span(f": {findings[0].code.explanation.title}"),
    )
    shown: tuple[str, ...] | None = None
    for f in findings:
        yield from _wrapped(f"{runs(f.releases)} {f.severity}: {escape_control_chars(f.message)}", layout, by=2)
        if f.tensors != shown:
            yield from _names(f.tensors, layout)
        shown = f.tensors
    for words in dict.fromkeys(map(fix_text, findings)):
        yield from _wrapped(words, layout, by=2)
    yield ()


def _names(tensors: Sequence[str], layout: Layout) -> Iterator[Line]:
    names = [escape_control_chars(n) for n in tensors] if layout.verbose else collapse(tensors)
    shown = names if layout.verbose else names[:SHOWN]
    for name in shown:
        yield from _wrapped(name, layout, by=4)
    if more := len(names) - len(shown):
        yield from _wrapped(f"and {count(more, 'more pattern')}; --verbose shows all", layout, by=4)


def _wrapped(text: str, layout: Layout, style: str = "", by: int = 0) -> Iterator[Line]:
    for part in fold(text, layout.width - by):
        yield (Span(" " * by + part, style),)
