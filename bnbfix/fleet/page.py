"""A fleet as one self-contained page: models by vLLM releases, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from ..report.html import mark_verdict, render_page
from ..report.text import count, escape_control_chars
from .results import COUNTING, NOTHING_TO_DO, REPAIRED, VERDICTS, Row

SHOWN_AS = {REPAIRED: "note", NOTHING_TO_DO: "loads"}  # verdicts of a repair, which have no sign of their own


def count_verdicts(rows: Iterable[Row]) -> str:
    """`1,000 models: 12 fails, 988 loads`."""
    counts = Counter(row.verdict for row in rows)
    parts = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
    return f"{count(sum(counts.values()), 'model')}: {parts}"


def sort_worst_first(rows: Iterable[Row]) -> list[Row]:
    """The rows by verdict, then by the number of releases that count against the model, then by name."""
    return sorted(rows, key=lambda r: (VERDICTS.index(r.verdict), -_count_bad(r), r.model))


def _count_bad(row: Row) -> int:
    return sum(v.verdict in COUNTING for v in row.releases)


def render_fleet(rows: Sequence[Row], label: str) -> Iterator[str]:
    """The page. `label` is the target in words."""
    yield from render_page(f"{count(len(rows), 'model')}, {label}", _body(sort_worst_first(rows), label))


def _body(rows: Sequence[Row], label: str) -> Iterator[str]:
    heads = dict.fromkeys((v.first, v.last) for row in rows for v in row.releases)
    releases = [first if first == last else f"{first}-{last}" for first, last in heads]
    yield f'<section class="summary"><h1>{_e(count_verdicts(rows))}</h1>\n<p>For {_e(label)}.</p>'
    yield '<div class="scroll"><table class="list"><thead><tr><th scope="col">model<th scope="col">verdict'
    yield "".join(f'<th scope="col">{name}' for name in releases) + '<th scope="col">because of</thead><tbody>'
    for row in rows:
        shown = mark_verdict(SHOWN_AS.get(row.verdict, row.verdict))
        because = f'<a href="{_e(row.url)}">pull request</a>' if row.url else _e(row.because)
        cells = {(v.first, v.last): _cell(v.verdict, v.codes) for v in row.releases}
        yield f'<tr><th scope="row">{_e(row.model)}<td>{shown}'
        yield "".join(f"<td>{cells.get(head, '')}" for head in heads) + f"<td>{because}"
    if releases:
        bad = Counter((v.first, v.last) for row in rows for v in row.releases if v.verdict in COUNTING)
        yield '<tr><th scope="row">models with findings<td>' + "".join(f"<td>{bad[head]}" for head in heads)
    yield "</tbody></table></div></section>"


def _cell(verdict: str, codes: Iterable[str]) -> str:
    return f"{mark_verdict(verdict)} <small>{' '.join(codes)}</small>"


def _e(text: str) -> str:
    return escape(escape_control_chars(text), quote=True)
