"""The command line: options, talk, progress and exit codes. What it prints, report.py words."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .cli_scan import Vllm, scan
from .errors import BnbfixError, UsageError
from .terminal import complain

if TYPE_CHECKING:
    from rich.console import Console

    from .plan import Plan
    from .write import Progress

INTERRUPTED = 130

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


class Ragged(str, Enum):
    """What becomes of a fused group that is partly packed."""

    dequantize = "dequantize"
    quantize = "quantize"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder with config.json and safetensors files.")]
AsFormat = Annotated[Format, typer.Option("--format", help="How the result is written.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", envvar="BNBFIX_QUIET", help="No progress, and no word where all is well.")
]

app.command()(scan)


@app.command()
def repair(
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where the mended copy goes.")] = None,
    vllm: Vllm = None,
    device: Annotated[
        str, typer.Option(envvar="BNBFIX_DEVICE", help="Where weights are dequantized: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in DIR.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Dequantize everything and drop quantization_config.")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Size of --bf16's shards: 5GB, 500MB.")] = "5GB",
    ragged: Annotated[
        Ragged, typer.Option(help="Fused groups partly packed: keep their precision, or their size.")
    ] = Ragged.dequantize,
    format: AsFormat = Format.table,
    quiet: Quiet = False,
) -> int:
    """Write a mended, sharded copy that stock vLLM loads. The source is only read."""
    from .plan import Options, plan_checkpoint
    from .source import LocalSource
    from .vllm_releases import find_installed, resolve_target
    from .write import check_destination

    if out is None and not dry_run:
        raise UsageError("repair needs --out DIR, or --dry-run to see the plan alone")
    source = LocalSource.open(model)
    if out is not None:
        check_destination(source, out, overwrite=overwrite)
    options = Options(bf16, _size(max_shard_size), ragged.value)
    plan = plan_checkpoint(source, resolve_target(vllm, find_installed()), options)
    if dry_run:
        _show_plan(plan, out or model.parent / (model.name + "-mended"), format)
        return 0
    assert out is not None
    return _repair(plan, out, device, overwrite, format, quiet)


def _size(text: str) -> int:
    """Bytes of a size like 5GB, 500MB, 2GiB or 1000000; raises UsageError for anything else."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = float(m[1]) * units[m[2].upper()] if m and m[2].upper() in units else 0
    if not 1 <= size < 2**63:
        raise UsageError(f"--max-shard-size {text!r} is not a size like 5GB or 500MB")
    return int(size)


def _show_plan(plan: Plan, out: Path, format: Format) -> None:
    from .write import RepairResult, disk_space

    needed, free = disk_space(plan, out)
    if format is Format.json:
        from .report_json import plan_document

        _print_json(plan_document(plan, needed=needed, free=free))
        return
    from .report import plan_report, repair_report, show

    if plan.nothing_to_do:
        show(_stdout(), repair_report(RepairResult(plan, None, {})))
    else:
        show(_stdout(), plan_report(plan, needed=needed, free=free))


def _repair(plan: Plan, out: Path, device: str, overwrite: bool, format: Format, quiet: bool) -> int:
    from .write import check_space, pick_device, write_plan

    if not plan.nothing_to_do:
        check_space(plan, out)
    chosen = pick_device(plan, device)
    with _progress(f"writing {out}", plan.bytes_written, quiet=quiet or format is Format.json) as step:
        result = write_plan(plan, out, device=chosen, overwrite=overwrite, progress=step)
    if format is Format.json:
        from .report_json import repair_document

        _print_json(repair_document(result))
    elif not quiet:
        from .report import repair_report, show

        show(_stdout(), repair_report(result))
    return 0


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `bnbfix repair` wrote.")],
    source: Annotated[Path | None, typer.Option("--source", metavar="MODEL", help="What it was repaired from.")] = None,
    load: Annotated[bool, typer.Option("--load", help="Also load DIR in the vLLM installed here, and run it.")] = False,
    seconds: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long --load may take.")] = 1800,
    format: AsFormat = Format.table,
    quiet: Quiet = False,
) -> int:
    """Prove a repair: hashes, a fresh scan, with --source every byte and every decoded number, with --load in vLLM."""
    from .verifier import verify_output

    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    with _progress(f"comparing {folder}", size * (2 if source else 1), quiet=quiet or format is Format.json) as step:
        result = verify_output(folder, source, progress=step)
    loaded = None
    if load:
        from .installed import load as run

        loaded = run(folder, seconds)
    if format is Format.json:
        from .report_json import load_document, verify_document

        _print_json(verify_document(result) | ({"load": load_document(loaded)} if loaded else {}))
    else:
        from .report import load_report, show, verify_report

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
    from .vllm_releases import find_installed, ranges

    if probe is not None:
        return _probe(probe, format)

    if format is Format.json:
        from .report_json import releases_document

        _print_json(releases_document(ranges()))
        return 0
    from .report import releases_report, show

    installed = find_installed()
    show(_stdout(), releases_report(ranges(), installed.version if installed else None))
    return 0


def _probe(model: Path, format: Format) -> int:
    from .installed import probe

    result = probe(model)
    if format is Format.json:
        from .report_json import probe_document

        _print_json(probe_document(result))
    else:
        from .report import probe_report, show

        show(_stdout(), probe_report(result))
    return 1 if result.disagreements else 0


@app.command()
def explain(code: Annotated[str, typer.Argument(metavar="CODE", help="A finding's code, like BNB101.")]) -> int:
    """Explain one finding, with its upstream issue."""
    from .codes import Code
    from .report import explain_report, show

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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold characters that stdout's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: Any = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer catches the interrupt itself
            raise KeyboardInterrupt
    except BnbfixError as e:
        complain(str(e), e.hint)
        code = e.exit_code
    except KeyboardInterrupt:
        complain("interrupted; nothing was published", None)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does; keep the interpreter from saying so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as e:
        complain(f"{e.filename or 'input/output'}: {e.strerror or e}", None)
        code = 2
    except Exception as e:
        code = _usage(e)
    sys.exit(code if isinstance(code, int) else 0)


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
