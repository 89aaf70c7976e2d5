"""The Python API: each function is one step of the command line, without its talk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.checkpoint import CONFIG, INDEX, open_checkpoint
from .checkpoint.source import LocalSource
from .engines.vllm.releases import Target, find_installed, resolve_target
from .errors import FindingsRemain, NotApplicable
from .hub.resolve import open_source
from .models.gemma4 import Model, read_model
from .rules.scan import Finding, ScanResult, scan_checkpoint, target_ranges

if TYPE_CHECKING:
    from .planner.plan import Plan
    from .verifier.verify import VerifyResult
    from .writer.write import Progress, RepairResult

StrPath = str | os.PathLike[str]


def _target(vllm: str | None) -> Target:
    return resolve_target(vllm, None if vllm else find_installed())


def scan(path: StrPath, vllm: str | None = None, *, revision: str | None = None) -> ScanResult:
    """Says what would go wrong with a checkpoint, where, and what fixes it. Reads headers, never weights.

    `path` is a folder with config.json and safetensors files, or a string that names a repo on the Hub,
    `org/name[@revision]`, of which it reads byte ranges, less than 1% of a real one. `revision` is its branch, tag or
    commit. `vllm` is a release ("0.22.1") or "portable"; left out, the vLLM installed beside bnbfix, else "portable".
    `result.ok` says that nothing counts against the target; damaged quant states are findings (BNB201), not errors.

    Raises UsageError for a path or a release that makes no sense, InputError for files that are missing or broken,
    NotApplicable for anything that is no bitsandbytes Gemma4 checkpoint, HubError when the Hub does not serve it.
    """
    return scan_checkpoint(open_checkpoint(open_source(path, revision)), _target(vllm))


def check_before_upload(folder: StrPath, vllm: str | None = None) -> ScanResult | None:
    """Raises FindingsRemain, with the findings, when a checkpoint about to be uploaded would not load in the target;
    returns its scan otherwise.

    None is returned for whatever bnbfix has no say in, since a pipeline uploads other things too: other models,
    unquantized ones, adapters, folders without a model. A folder that holds quantized Gemma4 weights and does not say so
    in config.json is no such thing, and raises NotApplicable. `vllm` and the other errors are those of `scan`.
    """
    source = LocalSource.open(Path(folder))
    weights = [name for name in source.files if name.endswith((".safetensors", INDEX)) and "/" not in name]
    if CONFIG not in source.files or not weights:
        return None
    target = _target(vllm)
    try:
        checkpoint = open_checkpoint(source)
        model = read_model(checkpoint.config)
    except NotApplicable:
        return None
    try:
        result = scan_checkpoint(checkpoint, target)
    except NotApplicable:
        if any(w.quantized for w in checkpoint.weights.values()):
            raise
        return None
    # Whether the plugin is installed here says nothing of the checkpoint.
    if remaining := tuple(f for f in result.findings if f.blocking):
        raise _findings_error(str(folder), model, target, remaining)
    return result


def _findings_error(folder: str, model: Model, target: Target, findings: tuple[Finding, ...]) -> FindingsRemain:
    """The error in a few words: each code once, and what to do."""
    codes = {f.code: len({t for g in findings if g.code is f.code for t in g.tensors}) for f in findings}
    words = ", ".join(
        f"{code.value} {code.explanation.title}" + (f" ({n} tensor{'s' if n != 1 else ''})" if n else "")
        for code, n in codes.items()
    )
    name = f"vLLM {target.name}" if len(target_ranges(target, model)) == 1 else "every vLLM release"
    hint = f"See `bnbfix scan {folder} --vllm {target.name}`"
    if all(f.reason is None for f in findings):
        hint = f"Upload what `bnbfix repair {folder} --out DIR --vllm {target.name}` writes. {hint}"
    return FindingsRemain(f"is not fit for {name}: {words}", findings, where=folder, hint=hint + ".")


def plan_repair(
    path: StrPath,
    vllm: str | None = None,
    *,
    revision: str | None = None,
    bf16: bool = False,
    max_shard_size: int = 5_000_000_000,
    partial_groups: str = "dequantize",
) -> Plan:
    """Plans a repair to the byte, without writing: shards, offsets, config edits. `plan.edits` is empty when there is
    nothing to do. `path` and `revision` are those of `scan`; of a repo it reads what a scan reads.

    `bf16` dequantizes everything and drops quantization_config, in shards of at most `max_shard_size` bytes.
    `partial_groups` says what becomes of fused groups that are partially quantized: "dequantize" their quantized members, or
    "quantize" their plain ones, which loses precision.

    Raises what `scan` raises, QuantStateError for a damaged quant state, Unrepairable when no edit of the files makes
    them load in the target.
    """
    from .planner.plan import Options, plan_checkpoint

    return plan_checkpoint(open_source(path, revision), _target(vllm), Options(bf16, max_shard_size, partial_groups))


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
    max_shard_size: int = 5_000_000_000,
    partial_groups: str = "dequantize",
    hardlink: bool = False,
    workers: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> RepairResult:
    """Writes a repaired copy of a checkpoint to the folder `out`, whole or not at all. The source is only read.

    `path` and `revision` are those of `scan`. A repo is planned from byte ranges, then downloaded to the Hub's cache;
    with `stream` each of its shards is fetched when it is needed and deleted after its last use.
    `bf16`, `max_shard_size` and `partial_groups` are those of `plan_repair`. `device` is where weights are dequantized:
    "auto", "cpu", "cuda" or "cuda:N"; the result does not depend on it. `hardlink` makes untouched shards hard links
    to the source's, which are not hashed. `workers` shards are written side by side, in at most `max_memory` bytes of
    RAM. `progress` is called with the number of bytes just fetched or written, by one thread at a time. With nothing to
    repair nothing is fetched or written, and `result.written` is False. An interrupted repair is taken up again by the
    next one.

    Raises what `plan_repair` raises, UsageError when `out` is not empty (unless `overwrite`) or touches the source,
    OutputError when it cannot be written.
    """
    from .planner.plan import Options, plan_checkpoint
    from .writer.staging import check_destination
    from .writer.write import WriteOptions, write_plan

    source = open_source(path, revision)
    check_destination(source, Path(out), overwrite=overwrite)
    plan = plan_checkpoint(source, _target(vllm), Options(bf16, max_shard_size, partial_groups))
    how = WriteOptions(device, hardlink, workers, max_memory)
    return write_plan(plan, Path(out), how, overwrite=overwrite, stream=stream, progress=progress)


def verify(
    out: StrPath, source: StrPath | None = None, *, revision: str | None = None, progress: Progress | None = None
) -> VerifyResult:
    """Proves a repair: every file against the hashes in its record, a fresh scan for its target, and, with `source`,
    every byte against the plan: kept bytes equal, dequantized numbers equal to an independent decode. `source` and
    `revision` are what `scan` takes; a repo is downloaded to the Hub's cache.

    Raises InputError when `out` cannot be read or has no record; what differs is in `result.problems`, not raised.
    """
    from .verifier.verify import verify_output

    found = open_source(source, revision) if source is not None else None
    return verify_output(Path(out), found, progress=progress)
