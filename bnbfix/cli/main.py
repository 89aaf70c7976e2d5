"""The command line: options, talk, progress and exit codes. What it prints, report.py words."""

from __future__ import annotations

import gc
import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..__version__ import __version__
from ..errors import BnbfixError, UsageError
from ..report.terminal import print_error
from .scan import Revision, Vllm, scan

if TYPE_CHECKING:
    from rich.console import Console

    from ..hub.push import Destination
    from ..planner.plan import Plan
    from ..writer.write import Progress, WriteOptions

INTERRUPTED, TERMINATED = 130, 143
_terminated = False  # by SIGTERM

app = typer.Typer(
    name="bnbfix",
    help="Scans and repairs bitsandbytes-quantized Gemma4 checkpoints so that vLLM loads them and answers right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Format(str, Enum):
    """How results are written to stdout."""

    table = "table"
    json = "json"


class PartialGroups(str, Enum):
    """What becomes of a fused group that is partially quantized."""

    dequantize = "dequantize"
    quantize = "quantize"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder with config.json and safetensors files, or a Hub repo: org/name.")
]
AsFormat = Annotated[Format, typer.Option("--format", help="How the result is written.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", envvar="BNBFIX_QUIET", help="No progress, and no word where all is well.")
]

app.command()(scan)


@app.command()
def repair(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where the repaired copy goes.")
    ] = None,
    vllm: Vllm = None,
    revision: Revision = None,
    stream: Annotated[bool, typer.Option("--stream", help="Of a Hub repo: never have all of it on disk.")] = False,
    device: Annotated[
        str, typer.Option(envvar="BNBFIX_DEVICE", help="Where weights are dequantized: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in DIR.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Dequantize everything and drop quantization_config.")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Size of --bf16's shards: 5GB, 500MB.")] = "5GB",
    partial_groups: Annotated[
        PartialGroups, typer.Option(help="Fused groups partially quantized: keep their precision, or their size.")
    ] = PartialGroups.dequantize,
    hardlink: Annotated[bool, typer.Option("--hardlink", help="Link untouched shards, not copy them.")] = False,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Shards written side by side.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="RAM to use at most: 2GB.")] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", metavar="REPO", help="Then verify DIR and upload it to this Hub repo.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Push as a pull request, onto the source repo unless --push-to.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repo of --push-to a private one.")] = False,
    format: AsFormat = Format.table,
    quiet: Quiet = False,
) -> int:
    """Write a repaired, sharded copy that stock vLLM loads. The source is only read."""
    from ..engines.vllm.releases import find_installed, resolve_target
    from ..hub.push import require_login, resolve_destination
    from ..hub.resolve import open_source
    from ..planner.plan import Options, plan_checkpoint
    from ..writer.staging import check_destination
    from ..writer.write import WriteOptions

    if out is None and not dry_run:
        raise UsageError("repair needs --out DIR, or --dry-run to see the plan alone")
    source = open_source(model, revision)
    to = resolve_destination(source, push_to, create_pr=create_pr, private=private)
    if to is not None:
        require_login()
    if out is not None:
        check_destination(source, out, overwrite=overwrite)
    options = Options(bf16, _size(max_shard_size, "--max-shard-size"), partial_groups.value)
    how = WriteOptions(device, hardlink, workers, _size(max_memory, "--max-memory") if max_memory else None)
    plan = plan_checkpoint(source, resolve_target(vllm, find_installed()), options)
    if dry_run:
        beside = Path(model if source.origin is None else source.origin["repo"].split("/")[1])
        _show_plan(plan, out or beside.parent / (beside.name + "-repaired"), format)
        return 0
    assert out is not None
    return _repair(plan, out, how, overwrite, stream, to, format, quiet)


