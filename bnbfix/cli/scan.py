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
from ..report.terminal import print_error, show_logs, table_options, write_file, write_lines, write_text
from ..rules.rule import Code
from ..rules.selection import LEVELS, Selection, worst
from .options import DryLoadOption, Python, Quiet, Revision, Verbose, Vllm, live_from_options


class ScanFormat(str, Enum):
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
From = Annotated[
    str | None, typer.Option("--from", metavar="FILE", help="Scan the models listed in FILE, one per line; - is stdin.")
]
AsScanFormat = Annotated[ScanFormat, typer.Option("--format", envvar="BNBFIX_FORMAT", help="Output format.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Write the --format document to FILE, and the table to stdout."),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="CODES",
        envvar="BNBFIX_SELECT",
        help="Only count these findings: codes or prefixes of codes (BNB1), separated by commas.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="CODES", envvar="BNBFIX_IGNORE", help="Do not count these findings."),
]
FailOn = Annotated[
    Level, typer.Option("--fail-on", envvar="BNBFIX_FAIL_ON", help="The least severity that makes the exit code 1.")
]
ExitZero = Annotated[
    bool, typer.Option("--exit-zero", help="Exit 0 even when findings remain; the same as --fail-on never.")
]
Map = Annotated[
    bool, typer.Option("--map", help="Draw a map of the modules that are quantized or in conflict, by layer.")
]


def scan(
    models: Models = None,
    source: From = None,
    vllm: Vllm = None,
    revision: Revision = None,
    format: AsScanFormat = ScanFormat.table,
    output: Output = None,
    select: Select = None,
    ignore: Ignore = None,
    fail_on: FailOn = Level.degraded,
    exit_zero: ExitZero = False,
    map: Map = False,
    dry_load: DryLoadOption = False,
    python: Python = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Report what would go wrong in vLLM, where, and what fixes it. Reads headers only."""
    from ..api import choose_target

    show_logs(verbose - 1)
    names = _names(models or [], source)
    several = source is not None or len(names) > 1
    selection = Selection.parse(select or (), ignore or ())
    if output is not None and format is ScanFormat.table:
        raise UsageError("--output needs a --format; the table goes to stdout", hint="Add --format.")
    render = _renderer(format, several)
    live = live_from_options(dry_load, python, quiet=quiet)
    target = choose_target(vllm, live)
    seen: list[ScanOutcome] = []
    outcomes = _kept(
        scan_models(names, target, selection, revision=revision, with_map=map or format is ScanFormat.html, live=live),
        seen,
    )
    if output is None and format is not ScanFormat.table:
        write_text(render(outcomes))
    else:
        from ..report.scan_table import render_table

        shown = table_options(verbose=verbose > 0, quiet=quiet)
        write_lines(render_table(outcomes, shown, several=several, with_map=map))
    if output is not None:
        write_file(output, render(seen))
    return _exit(seen, "never" if exit_zero else fail_on.value, several)


def _names(models: list[str], source: str | None) -> list[str]:
    """The models of the command line and of --from, each once, in order."""
    if source is not None:
        try:
            text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
        except (OSError, ValueError) as e:
            raise UsageError(f"--from cannot be read ({getattr(e, 'strerror', None) or e})", where=source) from e
        models = models + read_names(text, "stdin" if source == "-" else source)
    if not models:
        raise UsageError(
            "Missing argument 'MODEL'", hint="Give folders or repos, or a file that lists them: --from FILE."
        )
    return list(dict.fromkeys(models))


def _renderer(format: ScanFormat, several: bool) -> Render:
    """The function that writes a format; its module is imported only now."""
    if format is ScanFormat.sarif:
        from ..report.sarif import render
    elif format is ScanFormat.markdown:
        from ..report.markdown import render
    elif format is ScanFormat.github:
        from ..report.github import render
    elif format is ScanFormat.html:
        from ..report.html import render
    elif format is ScanFormat.jsonl:
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
    """The exit code, after an error on stderr for each model that could not be scanned or must not be used."""
    for o in outcomes:
        if o.error is not None:
            words = str(o.error)
            print_error(f"{o.model}: {words}" if several and o.model not in words else words, o.error.hint)
        elif o.exit_code(None):
            assert o.result is not None
            damaged = next(f for f in o.result.findings if f.code is Code.QUANT_STATE)
            words = f"{o.model}: {damaged.message}" if several else damaged.message
            print_error(words, "Quantize the model again, or fetch the file again.")
    codes = [o.exit_code(LEVELS[level]) for o in outcomes]
    return worst(codes) if several else codes[0]
