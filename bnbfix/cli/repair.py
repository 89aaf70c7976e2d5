"""`bnbfix repair`: its options, its progress and what it prints."""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..report.terminal import progress_bar, show_logs
from ..report.text import count
from .options import (
    AsFormat,
    DryLoadOption,
    Format,
    Interrupted,
    ModelName,
    Python,
    Quiet,
    Revision,
    Verbose,
    Vllm,
    live_from_options,
    parse_folder,
    print_json,
)

if TYPE_CHECKING:
    from ..planner.plan import Plan


class PartialGroups(str, Enum):
    """What happens to a fused group that is partially quantized."""

    dequantize = "dequantize"
    quantize = "quantize"


def repair(
    model: ModelName,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", parser=parse_folder, help="Folder for the repaired copy."),
    ] = None,
    vllm: Vllm = None,
    revision: Revision = None,
    stream: Annotated[bool, typer.Option("--stream", help="Hub repos: download shard by shard.")] = False,
    device: Annotated[
        str, typer.Option(envvar="BNBFIX_DEVICE", help="Where weights are dequantized: auto, cpu, cuda, cuda:N.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in DIR.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Dequantize everything and drop quantization_config.")] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Shard size for --bf16, such as 500MB. Default: 5GB.")
    ] = None,
    partial_groups: Annotated[
        PartialGroups, typer.Option(help="Partially quantized fused groups: keep their precision, or their size.")
    ] = PartialGroups.dequantize,
    hardlink: Annotated[
        bool, typer.Option("--hardlink", help="Hard-link untouched shards instead of copying.")
    ] = False,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Number of shards written in parallel.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most RAM to use, such as 2GB.")] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", metavar="REPO", help="Verify DIR and upload it to this Hub repo.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Push as a pull request, to the source repo unless --push-to is given.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repo of --push-to as private.")] = False,
    dry_load: DryLoadOption = False,
    python: Python = None,
    format: AsFormat = Format.table,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Write a repaired, sharded copy that stock vLLM loads. The source is only read."""
    from ..api import plan_repair, push
    from ..hub.push import resolve_destination
    from ..hub.resolve import open_source
    from ..writer.download import missing_files
    from ..writer.record import plan_digest
    from ..writer.staging import stale_bytes, unfinished
    from ..writer.write import WriteOptions, write_plan

    show_logs(verbose)
    if out is None and not dry_run:
        raise UsageError("repair needs --out DIR, or --dry-run to only see the plan")
    options = WriteOptions(device, hardlink, workers, _size(max_memory, "--max-memory"))
    source = open_source(model, revision)
    to = resolve_destination(source, push_to, create_pr=create_pr, private=private)
    if to is not None:
        from ..hub.client import check_login

        check_login()  # before the repair, not after it
    plan = plan_repair(
        source,
        vllm,
        bf16=bf16,
        max_shard_size=_size(max_shard_size, "--max-shard-size"),
        partial_groups=partial_groups.value,
        out=out,
        overwrite=overwrite,
        dry_load=live_from_options(dry_load, python, quiet=quiet) or False,
    )
    download = sum(missing_files(plan).values())
    if dry_run:
        folder = Path(model if source.origin is None else source.origin["repo"].split("/")[1])
        _show_plan(plan, out or folder.parent / (folder.name + "-repaired"), download, format)
        return 0
    assert out is not None
    if (stale := stale_bytes(out, plan_digest(plan))) and not quiet:
        what = "files that an interrupted repair finished for another target, source or option"
        print(f"deleting {stale / 1e9:,.1f} GB of {what}: {unfinished(out)}", file=sys.stderr, flush=True)
    quiet_bars = quiet or format is Format.json
    try:
        with progress_bar(f"writing {out}", plan.bytes_written + download, quiet=quiet_bars) as step:
            result = write_plan(plan, out, options, overwrite=overwrite, stream=stream, progress=step)
    except KeyboardInterrupt as e:
        left = unfinished(out)
        hint = f"Finished files are kept in {left}; run the same command again to resume." if left else None
        raise Interrupted(getattr(e, "hint", hint)) from None
    if result.kept and not quiet:
        print(f"resumed an interrupted repair: {count(len(result.kept), 'finished file')} kept", file=sys.stderr)
    pushed = None
    if to is not None and result.written:
        quiet_bars = quiet_bars or not sys.stderr.isatty()
        try:
            with progress_bar(f"checking {out}", plan.bytes_written, quiet=quiet_bars) as step:
                pushed = push(out, to, progress=step, quiet=quiet_bars)
        except KeyboardInterrupt:
            raise Interrupted(f"The repair itself is done: hf upload {to.repo} {out}") from None
    if format is Format.json:
        print_json(result.to_dict() | ({"pushed": vars(pushed) if pushed else None} if to else {}))
    elif not quiet:
        from ..report.results import pushed_line, repair_report, show

        show(repair_report(result))
        if to:
            print(pushed_line(pushed))
    return 0


def _size(text: str | None, option: str) -> int | None:
    """Bytes of a size like 5GB, 500MB, 2GiB or 1000000; raises UsageError for anything else. None stays None."""
    if text is None:
        return None
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = float(m[1]) * units[m[2].upper()] if m and m[2].upper() in units else 0
    if not 1 <= size < 2**63:
        raise UsageError(f"{option} {text!r} is not a size like 5GB or 500MB")
    return int(size)


def _show_plan(plan: Plan, out: Path, download: int, format: Format) -> None:
    from ..writer.staging import disk_space
    from ..writer.write import RepairResult

    needed, free = disk_space(plan, out)
    needed += download
    if format is Format.json:
        print_json(plan.to_dict(needed=needed, free=free))
        return
    from ..report.results import plan_report, repair_report, show

    show(
        repair_report(RepairResult(plan, None, {}))
        if plan.nothing_to_do
        else plan_report(plan, needed=needed, free=free)
    )
