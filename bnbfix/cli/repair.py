"""`bnbfix repair`: its options, its progress and what it prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import Unrepairable, UsageError
from ..report.next_step import (
    after_plan,
    after_repair,
    command_line,
    repair_commands,
    shell_words,
    suggest_output,
    suggest_place,
)
from ..report.terminal import print_warning, progress_bar, show_logs
from ..report.text import count, format_size
from .options import (
    AsFormat,
    AsJson,
    DryLoadOption,
    ModelName,
    Python,
    Quiet,
    Revision,
    Verbose,
    Vllm,
    parse_folder,
    print_json,
)
from .run_scan import live_vllm
from .signals import Interrupted

if TYPE_CHECKING:
    from ..hub.push import Destination, Pushed
    from ..planner.plan import Plan
    from ..writer.write import RepairResult, WriteOptions

CHANGES, WRITING, HUB = "What changes", "Writing", "On the Hub"  # panels of the help
PartialGroups = Literal["dequantize", "quantize"]


def repair(
    model: ModelName,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", parser=parse_folder, help="Folder for the repaired copy."),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace config.json in MODEL, if no shard changes; the old one is kept.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in DIR.")] = False,
    vllm: Vllm = None,
    revision: Revision = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", rich_help_panel=CHANGES, help="Dequantize everything and drop quantization_config."),
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", rich_help_panel=CHANGES, help="Shard size for --bf16, such as 500MB. Default: 5GB."
        ),
    ] = None,
    partial_groups: Annotated[
        PartialGroups,
        typer.Option(
            rich_help_panel=CHANGES, help="Partially quantized fused groups: keep their precision, or their size."
        ),
    ] = "dequantize",
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to", metavar="REPO", rich_help_panel=HUB, help="Verify the result and upload it to this Hub repo."
        ),
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option(
            "--create-pr",
            rich_help_panel=HUB,
            help="Push as a pull request, to the source repo unless --push-to is given.",
        ),
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", rich_help_panel=HUB, help="Create the repo of --push-to as private.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", rich_help_panel=HUB, help="Download shard by shard.")] = False,
    device: Annotated[
        str,
        typer.Option(
            envvar="BNBFIX_DEVICE",
            rich_help_panel=WRITING,
            help="Where weights are dequantized: auto, cpu, cuda, cuda:N.",
        ),
    ] = "auto",
    hardlink: Annotated[
        bool, typer.Option("--hardlink", rich_help_panel=WRITING, help="Hard-link untouched shards instead of copying.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=WRITING, help="Number of shards written in parallel.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", rich_help_panel=WRITING, help="Most RAM to use, such as 2GB.")
    ] = None,
    dry_load: DryLoadOption = False,
    python: Python = None,
    format: AsFormat = "table",
    json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Write a repaired, sharded copy that stock vLLM loads. The source is only read, except with --in-place."""
    from ..api import choose_target, plan_repair
    from ..hub.push import resolve_destination
    from ..hub.resolve import open_source
    from ..writer.write import WriteOptions

    show_logs(verbose)
    pushing = push_to is not None or create_pr
    _check_place(out, in_place, dry_run, pushing)
    options = WriteOptions(device, hardlink, workers, read_size(max_memory, "--max-memory"))
    source = open_source(model, revision)
    to = resolve_destination(source, push_to, create_pr=create_pr, private=private)
    if to is not None:
        from ..hub.client import check_login

        check_login()  # before the repair, not after it
    live = live_vllm(dry_load, python, quiet=quiet)
    try:
        plan = plan_repair(
            source,
            vllm,
            bf16=bf16,
            max_shard_size=read_size(max_shard_size, "--max-shard-size"),
            partial_groups=partial_groups,
            out=out,
            overwrite=overwrite,
            dry_load=live or False,
        )
    except Unrepairable as e:
        from ..checkpoint.checkpoint import open_checkpoint
        from ..planner.choices import find_choices

        target = choose_target(vllm, live)
        choices = find_choices(open_checkpoint(source), target) if live is None else ()
        scan = command_line("scan", source.name, "--vllm", target.name)
        e.command = repair_commands(source.name, choices[0])[-1] if choices else scan
        raise
    if plan.target.warning and live is None:
        print_warning(plan.target.warning)
    as_json = json or format == "json"
    push_config = to is not None and plan.config_only and source.origin is not None
    if dry_run:
        place = () if out or push_config else suggest_place(source.name, config_only=plan.config_only and to is None)
        copy = None if push_config or "--in-place" in place else out or Path(place[1])
        _show_plan(plan, copy, place, as_json=as_json)
        return 0
    silent = quiet or as_json
    if in_place:
        result, pushed = _replace(plan), None
    elif to is not None and push_config:
        result, pushed = _push_config(plan, to, quiet=silent)
    else:
        result = _write(plan, out, options, overwrite=overwrite, stream=stream, quiet=silent, say=not quiet)
        pushed = _push(result, to, quiet=silent) if to is not None and result.written else None
    if as_json:
        print_json(result.to_dict() | ({"pushed": vars(pushed) if pushed else None} if to else {}))
    elif not quiet:
        from ..report.results import pushed_line, repair_report, show, step_lines

        show(repair_report(result))
        if to:
            print(pushed_line(pushed))
        show(step_lines(after_repair(result, pushed)))
    return 0


