"""`bnbfix scan`: its options, its formats and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..report.outcome import ScanOutcome, read_names, scan_models
from ..report.terminal import layout, print_error, write_file, write_lines, write_text
from ..rules.selection import LEVELS, Selection, worst


class Format(str, Enum):
    """How a scan is written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    markdown = "markdown"
    github = "github"
    sarif = "sarif"
    html = "html"


class Level(str, Enum):
    """The least severity that makes the exit code 1."""

    note = "note"
    degraded = "degraded"
    wrong = "wrong"
    fails = "fails"
    never = "never"


Render = Callable[[Iterable[ScanOutcome]], Iterator[str]]

Models = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL", help="Folders, or repos on the Hub: org/name[@revision].")
]
Revision = Annotated[str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repo.")]
From = Annotated[
    str | None, typer.Option("--from", metavar="FILE", help="Scan the models that FILE names, one a line; - is stdin.")
]
Vllm = Annotated[
    str | None,
    typer.Option(
        "--vllm",
        metavar="TARGET",
        envvar="BNBFIX_VLLM",
        help='A vLLM release (0.22.1), or "portable": one checkpoint for every release. '
        "Left out: the vLLM installed here, else portable.",
    ),
]
AsFormat = Annotated[Format, typer.Option("--format", envvar="BNBFIX_FORMAT", help="How the result is written.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write --format to FILE, and the table to stdout.")
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="CODES",
        envvar="BNBFIX_SELECT",
        help="Count these findings alone: codes or their beginnings (BNB1), with commas between.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="CODES", envvar="BNBFIX_IGNORE", help="Do not count these findings."),
]
FailOn = Annotated[
    Level, typer.Option("--fail-on", envvar="BNBFIX_FAIL_ON", help="The least severity that makes the exit code 1.")
]
ExitZero = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 even when findings remain: --fail-on never.")]
Map = Annotated[bool, typer.Option("--map", help="Draw which modules of which layers are quantized or in conflict.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", envvar="BNBFIX_VERBOSE", help="Every tensor, and notes too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", envvar="BNBFIX_QUIET", help="A line for each model, no more.")]


def scan(
    models: Models = None,
    source: From = None,
    vllm: Vllm = None,
    revision: Revision = None,
    format: AsFormat = Format.table,
    output: Output = None,
    select: Select = None,
    ignore: Ignore = None,
    fail_on: FailOn = Level.degraded,
    exit_zero: ExitZero = False,
    map: Map = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Say what would go wrong in vLLM, where, and what fixes it. Reads headers only."""
    from ..engines.vllm.releases import find_installed, resolve_target

    names = _names(models or [], source)
    several = source is not None or len(names) > 1
    selection = Selection.parse(select or (), ignore or ())
    if output is not None and format is Format.table:
        raise UsageError("--output writes what --format names, and a table goes to stdout", hint="Add --format.")
    render = _renderer(format, several)
    target = resolve_target(vllm, None if vllm else find_installed())
    seen: list[ScanOutcome] = []
    outcomes = _kept(
        scan_models(names, target, selection, revision=revision, with_grid=map or format is Format.html), seen
    )
    if output is None and format is not Format.table:
        write_text(render(outcomes))
    else:
        from ..report.scan_table import table

        shown = layout(verbose=verbose, quiet=quiet)
        write_lines(table(outcomes, shown, several=several, with_map=map))
    if output is not None:
        write_file(output, render(seen))
    return _exit(seen, "never" if exit_zero else fail_on.value, several)


def _names(models: list[str], source: str | None) -> list[str]:
    """The models that are named, each once, in order."""
    if source is not None:
        try:
            text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
        except (OSError, ValueError) as e:
            raise UsageError(f"--from cannot be read ({getattr(e, 'strerror', None) or e})", where=source) from e
        models = models + read_names(text, "stdin" if source == "-" else source)
    if not models:
        raise UsageError("Missing argument 'MODEL'", hint="Name folders or repos, or a file of them: --from FILE.")
    return list(dict.fromkeys(models))


def _renderer(format: Format, several: bool) -> Render:
    """What writes a format. Each is imported when it is asked for."""
    if format is Format.sarif:
        from ..report.sarif import render
    elif format is Format.markdown:
        from ..report.markdown import render
    elif format is Format.github:
        from ..report.github import render
    elif format is Format.html:
        from ..report.html import render
    elif format is Format.jsonl:
        from ..report.json import render_lines as render
    else:
        from ..report.json import render as render_whole

        return lambda outcomes: render_whole(outcomes, several=several)
    return render


def _kept(outcomes: Iterable[ScanOutcome], seen: list[ScanOutcome]) -> Iterator[ScanOutcome]:
    for outcome in outcomes:
        seen.append(outcome)
        yield outcome


def _exit(outcomes: list[ScanOutcome], level: str, several: bool) -> int:
    """The exit code, after a word on stderr for what could not be scanned or must not be used."""
    for o in outcomes:
        if o.error is not None:
            words = str(o.error)
            print_error(f"{o.model}: {words}" if several and o.model not in words else words, o.error.hint)
        elif o.exit_code(None):
            assert o.result is not None
            damaged = next(f for f in o.result.findings if f.code.value == "BNB201")
            words = f"{o.model}: {damaged.message}" if several else damaged.message
            print_error(words, "Quantize the model again, or fetch the file again.")
    codes = [o.exit_code(LEVELS[level]) for o in outcomes]
    return worst(codes) if several else codes[0]
