"""Turns decisions into the exact output: every shard's layout and offsets, every text, every byte count.

A plan is complete before the first byte moves: writing it needs no further decision.
"""

from __future__ import annotations

import bisect
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from ..checkpoint.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from ..checkpoint.source import Source
from ..engines.vllm.releases import Target
from ..errors import InputError, Unrepairable, UsageError
from ..models.gemma4 import read_model
from ..rules.files import is_pickle
from ..rules.rule import Code, Severity
from ..rules.scan import Finding, ScanResult, check_applicable, scan_checkpoint, target_ranges
from . import json_edit
from . import model_card as card
from .dequantize_all import collect_dequantize_all
from .fixes import Changes, decide
from .layout import Copy, Quantize, ShardPlan, Slice, TensorPlan, tensors_read
from .shards import dequantized_shards, repaired_shards

RECORD = "bnbfix.json"
MAX_SHARD_SIZE = 5_000_000_000  # bytes, as transformers cuts shards
PARTIAL_GROUPS = ("dequantize", "quantize")
JOURNAL = ".bnbfix-journal"  # of a repair that is under way; not part of any output


class Action(str, Enum):
    """What a repair does to a tensor, or to a key of config.json."""

    DEQUANTIZE = "dequantize"
    DROP = "drop"
    INSERT = "insert"
    QUANTIZE = "quantize"
    STACK = "stack"
    RENAME = "rename"
    RETYPE = "retype"
    CONFIG = "config"

    def __str__(self) -> str:
        return self.value

    def describe(self, count: int) -> str:
        """What was done to so many: `3 weights dequantized (same values)`."""
        one, many, words = _WORDS[self]
        return f"{count} {one if count == 1 else many} {words}"


_WORDS = {
    Action.DEQUANTIZE: ("weight", "weights", "dequantized (same values)"),
    Action.DROP: ("tensor", "tensors", "dropped"),
    Action.INSERT: ("weight", "weights", "added as a copy"),
    Action.QUANTIZE: ("weight", "weights", "quantized to NF4, which loses precision"),
    Action.STACK: ("tensor", "tensors", "joined from per-expert weights"),
    Action.RENAME: ("weight", "weights", "renamed"),
    Action.RETYPE: ("weight", "weights", "declared as U8 [N, 1], same bytes"),
    Action.CONFIG: ("key", "keys", "of config.json changed"),
}


@dataclass(frozen=True)
class Options:
    """What the user chose beyond the target. Raises UsageError for a value that makes no sense."""

    bf16: bool = False  # dequantize everything and drop quantization_config
    max_shard_size: int = MAX_SHARD_SIZE  # bytes of tensors in a shard, where `bf16` cuts shards anew
    partial_groups: str = "dequantize"  # or "quantize": what becomes of a partially quantized fused group

    def __post_init__(self) -> None:
        if type(self.bf16) is not bool:
            raise UsageError(f"bf16 is {self.bf16!r}, not True or False")
        if type(self.max_shard_size) is not int or self.max_shard_size < 1:
            raise UsageError(f"max_shard_size is {self.max_shard_size!r}, not a number of bytes")
        if self.partial_groups not in PARTIAL_GROUPS:
            raise UsageError(f"partial_groups is {self.partial_groups!r}, not {' or '.join(PARTIAL_GROUPS)}")


@dataclass(frozen=True)
class Edit:
    """One change in words: what is done to which tensor or config key, and the code that asked for it.

    The code is None where the user asked.
    """

    action: Action
    name: str
    code: Code | None
    detail: str

    def document(self) -> dict[str, str | None]:
        """As JSON has it."""
        return {"action": self.action, "name": self.name, "code": self.code and self.code.value, "detail": self.detail}


@dataclass(frozen=True)
class Plan:
    """What a repair will write, to the byte."""

    checkpoint: Checkpoint
    target: Target
    scan: ScanResult
    edits: tuple[Edit, ...]
    shards: tuple[ShardPlan, ...]
    texts: Mapping[str, str]  # files written from text: the card; config.json and the index, where they change
    copied: tuple[str, ...]  # other files, copied as they are
    remaining: tuple[Finding, ...]  # what counts against the checkpoint and no file can mend
    options: Options

    @property
    def nothing_to_do(self) -> bool:
        return not self.edits

    @property
    def bytes_written(self) -> int:
        """Size of the output in bytes, without the record."""
        files = self.checkpoint.source.files
        texts = sum(len(t.encode()) for t in self.texts.values())
        return sum(s.size for s in self.shards) + texts + sum(files[f] for f in self.copied)

    @property
    def bytes_read(self) -> int:
        """Bytes of the source that writing reads."""
        files = self.checkpoint.source.files
        whole = sum(files[s.name] for s in self.shards if s.copied) + sum(files[f] for f in self.copied)
        return whole + sum(_bytes_in(run) for s in self.shards if not s.copied for run in s.runs())

    def config_diff(self) -> str:
        """The change of config.json as a unified diff; empty when there is none."""
        if CONFIG not in self.texts:
            return ""
        old, new = self.checkpoint.config_text, self.texts[CONFIG]
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), CONFIG, CONFIG, n=1, lineterm="")
        return "\n".join(lines)