def _check_place(out: Path | None, in_place: bool, dry_run: bool, pushing: bool) -> None:
    """Raises UsageError unless the options say where the result goes, and agree."""
    if in_place and (out is not None or pushing):
        raise UsageError("--in-place writes no copy: leave out --out, --push-to and --create-pr")
    if out is None and not (in_place or dry_run or pushing):
        raise UsageError("repair needs --out DIR, --in-place, or --dry-run to only see the plan", command="--dry-run")


def _write(
    plan: Plan, out: Path | None, options: WriteOptions, *, overwrite: bool, stream: bool, quiet: bool, say: bool
) -> RepairResult:
    """Writes the output, with progress; an interrupt says what is left."""
    from ..writer.download import missing_files
    from ..writer.record import plan_digest
    from ..writer.staging import stale_bytes, unfinished
    from ..writer.write import RepairResult, write_plan

    if plan.nothing_to_do:
        return RepairResult(plan, None, {})
    if out is None:
        place = shell_words("--out", suggest_output(plan.checkpoint.source.name))
        raise UsageError("shards change, so a push needs --out DIR for the repaired copy", command=place)
    if (stale := stale_bytes(out, plan_digest(plan))) and say:
        what = "files that an interrupted repair finished for another target, source or option"
        print(f"deleting {format_size(stale)} of {what}: {unfinished(out)}", file=sys.stderr, flush=True)
    download = sum(missing_files(plan).values())
    phases = {"downloading": 0 if stream else download, f"writing {out}": plan.bytes_written}
    if stream:
        phases = {f"downloading and writing {out}": plan.bytes_written + download}
    try:
        with progress_bar(phases, quiet=quiet) as step:
            result = write_plan(plan, out, options, overwrite=overwrite, stream=stream, progress=step)
    except KeyboardInterrupt as e:
        left = unfinished(out)
        hint = f"Finished files are kept in {left}; the same command resumes:" if left else None
        raise Interrupted(f"interrupted; {out} was not written", getattr(e, "hint", hint)) from None
    if result.kept and say:
        print(f"resumed an interrupted repair: {count(len(result.kept), 'finished file')} kept", file=sys.stderr)
    return result


def _replace(plan: Plan) -> RepairResult:
    from ..writer.in_place import repair_in_place

    try:
        return repair_in_place(plan)
    except UsageError as e:
        place = (
            ["--create-pr"] if plan.checkpoint.source.origin else ["--out", suggest_output(plan.checkpoint.source.name)]
        )
        e.command = command_line(*(a for a in sys.argv[1:] if a != "--in-place"), *place)
        raise


def _push(result: RepairResult, to: Destination, *, quiet: bool) -> Pushed:
    from ..verifier.publish import push_output

    out, plan, quiet = result.out, result.plan, quiet or not sys.stderr.isatty()
    assert out is not None
    try:
        with progress_bar({f"checking {out}": plan.bytes_written}, quiet=quiet) as step:
            return push_output(out, to, progress=step, quiet=quiet)
    except KeyboardInterrupt:
        upload = shell_words("hf", "upload", to.repo, str(out))
        raise Interrupted(f"interrupted; {out} is written, and nothing was pushed", command=upload) from None


def _push_config(plan: Plan, to: Destination, *, quiet: bool) -> tuple[RepairResult, Pushed]:
    """Pushes the few files that change; no folder is written."""
    from ..verifier.publish import push_plan
    from ..writer.write import RepairResult

    try:
        pushed, hashes = push_plan(plan, to, quiet=quiet or not sys.stderr.isatty())
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was pushed") from None
    return RepairResult(plan, None, hashes), pushed


def read_size(text: str | None, option: str) -> int | None:
    """Bytes of a size like 5GB, 500MB, 2GiB or 1000000; raises UsageError for anything else. None stays None."""
    if text is None:
        return None
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = float(m[1]) * units[m[2].upper()] if m and m[2].upper() in units else 0
    if not 1 <= size < 2**63:
        raise UsageError(f"{option} {text!r} is not a size like 5GB or 500MB")
    return int(size)


def _show_plan(plan: Plan, copy: Path | None, place: Sequence[str], *, as_json: bool) -> None:
    """Shows what a repair would do, and the command that does it.

    Args:
        copy: The folder that would be written; None where only config.json is.
        place: Options that the command lacks, which say where the result goes.
    """
    from ..writer.download import missing_files
    from ..writer.staging import disk_space

    needed, free = disk_space(plan, copy or Path(plan.checkpoint.source.name))
    needed = needed + sum(missing_files(plan).values()) if copy else 0
    if as_json:
        print_json(plan.to_dict(needed=needed, free=free))
        return
    from ..report.results import nothing_report, plan_report, show, step_lines

    report = plan_report(plan, needed=needed, free=free, in_place="--in-place" in place)
    show(nothing_report(plan) if plan.nothing_to_do else report)
    arguments = [a for a in sys.argv[1:] if a not in ("--dry-run", "--in-place")]
    show(step_lines(after_plan(plan, command_line(*arguments, *place))))
