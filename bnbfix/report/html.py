"""A scan as one self-contained page: verdicts by release, a map of the checkpoint, and the findings.

It loads nothing: no script, no image, no font. Its style sheet is inside, and its policy forbids the rest. All of it is
ASCII, so that it can be written in any encoding.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from html import escape
from importlib import resources

from ..__version__ import __version__
from ..engines.targets import label_ranges
from ..rules.scan import Finding, ScanResult
from .layer_map import Cell, LayerMap, Section, State
from .next_step import after_scan
from .outcome import ScanOutcome
from .text import (
    by_code,
    collapse,
    conclude,
    contents,
    count,
    escape_control_chars,
    fix_text,
    matrix,
    summarize,
    target_label,
    totals,
)

SIGNS = {
    "loads": "\u2713",
    "note": "i",
    "degraded": "~",
    "wrong": "\u2260",
    "fails": "\u2715",
    "error": "!",
    "skipped": "\u2013",
}
OPEN = 8  # up to this many names are shown at once; more are behind a click


def render(outcomes: Iterable[ScanOutcome]) -> Iterator[str]:
    """The page. Outcomes should carry their layer maps."""
    found = list(outcomes)
    title = _e(found[0].model) if len(found) == 1 else count(len(found), "model")
    yield from render_page(title, _body(found))


def render_frame(result: ScanResult) -> str:
    """The page in a frame of its own, for a notebook: its style stays inside."""
    page = "".join(render([ScanOutcome(result.model, result)]))
    return f'<iframe srcdoc="{escape(page)}" width="100%" height="600" style="border: 0"></iframe>'


def style() -> str:
    """The page's style sheet."""
    return resources.files(__package__).joinpath("assets", "html.css").read_text("utf-8").strip()


