"""A scan as GitHub's and the Hub's markdown: for a pull request, a model card or a job summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ..engines.targets import label_ranges
from ..rules.rule import Severity
from ..rules.scan import Finding, ScanResult
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
    totals,
)

BAR = "\\|"  # does not end a cell, not even in a code span
EMOJI = {
    "loads": "\u2705",
    "note": "\u2139\ufe0f",
    "degraded": "\u26a0\ufe0f",
    "wrong": "\u274c",
    "fails": "\u274c",
    "error": "\u26d4",
    "skipped": "\u2796",
}


def render(outcomes: Iterable[ScanOutcome]) -> Iterator[str]:
    """A section for each model, and for several a summary."""
    seen = []
    for o in outcomes:
        seen.append(summarize(o))
        yield from (line + "\n" for line in _section(o))
    if len(seen) > 1:
        yield "## Summary\n\n"
        rows = [(code(r.model), f"{EMOJI[r.verdict]} {r.verdict}", escape(r.because)) for r in seen]
        yield from (line + "\n" for line in render_table(("model", "verdict", "because of"), rows))
        yield f"\n{totals(seen)}\n"


def _section(o: ScanOutcome) -> Iterator[str]:
    yield f"## bnbfix: {code(escape_control_chars(o.model))}"
    yield ""
    if o.result is None:
        yield f"{EMOJI[summarize(o).verdict]} {escape(escape_control_chars(str(o.error)))}"
        yield ""
        return
    last = conclude(o)
    yield f"{EMOJI[o.result.verdict]} **{last.words}** {escape(contents(o.result))}."
    yield ""
    yield from _releases(o.result)
    yield ""
    for same in by_code(o.result.findings):
        yield from _code(same)
    for step in after_scan(o):
        yield step.words
        yield ""
        yield from (f"    {command}" for command in step.commands)
        yield ""


def _releases(result: ScanResult) -> Iterator[str]:
    rows = [
        (v.releases, f"{EMOJI[v.verdict]} {v.verdict}", str(v.tensors or ""), v.codes) for v in matrix(result.releases)
    ]
    return render_table((result.target.engine, "verdict", "tensors", "because of"), rows)


def render_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join('---' for _ in heads)}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |"


def _code(findings: Sequence[Finding]) -> Iterator[str]:
    worst: Severity = max(f.severity for f in findings)
    yield f"### {findings[0].code.value} {worst}: {escape(findings[0].code.explanation.title)}"
    yield ""
    for f in findings:
        yield f"- {label_ranges(f.releases)} **{f.severity}**: {escape(escape_control_chars(f.message))}"
    for words in dict.fromkeys(map(fix_text, findings)):
        yield f"- {escape(words)}"
    yield ""
    names = list(dict.fromkeys(name for f in findings for name in f.tensors))
    if names:
        yield f"<details><summary>{count(len(names), 'name')}</summary>"
        yield ""
        yield from (f"- {code(name)}" for name in collapse(names))
        yield ""
        yield "</details>"
        yield ""


def escape(text: str) -> str:
    """Text that stays text: no markup, no HTML, no mentions and no links."""
    text = re.sub(r"([\\`*_\[\]#~])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"@(?=\w)", "@\u200b", text)
    return re.sub(r"(?i)(://|www\.)", "\u200b\\1\u200b", text)


def code(text: str) -> str:
    """Text in a code span, where only a fence longer than any run of backticks escapes them."""
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"
