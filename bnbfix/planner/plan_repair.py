"""Plans a repair: scans a checkpoint, collects the changes, lays out every file, and scans what would come out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import CONFIG, INDEX, Checkpoint, check_not_pointer, open_checkpoint, rename_weights
from ..checkpoint.source import Source, read_file
from ..engines.engine import Target
from ..errors import Unrepairable
from ..models.family import Family
from ..models.inspection import Inspection, inspect_checkpoint
from ..rules.changes import Changes, Request
from ..rules.files import is_pickle, unused_weights
from ..rules.manifest import find_renames
from ..rules.rule import Code, Severity
from ..rules.scan import Finding, ScanResult, scan_inspection
from ..rules.support import describe_dry_load
from . import json_edit, model_card
from .fixes import DEQUANTIZE_ALL, REPAIR, collect_changes
from .layout import ShardPlan
from .plan import JOURNAL, RECORD, Action, Edit, Options, Plan, is_only_for_vllm
from .planned_source import open_planned
from .shards import recut_shards, repaired_shards

if TYPE_CHECKING:
    from ..engines.vllm.live import LiveVllm


MAX_POINTER = 200  # bytes of a Git LFS pointer
# What a repair in 4 bits cannot do anything about, and a full dequantization does.
SOLVED_BY_DEQUANTIZING = frozenset(
    {Code.MOE_REFUSED, Code.FUSED_EXPERTS, Code.EXPERT_LINEARS, Code.MIXED_EXPERTS, Code.INT8}
)


def plan_checkpoint(source: Source, target: Target, options: Options | None = None) -> Plan:
    """Scans a checkpoint and plans its repair for a target.

    Raises the errors of `open_checkpoint` and `scan_checkpoint`, the first QuantStateError where a quant state is
    invalid, and Unrepairable when no change of the files fixes a finding of the target.
    """
    return plan_inspection(inspect_checkpoint(open_checkpoint(source)), target, options or Options())


def plan_inspection(inspection: Inspection, target: Target, options: Options, scan: ScanResult | None = None) -> Plan:
    """`plan_checkpoint` of a checkpoint that was inspected already, and perhaps scanned for the target."""
    checkpoint = inspection.checkpoint
    if inspection.invalid:
        raise inspection.invalid[0]
    scan = scan or scan_inspection(inspection, target)
    blocking = [f for f in scan.findings if f.blocking and f.reason is not None]
    if options.bf16:
        blocking = [f for f in blocking if f.code not in SOLVED_BY_DEQUANTIZING]
    releases = target.ranges_for(inspection.model)
    request = Request(inspection, releases, options.partial_groups)
    if blocking:
        raise _refusal(target, blocking)
    if renames := find_renames(request):
        checkpoint = rename_weights(checkpoint, renames)
        inspection = inspect_checkpoint(checkpoint)
        request = replace(request, inspection=inspection)
    changes = collect_changes(request, DEQUANTIZE_ALL if options.bf16 else REPAIR)
    if options.bf16:
        shards = tuple(recut_shards(checkpoint, changes, options.max_shard_size))
        return _complete_plan(inspection, target, scan, changes, shards, options)
    if int8 := [name for name in changes.dequantize if checkpoint.weights[name].int8]:
        raise Unrepairable(
            f"{int8[0]} is an LLM.int8 weight that would have to be dequantized ({Code.INT8})",
            hint=f"Name one of the releases of which a scan says {Severity.LOADS}.",
        )
    if not any(f.counts and f.reason is None for f in scan.findings):
        return Plan(checkpoint, target, scan, (), (), {}, (), _remaining(scan), options)
    plan = _complete_plan(inspection, target, scan, changes, tuple(repaired_shards(checkpoint, changes)), options)
    if plan.drops_quantization:
        return plan
    planned = inspect_checkpoint(open_planned(plan))
    after = scan_inspection(planned, target, judged=target.ranges)
    if left := [f for f in after.findings if f.blocking]:
        raise _refusal(target, left)
    return plan


def check_plan(plan: Plan, live: LiveVllm) -> None:
    """Asks a vLLM about the output of a plan before it is written, or about a source in which no rule finds a fault.

    Raises Unrepairable when it would not load it.
    """
    of, checkpoint = ("", plan.checkpoint) if plan.nothing_to_do else ("of the planned output, ", open_planned(plan))
    (answer,) = live.dry_load([checkpoint])
    if not answer.ok:
        hits = [hit for _, hit in describe_dry_load(answer)]
        name = f"{hits[0].tensors[0]}: " if hits[0].tensors else ""
        raise Unrepairable(
            f"cannot be repaired for {plan.target.label}: {of}{name}{hits[0].message}",
            hint="Nothing was written. Please report this, with the output of `bnbfix scan --format json`.",
        )


def _refusal(target: Target, blocking: Sequence[Finding]) -> Unrepairable:
    worst = max(blocking, key=lambda f: f.severity)
    name = f"{worst.tensors[0]}: " if worst.tensors else ""
    return Unrepairable(
        f"cannot be repaired for {target.label}: {name}{worst.message} ({worst.code})", hint=worst.reason
    )


def _remaining(scan: ScanResult) -> tuple[Finding, ...]:
    return tuple(f for f in scan.findings if f.counts and f.reason is not None)


def _complete_plan(
    inspection: Inspection,
    target: Target,
    scan: ScanResult,
    changes: Changes,
    shards: tuple[ShardPlan, ...],
    options: Options,
) -> Plan:
    _check_names(target, shards)
    source = inspection.checkpoint.source.with_subfolders()
    checkpoint = replace(inspection.checkpoint, source=source)
    edits = tuple(_list_edits(checkpoint, changes))
    known = replace(target, ranges=target.ranges_for(inspection.model))  # what the card may promise
    texts = _write_config(checkpoint, changes) | _write_index(checkpoint, shards)
    texts |= _write_card(source, inspection.model.family, known, edits, options)
    left_out = {*unused_weights(checkpoint), *(f for f in source.files if is_pickle(f))}
    written = {*checkpoint.shards, *(s.name for s in shards), *texts, RECORD, JOURNAL}
    if INDEX not in texts and options.bf16:
        written.add(INDEX)  # the shards are cut anew; an old index would name the wrong ones
    copied = tuple(f for f in source.files if f not in written and f not in left_out)
    source.check_copyable({*copied, *texts})
    for name in (f for f in copied if source.files[f] <= MAX_POINTER):
        check_not_pointer(read_file(source, name), name)
    return Plan(checkpoint, target, scan, edits, shards, texts, copied, _remaining(scan), options)


def _check_names(target: Target, shards: tuple[ShardPlan, ...]) -> None:
    seen: set[str] = set()
    for name in (t.info.name for s in shards for t in s.tensors):
        if name in seen:
            raise Unrepairable(f"cannot be repaired for {target.label}: two tensors would be named {name!r}")
        seen.add(name)


def _write_config(checkpoint: Checkpoint, changes: Changes) -> dict[str, str]:
    """config.json, where it changes: only the keys that do, everything else to the character."""
    if not changes.config:
        return {}
    text = checkpoint.config_text
    for edit in changes.config:
        if edit.remove:
            text = json_edit.remove_key(text, edit.path)
        else:
            text = json_edit.set_value(text, edit.path, edit.value)
    return {CONFIG: text}


def _write_index(checkpoint: Checkpoint, shards: tuple[ShardPlan, ...]) -> dict[str, str]:
    """The index, where one is needed and it changes."""
    if checkpoint.index is None and len(shards) <= 1:
        return {}
    old: Mapping[str, Any] = checkpoint.index or {}
    metadata = old.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = sum(t.info.nbytes for s in shards for t in s.tensors)
    weight_map = {t.info.name: s.name for s in shards for t in s.tensors}
    index = dict(old) | {"metadata": metadata, "weight_map": weight_map}
    ours = {*checkpoint.shards, *(s.name for s in shards)}
    # Without an index every *.safetensors next to the config is read, those that the old one left out too.
    strays = any(f.endswith(".safetensors") and "/" not in f and f not in ours for f in checkpoint.source.files)
    kept = any(s.name in checkpoint.shards for s in shards)
    if index == checkpoint.index or not (len(shards) > 1 or kept or strays):
        return {}
    return {INDEX: json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"}


def _write_card(
    source: Source, family: Family, target: Target, edits: Sequence[Edit], options: Options
) -> dict[str, str]:
    """README.md with its section; nothing where the file is not a text that a section could go into."""
    old = None
    if (size := source.files.get(model_card.CARD)) is not None:
        if size > model_card.MAX_CARD:
            return {}
        try:
            old = read_file(source, model_card.CARD).decode("utf-8")
        except UnicodeDecodeError:
            return {}
    actions, only_vllm = [e.action for e in edits], is_only_for_vllm(edits, family.architecture)
    section = model_card.describe_repair(target, actions, bf16=options.bf16, only_vllm=only_vllm)
    card = model_card.insert_section(old, section, family=family.name, quantized=not options.bf16)
    return {model_card.CARD: card}


def _list_edits(checkpoint: Checkpoint, changes: Changes) -> Iterator[Edit]:
    for old, new in checkpoint.renamed.items():
        yield Edit(Action.RENAME, old, Code.WRONG_PREFIX, f"to {new}")
    for name, code in changes.dequantize.items():
        yield Edit(Action.DEQUANTIZE, name, code, "same values in full precision; its quant-state tensors are dropped")
    for name, code in changes.drop.items():
        yield Edit(Action.DROP, name, code, "")
    for name, shards in checkpoint.duplicates.items():
        if name in changes.drop:
            continue  # none of them is kept
        kept = checkpoint.tensors[name].shard
        others = ", ".join(s for s in shards if s != kept)
        yield Edit(Action.DROP, name, Code.DUPLICATE, f"from {others}; kept in {kept}")
    for insert in changes.insert:
        how = "values of" if insert.dequantize else "exact copy of"
        yield Edit(Action.INSERT, insert.name, insert.code, f"{how} {insert.donor.name}")
    for name, code in changes.quantize.items():
        yield Edit(Action.QUANTIZE, name, code, "to NF4, which loses precision")
    for name, stack in changes.stack.items():
        yield Edit(Action.STACK, name, None, f"one tensor of {len(stack.parts)} {stack.kind}")
    for name, expert in changes.experts.items():
        yield Edit(Action(expert.action), name, expert.code, expert.detail)
    for name, code in changes.retype.items():
        yield Edit(Action.RETYPE, name, code, "same bytes, declared U8 [N, 1]")
    for edit in changes.config:
        detail = "removed" if edit.remove else json.dumps(edit.value, ensure_ascii=False)
        yield Edit(Action.CONFIG, ".".join(edit.path), edit.code, detail)