def render_page(title: str, body: Iterable[str]) -> Iterator[str]:
    """A page around HTML."""
    text = "\n".join(_page(title, body))
    yield text.encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _page(title: str, body: Iterable[str]) -> Iterator[str]:
    css = style()
    own = b64encode(sha256(css.encode()).digest()).decode()
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{own}'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title} - bnbfix</title>
<style>{css}</style>
</head>
<body>
<main>"""
    yield from body
    yield f"</main>\n<footer>bnbfix {__version__}</footer>\n</body>\n</html>"


def _body(found: Sequence[ScanOutcome]) -> Iterator[str]:
    if len(found) > 1:
        yield from _summary(found)
    for i, o in enumerate(found, 1):
        yield from _model(o, f"m{i}")


def _summary(found: Sequence[ScanOutcome]) -> Iterator[str]:
    rows = [summarize(o) for o in found]
    yield f'<section class="summary"><h1>{_e(totals(rows))}</h1>\n<div class="scroll"><table class="list">'
    yield '<thead><tr><th scope="col">model<th scope="col">verdict<th scope="col">because of</thead><tbody>'
    for i, row in enumerate(rows, 1):
        yield f'<tr><th scope="row"><a href="#m{i}">{_e(row.model)}</a><td>{mark_verdict(row.verdict)}'
        yield f"<td>{_e(row.because)}"
    yield "</tbody></table></div></section>"


def _model(o: ScanOutcome, key: str) -> Iterator[str]:
    yield f'<article id="{key}">'
    if o.result is None:
        verdict = summarize(o).verdict
        yield f"<header><h1>{_e(o.model)}</h1>\n<p>{mark_verdict(verdict)} {_e(str(o.error))}</p>"
        yield f"<p>{_e(o.error.hint)}</p></header>" if o.error and o.error.hint else "</header>"
    else:
        yield from _header(o, o.result)
        yield from _releases(o.result, key)
        if o.layer_map is not None:
            yield from _map(o.layer_map, target_label(o.result), key)
        yield from _findings(o.result, key)
    yield "</article>"


def _header(o: ScanOutcome, result: ScanResult) -> Iterator[str]:
    last = conclude(o)
    yield f"<header><h1>{_e(o.model)}</h1>\n<p>{_e(contents(result))}</p>"
    yield f'<p class="last">{mark_verdict(result.verdict)} {_e(last.words)}</p>'
    for step in after_scan(o):
        yield f"<p>{_e(step.words)}</p>"
        yield from (f"<pre><code>{_e(command)}</code></pre>" for command in step.commands)
    yield "</header>"


def mark_verdict(verdict: str) -> str:
    """A verdict with its sign, in its colour."""
    return f'<span class="verdict {verdict}"><span aria-hidden="true">{SIGNS[verdict]}</span> {verdict}</span>'


def _releases(result: ScanResult, key: str) -> Iterator[str]:
    reported = {f.code.value for f in result.findings}
    engine = _e(result.target.engine)
    yield f'<section class="releases"><h2>By {engine} release</h2>\n<div class="scroll"><table class="list">'
    yield f'<thead><tr><th scope="col">{engine}<th scope="col">verdict<th scope="col" class="n">tensors'
    yield '<th scope="col">because of</thead><tbody>'
    for v in matrix(result.releases):
        codes = " ".join(f'<a href="#{key}-{c}">{c}</a>' if c in reported else c for c in v.codes.split())
        yield f'<tr><th scope="row">{v.releases}<td>{mark_verdict(v.verdict)}'
        yield f'<td class="n">{v.tensors or ""}<td>{codes}'
    yield "</tbody></table></div></section>"


def _map(layer_map: LayerMap, target: str, key: str) -> Iterator[str]:
    yield f'<section class="map"><h2>Map of the checkpoint, for {_e(target)}</h2>\n<ul class="legend">'
    for state, n in layer_map.counts().items():
        yield f'<li><span class="cell {state.name.lower()}">{state.mark}</span> {state.meaning} <small>{n}</small>'
    yield '</ul>\n<div class="stacks">'
    for section in layer_map.sections:
        yield from _around(section, key) if section.columns == ("",) else _stack(section, key)
    yield "</div></section>"


def _stack(section: Section, key: str) -> Iterator[str]:
    caption = f"{section.title}, {count(len(section.rows), 'layer')}"
    yield f'<div class="stack scroll"><table class="grid"><caption>{caption}</caption><thead><tr><th scope="col">layer'
    yield "".join(f'<th scope="col">{f"<span>{c}</span>" if len(c) > 1 else c}' for c in section.columns)
    yield "</thead><tbody>"
    for row in section.rows:
        kind = f" <small>{row.kind.replace('sliding, ', '')}</small>" if row.kind not in ("", "sliding") else ""
        full = ' class="full"' if row.kind.startswith("full") else ""
        cells = [(row.cells.get(c), f"layer {row.label}, {c}") for c in section.columns]
        marks = "".join(f"<td>{_mark(cell, where, key) if cell else ''}" for cell, where in cells)
        yield f'<tr{full}><th scope="row">{row.label}{kind}{marks}'
    yield "</tbody></table></div>"


def _mark(cell: Cell, where: str, key: str) -> str:
    codes = " ".join(c.value for c in cell.codes)
    meaning = cell.state.meaning if cell.state is not State.ABSENT else "not in the file"
    title = _e(f"{where}: {meaning}{f' ({codes})' if codes else ''}; {cell.note}")
    attributes = f'class="cell {cell.state.name.lower()}" title="{title}"'
    if cell.codes:
        return f'<a href="#{key}-{cell.codes[0].value}" {attributes}>{cell.state.mark}</a>'
    return f"<abbr {attributes}>{cell.state.mark}</abbr>"


def _around(section: Section, key: str) -> Iterator[str]:
    yield f'<div class="stack scroll"><table class="around"><caption>{section.title}</caption><tbody>'
    for row in section.rows:
        name = _e(row.label).replace(".", ".<wbr>").replace("_", "_<wbr>")
        yield f'<tr><td>{_mark(row.cells[""], row.label, key)}<th scope="row">{name}'
        yield f"<td><small>{_e(row.cells[''].note)}</small>"
    yield "</tbody></table></div>"


def _findings(result: ScanResult, key: str) -> Iterator[str]:
    yield f'<section class="findings"><h2>Findings, for {_e(target_label(result))}</h2>'
    if not result.findings:
        yield "<p>None.</p>"
    for same in by_code(result.findings):
        yield from _code(same, key)
    yield "</section>"


def _code(findings: Sequence[Finding], key: str) -> Iterator[str]:
    code, worst = findings[0].code, max(f.severity for f in findings)
    yield f'<section class="finding {worst}" id="{key}-{code.value}"><h3>{code.value} '
    yield f'<span class="verdict {worst}">{worst}</span> {_e(code.explanation.title)}</h3>'
    yield f"<p>{_prose(code.explanation.why)}</p>\n<ul>"
    for f in findings:
        yield f"<li>{label_ranges(f.releases)} <b>{f.severity}</b>: {_e(f.message)}"
    for words in dict.fromkeys(map(fix_text, findings)):
        yield f"<li>{_prose(words)}"
    yield "".join(f'<li><a href="{_e(url)}">{_e(url)}</a>' for url in code.explanation.upstream)
    yield "</ul>"
    names = list(dict.fromkeys(name for f in findings for name in f.tensors))
    patterns = collapse(names)
    if names:
        opened = " open" if len(patterns) <= OPEN else ""
        yield f"<details{opened}><summary>{count(len(names), 'name')}</summary><ul>"
        yield "".join(f"<li><code>{_e(pattern)}</code>" for pattern in patterns)
        yield "</ul></details>"
    yield "</section>"


def _prose(text: str) -> str:
    """Text whose `code` between backticks is marked up as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _e(text))


def _e(text: str) -> str:
    """Text from anywhere, made safe for HTML and for the eye."""
    return escape(escape_control_chars(text), quote=True)
