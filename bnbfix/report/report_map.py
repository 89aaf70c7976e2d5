"""The map of a checkpoint for a terminal: ASCII, and readable without colour."""

from __future__ import annotations

from collections.abc import Iterator

from .layer_map import LayerMap, Section, State
from .lines import Layout, Line, Span, fold
from .text import escape_control_chars

CELLS = {
    State.QUANTIZED: "cyan",
    State.REPAIRED: "green",
    State.FIXABLE: "bold yellow",
    State.CONFLICT: "bold red",
    State.ABSENT: "dim",
}


def layer_map_lines(grid: LayerMap, layout: Layout) -> Iterator[Line]:
    """The map turned round, to be small: modules down and layers across, a character for each cell, and a legend."""
    for section in grid.sections:
        if section.columns == ("",):
            yield from _around(section, layout)
        else:
            yield from _stack(section, layout)
    marks = [Span(f"{state.mark} {state.meaning}", CELLS.get(state, "")) for state in grid.counts()]
    for span in marks:
        yield (Span("  "), span)


def _stack(section: Section, layout: Layout) -> Iterator[Line]:
    label = max(map(len, section.columns)) + 4
    step = max((layout.width - label) // 10, 1) * 10
    for start in range(0, len(section.rows), step):
        rows = section.rows[start : start + step]
        named = f"{section.title}, layers {rows[0].label} to {rows[-1].label}"
        yield (Span(named, "bold"),)
        yield (Span(" " * label + "".join(f"{row.label:<10}"[:10] for row in rows[::10]).rstrip(), "dim"),)
        if any(row.kind for row in rows):
            kinds = "".join("|" if row.kind.startswith("full") else " " for row in rows)
            yield Span(f"  {'full':<{label - 2}}", "dim"), Span(kinds, "dim")
        for column in section.columns:
            cells = [row.cells.get(column) for row in rows]
            marks = [Span(c.state.mark, CELLS.get(c.state, "")) if c else Span(" ") for c in cells]
            yield (Span(f"  {column:<{label - 2}}"), *marks)
        yield ()


def _around(section: Section, layout: Layout) -> Iterator[Line]:
    yield (Span(section.title, "bold"),)
    for row in section.rows:
        cell = row.cells[""]
        first, *rest = fold(escape_control_chars(f"{row.label} ({cell.note})"), layout.width - 4)
        yield Span("  "), Span(cell.state.mark, CELLS.get(cell.state, "")), Span(f" {first}")
        yield from ((Span("    " + part),) for part in rest)
    yield ()
