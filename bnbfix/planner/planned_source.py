"""The output of a plan before it is written, for the scan that every plan has to pass."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.checkpoint import Checkpoint, open_checkpoint, reopen_checkpoint
from ..errors import InputError
from .layout import Copy, MadeWeight
from .plan import Plan


def open_planned(plan: Plan) -> Checkpoint:
    """The output of a plan as a checkpoint; of shards that stay, what is known already."""
    source = PlannedSource(plan)
    return reopen_checkpoint(plan.checkpoint, source) if plan.config_only else open_checkpoint(source)


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
            elif isinstance(t.op, MadeWeight) and ".quant_state." in t.info.name:
                out.append(t.op.state_json()[inside : inside + length])
            else:
                raise InputError(f"tensor {t.info.name!r} is not made yet", where=file)
        return out