def plan_checkpoint(source: Source, target: Target, options: Options | None = None) -> Plan:
    """Scans a checkpoint and plans its repair for a target.

    Raises the errors of `open_checkpoint` and `scan_checkpoint`, the first QuantStateError where a quant state is
    damaged, and Unrepairable when a finding of the target cannot be repaired.
    """
    options = options or Options()
    checkpoint = open_checkpoint(source)
    model = check_applicable(checkpoint)
    if checkpoint.damaged:
        raise checkpoint.damaged[0]
    scan = scan_checkpoint(checkpoint, target)
    remaining = tuple(f for f in scan.findings if f.counts and f.reason is not None)
    blocking = [f for f in remaining if f.code is not Code.PLUGIN]
    if options.bf16:
        if hopeless := [f for f in blocking if f.code in (Code.UNKNOWN_CLASS, Code.QUANT_STATE)]:
            _refuse(target, hopeless, [])
        mend = collect_dequantize_all(checkpoint, model, target_ranges(target, model))
        shards = tuple(dequantized_shards(checkpoint, mend, options.max_shard_size))
        return _plan(checkpoint, target, scan, mend, shards, remaining, options)
    mend = decide(checkpoint, model, target_ranges(target, model), options.partial_groups)
    int8 = [n for n in mend.dequantize if checkpoint.weights[n].int8]
    if blocking or int8:
        _refuse(target, blocking, int8)
    if not any(f.counts and f.reason is None for f in scan.findings):
        return Plan(checkpoint, target, scan, (), (), {}, (), remaining, options)
    plan = _plan(checkpoint, target, scan, mend, tuple(repaired_shards(checkpoint, mend)), remaining, options)
    after = scan_checkpoint(open_checkpoint(PlannedSource(plan)), target)
    if left := [f for f in after.findings if f.blocking]:
        _refuse(target, left, [])
    return plan


def _plan(
    checkpoint: Checkpoint,
    target: Target,
    scan: ScanResult,
    mend: Changes,
    shards: tuple[ShardPlan, ...],
    remaining: tuple[Finding, ...],
    options: Options,
) -> Plan:
    checkpoint = replace(checkpoint, source=checkpoint.source.with_subfolders())
    _check_names(target, shards)
    edits = tuple(_edits(checkpoint, mend))
    known = replace(target, ranges=target_ranges(target, read_model(checkpoint.config)))  # what the card may promise
    texts = _texts(checkpoint, mend, shards) | _card(checkpoint.source, known, edits, options)
    written = {*checkpoint.shards, *(s.name for s in shards), *texts, RECORD, JOURNAL}
    if INDEX not in texts and options.bf16:
        written.add(INDEX)  # the shards are cut anew; an old index would name the wrong ones
    copied = tuple(f for f in checkpoint.source.files if f not in written and not is_pickle(f))
    checkpoint.source.check_copyable({*copied, *texts})
    return Plan(checkpoint, target, scan, edits, shards, texts, copied, remaining, options)


