"""Checkpoints in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.support.build import Raw as Tensor
from tests.support.surgery import pack


@dataclass(frozen=True)
class MemorySource:
    """A checkpoint in memory."""

    content: Mapping[str, bytes]
    name = "memory"
    fingerprint = ""
    origin = None

    @cached_property
    def files(self) -> dict[str, int]:
        return {name: len(content) for name, content in self.content.items()}

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        content = self.content[file]
        for offset, length in ranges:
            if not 0 <= offset <= offset + length <= len(content):
                raise IndexError(f"a read of {length} bytes at {offset}, of {len(content)}")
        return [content[offset : offset + length] for offset, length in ranges]

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        return {file: self.read(file, ranges) for file, ranges in wanted.items()}

    def local_path(self, file: str) -> None:
        """Nowhere."""

    def with_subfolders(self) -> MemorySource:
        return self

    def check_copyable(self, files: Iterable[str]) -> None:
        """It has nothing else than files."""

    def check_unchanged(self) -> None:
        """It cannot change."""


def quantized(parts: Mapping[str, Tensor]) -> bytes:
    """The file of these tensors."""
    header: dict[str, Any] = {}
    at = 0
    for name, t in parts.items():
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    return pack(header, b"".join(t.data for t in parts.values()))
