"""A repair as data: what it does to which tensor, and every output file to the byte.

A plan is complete before the first byte moves: writing it needs no further decision.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..checkpoint.checkpoint import CONFIG, Checkpoint
from ..engines.engine import Target
from ..engines.transformers import loads_numbered_experts
from ..errors import UsageError
from ..rules.rule import Code
from ..rules.scan import Finding, ScanResult, describe_run
from .layout import Dequantize, Quantize, ShardPlan, Split, bytes_read

RECORD = "bnbfix.json"
JOURNAL = ".bnbfix-journal"  # of a repair that is under way; not part of any output
MAX_SHARD_SIZE = 5_000_000_000  # bytes, as transformers cuts shards
PARTIAL_GROUPS = ("dequantize", "quantize")


class Action(str, Enum):
    """What a repair does to a tensor, or to a key of config.json."""

    DEQUANTIZE = "dequantize"
    DROP = "drop"
    INSERT = "insert"
    QUANTIZE = "quantize"
    SPLIT = "split"
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
    Action.SPLIT: ("weight", "weights", "of experts split (same values)"),
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

    def to_dict(self) -> dict[str, str | None]:
        """{action, name, code, detail}"""
        code = str(self.code) if self.code else None
        return {"action": str(self.action), "name": self.name, "code": code, "detail": self.detail}


# Seen with 5.19: the parts of a weight are not put together, and the first forward pass stops at a matrix of bytes.
ONLY_VLLM = "transformers does not load the result, whose experts are quantized one by one; it may load the source."


def is_only_for_vllm(edits: Iterable[Edit], architecture: str) -> bool:
    """Return True if experts become 4-bit weights of their own, which transformers does not load in this class."""
    split = any(e.action in (Action.QUANTIZE, Action.SPLIT) and ".experts." in e.name for e in edits)
    return split and not loads_numbered_experts(architecture)


@dataclass(frozen=True, repr=False)
class Plan:
    """What a repair will write, to the byte."""

    checkpoint: Checkpoint
    target: Target
    scan: ScanResult
    edits: tuple[Edit, ...]
    shards: tuple[ShardPlan, ...]
    texts: Mapping[str, str]  # files written from text: the card; config.json and the index, where they change
    copied: tuple[str, ...]  # other files, copied unchanged
    remaining: tuple[Finding, ...]  # what counts against the checkpoint and no change of the files fixes
    options: Options

    def __repr__(self) -> str:
        source, target = self.checkpoint.source.name, self.target.name
        return f"<Plan {source!r} for {target}: {len(self.edits)} edits, {len(self.shards)} shards>"

    @property
    def nothing_to_do(self) -> bool:
        return not self.edits

    @property
    def drops_quantization(self) -> bool:
        """Return True if the output is not a bitsandbytes checkpoint any more: nothing in it is quantized."""
        if CONFIG not in self.texts:
            return self.options.bf16
        return not json.loads(self.texts[CONFIG]).get("quantization_config")

    @property
    def config_only(self) -> bool:
        """Return True if it changes config.json, perhaps the index and the card, and no shard."""
        kept = {s.name for s in self.shards if s.copied}
        return kept == set(self.checkpoint.shards) == {s.name for s in self.shards}

    @property
    def computes(self) -> str | None:
        """The work that needs kernels, such as "dequantizes"; None where every tensor is copied."""
        ops = [t.op for s in self.shards if not s.copied for t in s.tensors]
        kinds = {Dequantize: "dequantizes", Quantize: "quantizes", Split: "splits quantized weights"}
        return next((word for kind, word in kinds.items() if any(isinstance(op, kind) for op in ops)), None)

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
        return whole + sum(bytes_read(run[0].op) for s in self.shards if not s.copied for run in s.runs())

    def config_diff(self) -> str:
        """The change of config.json as a unified diff; empty when there is none."""
        if CONFIG not in self.texts:
            return ""
        import difflib  # slow to import

        old, new = self.checkpoint.config_text, self.texts[CONFIG]
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), CONFIG, CONFIG, n=1, lineterm="")
        return "\n".join(lines)

    def to_dict(self, *, needed: int | None = None, free: int | None = None) -> dict[str, Any]:
        """The JSON document of a dry run, as `bnbfix schema repair` describes it.

        Args:
            needed: bytes of disk that writing takes.
            free: bytes of disk that are free.
        """
        return describe_run(self.scan.commit, self.target) | {
            "model": self.checkpoint.source.name,
            "target": self.target.name,
            "nothing_to_do": self.nothing_to_do,
            "config_only": self.config_only,
            "edits": [e.to_dict() for e in self.edits],
            "shards": [
                {"name": s.name, "action": "copy" if s.copied else "rewrite", "tensors": len(s.tensors), "size": s.size}
                for s in self.shards
            ],
            "config_diff": self.config_diff(),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "disk_needed": needed,
            "disk_free": free,
        }
