"""The Python API. The command line calls it too, and adds options, progress and reports."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.checkpoint import CONFIG, INDEX, open_checkpoint
from .checkpoint.source import LocalSource, Progress, Source
from .engines.engine import ReleaseRange, Target
from .engines.registry import engines, find_ranges
from .engines.targets import resolve_target
from .engines.vllm.releases import find_installed
from .errors import BnbfixError, FindingsRemain, NotApplicable, UsageError
from .hub.resolve import open_source
from .models.detect import read_model
from .rules.rule import Code, Explanation
from .rules.scan import RENDERERS, Finding, ScanResult, scan_by_dry_load, scan_checkpoint

if TYPE_CHECKING:
    from .engines.vllm.live import LiveVllm
    from .planner.plan import Plan
    from .verifier.verify import VerifyResult
    from .writer.write import RepairResult

logger = logging.getLogger(__name__)
StrPath = str | os.PathLike[str]


def choose_target(vllm: str | None, live: LiveVllm | None = None) -> Target:
    """The target that `vllm` names; None means the vLLM that is asked, or the one installed, or else "portable".

    Raises:
        UsageError: `vllm` is not a string, or not a release in the table, or not the vLLM that is asked.
    """
    target = live.target if live else resolve_target(vllm, None if vllm else find_installed())
    if live and vllm is not None and resolve_target(vllm).ranges != target.ranges:
        raise UsageError(f"the target is {vllm!r}, but the vLLM that is asked is {target.name}")
    logger.info("target: %s, release ranges: %s", target.label, ", ".join(r.name for r in target.ranges))
    return target


def _render_html(result: ScanResult) -> str:
    from .report.html import render_frame

    return render_frame(result)


def _render_markdown(result: ScanResult) -> str:
    from .report.markdown import render
    from .report.outcome import ScanOutcome

    return "".join(render([ScanOutcome(result.model, result)]))


RENDERERS.update(html=_render_html, markdown=_render_markdown)


def choose_live(dry_load: LiveVllm | bool) -> LiveVllm | None:
    """The vLLM to ask: True means the one installed with bnbfix."""
    if dry_load is True:
        from .engines.vllm.live import LiveVllm

        return LiveVllm()
    return dry_load or None


def scan(
    path: StrPath | Source, vllm: str | None = None, *, revision: str | None = None, dry_load: LiveVllm | bool = False
) -> ScanResult:
    """Reports what would go wrong with a checkpoint, where, and what fixes it. Reads headers, never weights.

    Args:
        path: A folder with config.json and safetensors files, or a string that names a repo on the Hub,
            `org/name[@revision]`. Of a repo it reads byte ranges, less than 1% of a real checkpoint.
        vllm: A release ("0.22.1"), or "portable" for every release. None means the vLLM installed with bnbfix, or
            else "portable".
        revision: Branch, tag or commit of the repo.
        dry_load: Ask a vLLM whether it loads the checkpoint: its own loader is given every tensor's name, dtype and
            shape. True asks the vLLM installed with bnbfix, `bnbfix.LiveVllm(python=...)` that of another environment.
            The target is then that vLLM, and any model class works that it knows.

    Returns:
        The result. `result.ok` is True when no finding counts against the target. Invalid quant states are findings
        (BNB201), not errors.

    Raises:
        UsageError: The path or the release does not make sense.
        InputError: A file is missing or broken.
        NotApplicable: This is not a bitsandbytes checkpoint of a class that bnbfix knows.
        HubError: The Hub does not serve the repo.
        EngineError: The vLLM that is asked gives no answer.
    """
    live = choose_live(dry_load)
    target = choose_target(vllm, live)
    checkpoint = open_checkpoint(_open(path, revision))
    if live is None:
        return scan_checkpoint(checkpoint, target)
    return scan_by_dry_load(checkpoint, target, live.ask(checkpoint))


def _open(path: StrPath | Source, revision: str | None) -> Source:
    return open_source(path, revision) if isinstance(path, str | os.PathLike) else path


def scan_many(
    models: Iterable[StrPath], vllm: str | None = None, *, dry_load: LiveVllm | bool = False
) -> Iterator[tuple[StrPath, ScanResult | BnbfixError]]:
    """Scans one model after another, and yields each with its result. An error takes the place of a result.

    Args:
        models: Folders and repos, as in `scan`.
        vllm: As in `scan`.
        dry_load: As in `scan`.

    Raises:
        UsageError: The release does not make sense.
    """
    live = choose_live(dry_load)
    choose_target(vllm, live)
    for model in models:
        try:
            yield model, scan(model, vllm, dry_load=live or False)
        except BnbfixError as e:
            yield model, e


def explain(code: Code | str) -> Explanation:
    """What a finding's code means: `title`, `severity` at worst, `why`, `fix`, and `upstream` issues.

    Raises:
        UsageError: There is no such code.
    """
    try:
        return Code(code).explanation
    except ValueError:
        raise UsageError(f"{code!r} is not a finding's code") from None


def releases() -> tuple[ReleaseRange, ...]:
    """What each range of releases expects of a checkpoint, oldest first, of one engine after the other."""
    return tuple(row for engine in engines().values() for row in engine.ranges)


def check_before_upload(folder: StrPath, vllm: str | None = None) -> ScanResult | None:
    """Checks that a checkpoint that is about to be uploaded loads in the target.

    Args:
        folder: The folder that will be uploaded.
        vllm: As in `scan`.

    Returns:
        The scan of a checkpoint that loads. None for everything that bnbfix does not judge, since a pipeline uploads
        other things too: other models, unquantized ones, adapters, folders without a model.

    Raises:
        FindingsRemain: The checkpoint would not load; `findings` says why.
        NotApplicable: The folder has quantized weights, but config.json names another quantization.
        UsageError, InputError: As in `scan`.
    """
    source = LocalSource.open(Path(folder))
    weights = [name for name in source.files if name.endswith((".safetensors", INDEX)) and "/" not in name]
    if CONFIG not in source.files or not weights:
        return None
    target = choose_target(vllm)
    try:
        checkpoint = open_checkpoint(source)
        find_ranges(read_model(checkpoint.config), target)
    except NotApplicable:
        return None
    try:
        result = scan_checkpoint(checkpoint, target)
    except NotApplicable:
        if any(w.quantized for w in checkpoint.weights.values()):
            raise
        return None
    if remaining := tuple(f for f in result.findings if f.blocking):
        raise _findings_error(str(folder), target, remaining)
    return result


def _findings_error(folder: str, target: Target, findings: tuple[Finding, ...]) -> FindingsRemain:
    """The error in a few words: each code once, and what to do."""
    from .report.next_step import command_line, suggest_output

    codes = {f.code: len({t for g in findings if g.code is f.code for t in g.tensors}) for f in findings}
    words = ", ".join(
        f"{code.value} {code.explanation.title}" + (f" ({n} tensor{'s' if n != 1 else ''})" if n else "")
        for code, n in codes.items()
    )
    options = ["--vllm", target.name]
    hint, command = "See what is wrong, and the nearest repair:", command_line("scan", folder, *options)
    if all(f.reason is None for f in findings):
        hint = "Upload the repaired copy instead:"
        command = command_line("repair", folder, "--out", suggest_output(folder), *options)
    return FindingsRemain(f"is not fit for {target.label}: {words}", findings, where=folder, hint=hint, command=command)


def plan_repair(
    path: StrPath | Source,
    vllm: str | None = None,
    *,
    revision: str | None = None,
    bf16: bool = False,
    max_shard_size: int | None = None,
    partial_groups: str = "dequantize",
    out: StrPath | None = None,
    overwrite: bool = False,
    dry_load: LiveVllm | bool = False,
) -> Plan:
    """Plans a repair to the byte, without writing: shards, offsets, config edits.

    Args:
        path: As in `scan`. Of a repo it reads what a scan reads.
        vllm: As in `scan`.
        revision: As in `scan`.
        bf16: Dequantize everything and drop quantization_config.
        max_shard_size: Bytes of tensors in a shard, where `bf16` cuts shards anew. None means 5 GB.
        partial_groups: What happens to fused groups that are partially quantized: "dequantize" their quantized
            members, or "quantize" their unquantized ones, which loses precision.
        out: The folder that the repair will write. If given, it is checked first, as `repair` checks it.
        overwrite: `out` may hold files, which will be replaced.
        dry_load: Ask a vLLM, as in `scan`, whether it will load the planned output; about a class that bnbfix does not
            know, also what it expects.

    Returns:
        The plan. `plan.edits` is empty when there is nothing to do.

    Raises:
        UsageError, InputError, NotApplicable, HubError: As in `scan`.
        UsageError: An option does not make sense, or `out` is not empty or overlaps the source.
        QuantStateError: A quant state is invalid.
        Unrepairable: No edit of the files makes them load in the target.
    """
    from .planner.plan import MAX_SHARD_SIZE, Options
    from .planner.plan_repair import check_plan, plan_checkpoint

    source = _open(path, revision)
    if out is not None:
        from .writer.staging import check_destination

        if not os.fspath(out):
            raise UsageError("the output is an empty path; it must name a folder")

        check_destination(source, Path(out), overwrite=overwrite)
    options = Options(bf16, MAX_SHARD_SIZE if max_shard_size is None else max_shard_size, partial_groups)
    live = choose_live(dry_load)
    target = choose_target(vllm, live)
    if live is not None:
        live.learn(open_checkpoint(source))
    plan = plan_checkpoint(source, target, options)
    if live is not None:
        check_plan(plan, live)
    logger.info("plan for %s: %d edits, %d bytes to write", source.name, len(plan.edits), plan.bytes_written)
    return plan


def repair(
    path: StrPath,
    out: StrPath,
    vllm: str | None = None,
    *,
    revision: str | None = None,
    stream: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    bf16: bool = False,
    max_shard_size: int | None = None,
    partial_groups: str = "dequantize",
    hardlink: bool = False,
    workers: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    dry_load: LiveVllm | bool = False,
) -> RepairResult:
    """Writes a repaired copy of a checkpoint to the folder `out`, whole or not at all. The source is only read.

    The next repair resumes one that was interrupted. With nothing to repair, nothing is fetched or written.

    Args:
        path: As in `scan`. A repo is planned from byte ranges, then downloaded to the Hub's cache.
        out: The folder to write. It must be empty or not exist, unless `overwrite`.
        vllm: As in `scan`.
        revision: As in `scan`.
        stream: Fetch each shard of a repo when it is needed, and delete it after its last use.
        device: Where weights are dequantized: "auto", "cpu", "cuda" or "cuda:N". The result does not depend on it.
            "auto" is the CPU, unless bitsandbytes must be called through torch and torch sees a CUDA device.
        overwrite: Replace what is in `out`.
        bf16: As in `plan_repair`.
        max_shard_size: As in `plan_repair`.
        partial_groups: As in `plan_repair`.
        hardlink: Make untouched shards hard links to the source's. They are not hashed.
        workers: The number of shards that are written in parallel. None means that bnbfix chooses it.
        max_memory: Bytes of RAM to use at most.
        progress: Called with the number of bytes just fetched or written, by one thread at a time.
        dry_load: As in `plan_repair`: nothing is written that the vLLM would not load.

    Returns:
        What was written. `result.written` is False when there was nothing to do.

    Raises:
        UsageError, InputError, NotApplicable, QuantStateError, Unrepairable, HubError: As in `plan_repair`.
        UsageError: `out` is not empty or overlaps the source, or the device is not there.
        OutputError: The output cannot be written.
    """
    from .writer.write import WriteOptions, write_plan

    plan = plan_repair(
        path,
        vllm,
        revision=revision,
        bf16=bf16,
        max_shard_size=max_shard_size,
        partial_groups=partial_groups,
        out=out,
        overwrite=overwrite,
        dry_load=dry_load,
    )
    options = WriteOptions(device, hardlink, workers, max_memory)
    return write_plan(plan, Path(out), options, overwrite=overwrite, stream=stream, progress=progress)


def verify(
    out: StrPath,
    source: StrPath | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    dry_load: LiveVllm | bool = False,
) -> VerifyResult:
    """Proves a repair: every file against the hashes in its record, and a fresh scan for its target.

    With `source` it also compares every byte with the plan: kept bytes are equal, and dequantized numbers equal an
    independent decode.

    Args:
        out: The folder that `repair` wrote.
        source: What it was repaired from, as in `scan`. A repo is downloaded to the Hub's cache.
        revision: Branch, tag or commit of that repo.
        progress: Called with the number of bytes just fetched or compared.
        dry_load: Ask a vLLM, as in `scan`, whether it loads the folder; what it says against it is a problem.

    Returns:
        The result. Differences are in `result.problems`; they are not raised.

    Raises:
        InputError: `out` cannot be read or has no record.
        UsageError, HubError: As in `scan`, for `source`; `revision` needs a `source`.
    """
    from .verifier.verify import verify_output

    if revision is not None and source is None:
        raise UsageError("a revision needs a source on the Hub")
    origin = open_source(source, revision) if source is not None else None
    if (live := choose_live(dry_load)) is not None:
        live.learn(open_checkpoint(origin or LocalSource.open(Path(out))))
    result = verify_output(Path(out), origin, progress=progress)
    if live is None:
        return result
    from .verifier.verify import ask_vllm

    return ask_vllm(result, live)


def repair_in_place(
    path: StrPath, vllm: str | None = None, *, partial_groups: str = "dequantize", dry_load: LiveVllm | bool = False
) -> RepairResult:
    """Repairs a folder in place, where no shard changes: config.json is replaced, and the index.

    The old files stay next to the new ones, as `config.json.before-bnbfix`.

    Args:
        path: The folder.
        vllm: As in `scan`.
        partial_groups: As in `plan_repair`.
        dry_load: As in `plan_repair`.

    Returns:
        What was written. `result.written` is False when there was nothing to do.

    Raises:
        UsageError, InputError, NotApplicable, QuantStateError, Unrepairable: As in `plan_repair`.
        UsageError: A shard would have to change; write a copy with `repair`.
        OutputError: A file cannot be written.
    """
    from .writer.in_place import repair_in_place

    return repair_in_place(plan_repair(path, vllm, partial_groups=partial_groups, dry_load=dry_load))