def _size(text: str, option: str) -> int:
    """Bytes of a size like 5GB, 500MB, 2GiB or 1000000; raises UsageError for anything else."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = float(m[1]) * units[m[2].upper()] if m and m[2].upper() in units else 0
    if not 1 <= size < 2**63:
        raise UsageError(f"{option} {text!r} is not a size like 5GB or 500MB")
    return int(size)


def _show_plan(plan: Plan, out: Path, format: Format) -> None:
    from ..writer.download import missing_files
    from ..writer.staging import disk_space
    from ..writer.write import RepairResult

    needed, free = disk_space(plan, out)
    needed += sum(missing_files(plan).values())
    if format is Format.json:
        from ..report.json import plan_document

        _print_json(plan_document(plan, needed=needed, free=free))
        return
    from ..report.results import plan_report, repair_report, show

    if plan.nothing_to_do:
        show(_stdout(), repair_report(RepairResult(plan, None, {})))
    else:
        show(_stdout(), plan_report(plan, needed=needed, free=free))


def _repair(
    plan: Plan,
    out: Path,
    how: WriteOptions,
    overwrite: bool,
    stream: bool,
    to: Destination | None,
    format: Format,
    quiet: bool,
) -> int:
    from ..errors import VerifyError
    from ..hub.push import push_folder
    from ..verifier.verify import verify_output
    from ..writer.download import execute_plan, missing_files
    from ..writer.staging import unfinished

    total = plan.bytes_written + sum(missing_files(plan).values())
    silent = quiet or format is Format.json
    try:
        with _progress(f"writing {out}", total, quiet=silent) as step:
            result = execute_plan(plan, out, how, overwrite=overwrite, stream=stream, progress=step)
    except KeyboardInterrupt:
        left = unfinished(out)
        hint = f"Finished files are kept in {left}; the same command goes on from there." if left else None
        print_error("interrupted; nothing was published", hint)
        sys.exit(TERMINATED if _terminated else INTERRUPTED)
    if result.kept and not quiet:
        print(f"{len(result.kept)} finished files of an interrupted repair were taken up", file=sys.stderr)
    pushed = None
    if to is not None and result.written:
        silent = silent or not sys.stderr.isatty()
        with _progress(f"checking {out}", plan.bytes_written, quiet=silent) as step:
            checked = verify_output(out, None, progress=step)
        if not checked.ok:
            raise VerifyError(f"{checked.problems[0]}; nothing was pushed", where=str(out))
        message = f"Repair for vLLM {plan.target.name} with bnbfix"
        pushed = push_folder(out, to, message=message, quiet=silent)
    if format is Format.json:
        from ..report.json import pushed_document, repair_document

        _print_json(repair_document(result) | (pushed_document(pushed) if to else {}))
    elif not quiet:
        from ..report.results import pushed_line, repair_report, show

        show(_stdout(), repair_report(result))
        if to:
            print(pushed_line(pushed))
    return 0


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `bnbfix repair` wrote.")],
    source: Annotated[str | None, typer.Option("--source", metavar="MODEL", help="What it was repaired from.")] = None,
    revision: Revision = None,
    load: Annotated[bool, typer.Option("--load", help="Also load DIR in the vLLM installed here, and run it.")] = False,
    seconds: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long --load may take.")] = 1800,
    format: AsFormat = Format.table,
    quiet: Quiet = False,
) -> int:
    """Prove a repair: hashes, a fresh scan, with --source every byte and every decoded number, with --load in vLLM."""
    from ..checkpoint.source import LocalSource
    from ..hub.resolve import open_source
    from ..verifier.verify import verify_output

    if revision and not source:
        raise UsageError("--revision belongs to a --source on the Hub")
    origin = open_source(source, revision) if source else None
    size = sum(LocalSource.open(folder).files.values())
    with _progress(f"comparing {folder}", size * (2 if source else 1), quiet=quiet or format is Format.json) as step:
        result = verify_output(folder, origin, progress=step)
    loaded = None
    if load:
        from ..engines.vllm.probe import load as run

        loaded = run(folder, seconds)
    if format is Format.json:
        from ..report.json import load_document, verify_document

        _print_json(verify_document(result) | ({"load": load_document(loaded)} if loaded else {}))
    else:
        from ..report.results import load_report, show, verify_report

        if not (quiet and result.ok):
            show(_stdout(), verify_report(result))
        if loaded and not (quiet and loaded.ok):
            show(_stdout(), load_report(loaded))
    return 0 if result.ok and (loaded is None or loaded.ok) else 1


@app.command()
def releases(
    probe: Annotated[
        Path | None,
        typer.Option("--probe", metavar="MODEL", help="Hold the table against the vLLM installed here, for MODEL."),
    ] = None,
    format: AsFormat = Format.table,
) -> int:
    """Show what each vLLM release expects of a checkpoint."""
    from ..engines.vllm.releases import find_installed, ranges

    if probe is not None:
        return _probe(probe, format)

    if format is Format.json:
        from ..report.json import releases_document

        _print_json(releases_document(ranges()))
        return 0
    from ..report.results import releases_report, show

    installed = find_installed()
    show(_stdout(), releases_report(ranges(), installed.version if installed else None))
    return 0


def _probe(model: Path, format: Format) -> int:
    from ..engines.vllm.probe import probe

    result = probe(model)
    if format is Format.json:
        from ..report.json import probe_document

        _print_json(probe_document(result))
    else:
        from ..report.results import probe_report, show

        show(_stdout(), probe_report(result))
    return 1 if result.disagreements else 0


@app.command()
def explain(code: Annotated[str, typer.Argument(metavar="CODE", help="A finding's code, like BNB101.")]) -> int:
    """Explain one finding, with its upstream issue."""
    from ..report.results import explain_report, show
    from ..rules.rule import Code

    try:
        found = Code(code.upper())
    except ValueError:
        known = ", ".join(c.value for c in Code)
        raise UsageError(f"{code!r} is not a finding's code", hint=f"Known: {known}.") from None
    show(_stdout(), explain_report(found))
    return 0


def _version(value: bool) -> None:
    if value:
        print(f"bnbfix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line and exits with its code. No traceback reaches a user for what an input caused."""
    gc.freeze()  # what was imported stays: a tenth of a scan went into looking it through for garbage
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold characters that stdout's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: Any = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer catches the interrupt itself
            raise KeyboardInterrupt
    except BnbfixError as e:
        print_error(str(e), e.hint)
        code = e.exit_code
    except KeyboardInterrupt:
        print_error("interrupted; nothing was published", None)
        code = TERMINATED if _terminated else INTERRUPTED
    except OSError as e:
        print_error(f"{e.filename or 'input/output'}: {e.strerror or e}", None)
        code = 2
    except Exception as e:
        code = _usage(e)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: object) -> None:
    global _terminated
    _terminated = True
    raise KeyboardInterrupt


def _usage(error: Exception) -> int:
    """Exit code of an error that the option parser words itself; any other error is a bug and is raised."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return int(getattr(error, "exit_code", 2))


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))


@contextmanager
def _progress(words: str, total: int, *, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=total)
        yield lambda n: bar.advance(task, n)
