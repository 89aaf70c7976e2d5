"""A scan as GitHub's workflow commands, which show as annotations of a run: one for each finding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from posixpath import normpath

from ..engines.targets import label_ranges
from ..rules.rule import Severity
from ..rules.scan import Finding
from .outcome import ScanOutcome
from .text import SHOWN, collapse, count, escape_control_chars, fix_text

COMMANDS = {Severity.FAILS: "error", Severity.WRONG: "error", Severity.DEGRADED: "warning", Severity.NOTE: "notice"}


def render(outcomes: Iterable[ScanOutcome]) -> Iterator[str]:
    """`::error file=...,title=...::message` for each finding, and for each model that could not be scanned."""
    for o in outcomes:
        if o.error is not None:
            level = "notice" if o.error.exit_code == 3 else "error"
            yield command(level, o.model, "bnbfix", f"{o.error}\n{o.error.hint or ''}".strip())
        for f in o.result.findings if o.result else ():
            title = f"{f.code.value}: {f.code.explanation.title}"
            yield command(COMMANDS[f.severity], normpath(f"{o.model}/{o.file(f)}"), title, _message(f))


def _message(f: Finding) -> str:
    names = collapse(f.tensors)
    more = [f"and {count(len(names) - SHOWN, 'more pattern')}"] if len(names) > SHOWN else []
    return "\n".join(
        [
            f"{label_ranges(f.releases)} {f.severity}: {escape_control_chars(f.message)}",
            *names[:SHOWN],
            *more,
            fix_text(f),
        ]
    )


def command(level: str, file: str, title: str, message: str) -> str:
    """A workflow command, escaped as actions/toolkit does it: % and line ends, in properties : and , too."""
    return f"::{level} file={_property(escape_control_chars(file))},title={_property(title)}::{_data(message)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