@dataclass(frozen=True)
class PlannedSource:
    """The output of a plan as a source, before it is written: what a scan reads of it is known already."""

    plan: Plan

    @property
    def name(self) -> str:
        return self.plan.checkpoint.source.name

    @property
    def files(self) -> Mapping[str, int]:
        source = self.plan.checkpoint.source.files
        out = {f: source[f] for f in self.plan.copied} | {s.name: s.size for s in self.plan.shards}
        return out | {name: len(text.encode()) for name, text in self.plan.texts.items()}

    @property
    def fingerprint(self) -> str:
        return self.plan.checkpoint.source.fingerprint

    @property
    def origin(self) -> Mapping[str, str] | None:
        return self.plan.checkpoint.source.origin

    def local_path(self, file: str) -> None:
        """Nowhere yet."""

    def with_subfolders(self) -> PlannedSource:
        return self

    def check_copyable(self, files: Iterable[str]) -> None:
        """Every file of a plan is a regular one."""

    def check_unchanged(self) -> None:
        """Nothing to check: what does not exist does not change."""

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        return {file: self.read(file, ranges) for file, ranges in wanted.items()}

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of a text, a header, or a copied tensor; dequantized bytes do not exist yet."""
        source = self.plan.checkpoint.source
        if file in self.plan.texts:
            text = self.plan.texts[file].encode()
            return [text[offset : offset + length] for offset, length in ranges]
        shard = next((s for s in self.plan.shards if s.name == file), None)
        if shard is None or shard.copied:
            return source.read(file, ranges)
        starts = [t.info.begin for t in shard.tensors]
        out = []
        for offset, length in ranges:
            if offset < len(shard.header):
                out.append(shard.header[offset : offset + length])
                continue
            t = shard.tensors[bisect.bisect_right(starts, offset - len(shard.header)) - 1]
            inside = offset - len(shard.header) - t.info.begin
            if isinstance(t.op, Copy):
                out += source.read(t.op.origin.shard, [(t.op.origin.offset + inside, length)])
            elif isinstance(t.op, Quantize) and ".quant_state." in t.info.name:
                out.append(t.op.state_json(0.0)[inside : inside + length])
            else:
                raise InputError(f"tensor {t.info.name!r} is not made yet", where=file)
        return out


def _check_names(target: Target, shards: tuple[ShardPlan, ...]) -> None:
    seen: set[str] = set()
    for name in (t.info.name for s in shards for t in s.tensors):
        if name in seen:
            raise Unrepairable(f"cannot be made to load in {target.name}: two tensors would be named {name!r}")
        seen.add(name)


def _refuse(target: Target, blocking: list[Finding], int8: list[str]) -> None:
    if blocking:
        worst = max(blocking, key=lambda f: f.severity)
        name = f"{worst.tensors[0]}: " if worst.tensors else ""
        raise Unrepairable(
            f"cannot be made to load in {target.name}: {name}{worst.message} ({worst.code.value})", hint=worst.reason
        )
    raise Unrepairable(
        f"{int8[0]} is an LLM.int8 weight that would have to be dequantized ({Code.INT8.value})",
        hint=f"Name the releases you need with --vllm; {Severity.LOADS} is what `bnbfix scan` says of those.",
    )


def _bytes_in(run: tuple[TensorPlan, ...]) -> int:
    op = run[0].op
    if isinstance(op, Quantize) and isinstance(op.values, Slice):
        return op.values.nbytes
    return sum(t.info.nbytes for t in tensors_read(op))


def _texts(checkpoint: Checkpoint, mend: Changes, shards: tuple[ShardPlan, ...]) -> dict[str, str]:
    out = {}
    if mend.config:
        text = checkpoint.config_text
        for edit in mend.config:
            if edit.remove:
                text = json_edit.remove_key(text, edit.path)
            else:
                text = json_edit.set_value(text, edit.path, edit.value)
        out[CONFIG] = text
    if checkpoint.index is not None or len(shards) > 1:
        index = _index(checkpoint.index or {}, shards)
        ours = {*checkpoint.shards, *(s.name for s in shards)}
        # Without an index every *.safetensors beside the config is read, those that the old one left out too.
        strays = any(f.endswith(".safetensors") and "/" not in f and f not in ours for f in checkpoint.source.files)
        kept = any(s.name in checkpoint.shards for s in shards)
        if index != checkpoint.index and (len(shards) > 1 or kept or strays):
            out[INDEX] = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return out


def _card(source: Source, target: Target, edits: Sequence[Edit], options: Options) -> dict[str, str]:
    """README.md with its section; nothing where the file is no text that a section could go into."""
    old = None
    if (size := source.files.get(card.CARD)) is not None:
        if size > card.MAX_CARD:
            return {}
        try:
            old = source.read(card.CARD, [(0, size)])[0].decode("utf-8")
        except UnicodeDecodeError:
            return {}
    section = card.describe(target, [(e.action, e.name) for e in edits], bf16=options.bf16)
    return {card.CARD: card.with_section(old, section, quantized=not options.bf16)}


def _index(old: Mapping[str, Any], shards: tuple[ShardPlan, ...]) -> dict[str, Any]:
    metadata = old.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = sum(t.info.nbytes for s in shards for t in s.tensors)
    return dict(old) | {"metadata": metadata, "weight_map": {t.info.name: s.name for s in shards for t in s.tensors}}


def _edits(checkpoint: Checkpoint, mend: Changes) -> Iterable[Edit]:
    for name, code in mend.dequantize.items():
        yield Edit(Action.DEQUANTIZE, name, code, "to full precision, quant-state tensors dropped")
    for name, code in mend.drop.items():
        yield Edit(Action.DROP, name, code, "")
    for name, shards in checkpoint.duplicates.items():
        if name in mend.drop:
            continue  # none of them is kept
        kept = checkpoint.tensors[name].shard
        yield Edit(
            Action.DROP, name, Code.DUPLICATE, f"from {', '.join(s for s in shards if s != kept)}; kept in {kept}"
        )
    for insert in mend.insert:
        how = "values of" if insert.dequantize else "exact copy of"
        yield Edit(Action.INSERT, insert.name, insert.code, f"{how} {insert.donor.name}")
    for name, code in mend.quantize.items():
        yield Edit(Action.QUANTIZE, name, code, "to NF4, which loses precision")
    for name, parts in mend.stack.items():
        yield Edit(Action.STACK, name, None, f"one tensor of {len(parts)} matrices")
    for name, expert in mend.experts.items():
        yield Edit(Action(expert.action), name, expert.code, expert.detail)
    for name, code in mend.retype.items():
        yield Edit(Action.RETYPE, name, code, "same bytes, declared U8 [N, 1]")
    for edit in mend.config:
        detail = "removed" if edit.remove else json.dumps(edit.value, ensure_ascii=False)
        yield Edit(Action.CONFIG, ".".join(edit.path), edit.code, detail)
