"""A scan from its options to its exit code: models, formats, files. It needs no option parser."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import QuantStateError, UsageError
from ..report.next_step import next_command
from ..report.outcome import ScanOutcome, read_names, scan_models
from ..report.terminal import (
    print_error,
    print_warning,
    show_logs,
    show_status,
    table_options,
    write_file,
    write_lines,
    write_text,
)
from ..rules.rule import Code
from ..rules.selection import LEVELS, Selection, worst

if TYPE_CHECKING:
    from ..engines.vllm.live import LiveVllm

Level = Literal["note", "degraded", "wrong", "fails", "never"]  # the least severity that makes the exit code 1
STDOUT = "-"


class ScanFormat(str, Enum):
    """How a scan is written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    markdown = "markdown"
    github = "github"
    sarif = "sarif"
    html = "html"


Render = Callable[[Iterable[ScanOutcome]], Iterator[str]]
PLANNED = (ScanFormat.table, ScanFormat.markdown, ScanFormat.html)  # formats that state what a repair costs


class ScanOptions(NamedTuple):
    """What the command line of a scan says."""

    models: Sequence[str]
    source: str | None = None  # --from
    vllm: str | None = None
    revision: str | None = None
    formats: Sequence[ScanFormat] = ()
    outputs: Sequence[str] = ()
    select: Sequence[str] = ()
    ignore: Sequence[str] = ()
    fail_on: str = "degraded"
    exit_zero: bool = False
    map: bool = False
    dry_load: bool = False
    python: str | None = None
    verbose: int = 0
    quiet: bool = False


def run_scan(options: ScanOptions) -> int:
    """Scans the models, writes every format to where it goes, and returns the exit code."""
    from ..api import choose_target

    show_logs(options.verbose - 1)
    names = _list_models(options)
    several = options.source is not None or len(names) > 1
    selection = Selection.parse(options.select, options.ignore)
    shown, files = pair_outputs(options.formats, options.outputs)
    live = live_vllm(options.dry_load, options.python, quiet=options.quiet)
    target = choose_target(options.vllm, live)
    if target.warning and live is None:
        print_warning(target.warning)
    written = {shown, *files.values()} - ({ScanFormat.table} if options.quiet else set())
    seen: list[ScanOutcome] = []
    outcomes = _keep(
        scan_models(
            names,
            target,
            selection,
            revision=options.revision,
            with_map=options.map or ScanFormat.html in written,
            with_choices=not several and not written.isdisjoint(PLANNED),
            live=live,
        ),
        seen,
    )
    if shown is ScanFormat.table:
        from ..report.scan_table import render_table

        table = table_options(verbose=options.verbose > 0, quiet=options.quiet)
        write_lines(render_table(outcomes, table, several=several, with_map=options.map))
    else:
        write_text(_renderer(shown, several)(outcomes))
    for file, format in files.items():
        write_file(Path(file), _renderer(format, several)(seen))
    return _exit_code(seen, "never" if options.exit_zero else options.fail_on, several)


def pair_outputs(formats: Sequence[ScanFormat], outputs: Sequence[str]) -> tuple[ScanFormat, dict[str, ScanFormat]]:
    """The format that goes to stdout, and that of each file: the first --format goes to the first --output.

    Raises UsageError when there are more files than formats, or more than one format for stdout.
    """
    if len(outputs) > len(formats) or any(f is ScanFormat.table for f in formats[: len(outputs)]):
        raise UsageError("--output needs a --format; the table goes to stdout", command="--format json")
    files = dict(zip(outputs, formats, strict=False))
    to_stdout = [*formats[len(outputs) :], *(f for f in [files.pop(STDOUT, None)] if f)]
    if len(to_stdout) > 1 or len(set(outputs)) < len(outputs):
        raise UsageError("each --format needs an --output of its own; one of them may go to stdout")
    return (to_stdout or [ScanFormat.table])[0], files


def live_vllm(dry_load: bool, python: str | None, *, quiet: bool) -> LiveVllm | None:
    """The vLLM that --dry-load asks; what it is doing is shown on a terminal."""
    if not dry_load:
        if python is not None:
            raise UsageError("--python needs --dry-load", command="--dry-load")
        return None
    from ..engines.vllm.live import LiveVllm

    return LiveVllm(python, status=show_status(quiet=quiet))


def _list_models(options: ScanOptions) -> list[str]:
    """The models of the command line and of --from, each once, in order."""
    models = [*options.models, *(read_listed(options.source) if options.source is not None else ())]
    if not models:
        raise UsageError(
            "missing argument 'MODEL'", hint="Give folders or repos, or a file that lists them: --from FILE."
        )
    return list(dict.fromkeys(models))


def read_listed(source: str) -> list[str]:
    """The models of --from."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
    except (OSError, ValueError) as e:
        raise UsageError(f"--from cannot be read ({getattr(e, 'strerror', None) or e})", where=source) from e
    return read_names(text, "stdin" if source == "-" else source)


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


def _keep(outcomes: Iterable[ScanOutcome], seen: list[ScanOutcome]) -> Iterator[ScanOutcome]:
    for outcome in outcomes:
        seen.append(outcome)
        yield outcome


def _exit_code(outcomes: list[ScanOutcome], level: str, several: bool) -> int:
    """The exit code, after an error on stderr for each model that could not be scanned or must not be used."""
    for o in outcomes:
        error = o.error
        if error is None and o.exit_code(None):
            assert o.result is not None
            damaged = next(f for f in o.result.findings if f.code is Code.QUANT_STATE)
            error = QuantStateError(damaged.message, hint="Quantize the model again, or fetch the file again.")
        if error is not None:
            words = f"{o.model}: {error}" if several and o.model not in str(error) else str(error)
            print_error(words, error.hint, None if several else next_command(error, sys.argv[1:]))
    codes = [o.exit_code(LEVELS[level]) for o in outcomes]
    return worst(codes) if several else codes[0]
