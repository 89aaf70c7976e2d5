"""Where a checkpoint's bytes come from: byte ranges of named files. This module knows local folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

from .errors import InputError, UsageError

MAX_DEPTH = 50  # folders inside folders; real checkpoints have one or two
NOT_OURS = (".git", ".cache")  # version control, and huggingface_hub's download records


class Source(Protocol):
    """Where a checkpoint's bytes come from."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of every file, by path relative to the checkpoint, with forward slashes."""
        ...

    @property
    def origin(self) -> Mapping[str, str] | None:
        """Where it was published: {"repo": "org/name", "revision": commit sha}; None for a folder."""
        ...

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); raises InputError when the file ends before."""
        ...

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        """The same of several files at once, which a remote source fetches together."""
        ...


class RemoteSource(Source, Protocol):
    """A source elsewhere, whose files can be fetched whole."""

    @property
    def store(self) -> Path:
        """The folder that fetched files go to."""
        ...

    def path(self, file: str) -> Path | None:
        """Where a file lies on this machine, if it does."""
        ...

    def fetch(self, file: str, folder: Path | None, step: Callable[[int], None]) -> None:
        """Brings a file here whole, to the store or to `folder`; `step` counts bytes. Nothing when it is here."""
        ...

    def forget(self, file: str, folder: Path) -> None:
        """Deletes a file that was fetched to `folder`, and no other."""
        ...


def remote(source: Source) -> RemoteSource | None:
    """The source as one that is elsewhere, if it is."""
    return cast(RemoteSource, source) if source.origin is not None else None


@dataclass(frozen=True)
class LocalSource:
    """A directory. Symlinks to files are followed, as the Hub cache needs."""

    path: Path
    files: Mapping[str, int] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> LocalSource:
        """Lists a directory; raises UsageError if there is none."""
        if not path.is_dir():
            what = "is a file; name the folder it lies in" if path.exists() else "no such folder"
            raise UsageError(what, where=str(path))
        return cls(path, MappingProxyType(dict(sorted(_walk(path)))))

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def origin(self) -> None:
        return None

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            fd = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise InputError(f"cannot be opened ({e.strerror})", where=file) from e
        try:
            return [read_exactly(fd, offset, length, file) for offset, length in ranges]
        finally:
            os.close(fd)

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        return {file: self.read(file, ranges) for file, ranges in wanted.items()}


def read_exactly(fd: int, offset: int, length: int, where: str) -> bytes:
    """`length` bytes at `offset`, however short the reads of the system are; raises InputError at an early end."""
    parts = []
    while length > 0:
        try:
            part = os.pread(fd, length, offset)
        except OSError as e:
            raise InputError(f"cannot be read at byte {offset:,} ({e.strerror})", where=where) from e
        if not part:
            raise InputError(f"ended at byte {offset:,} while it was being read", where=where)
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _walk(root: Path, prefix: str = "") -> list[tuple[str, int]]:
    if prefix.count("/") > MAX_DEPTH:
        raise InputError(f"lies more than {MAX_DEPTH} folders deep", where=prefix)
    out: list[tuple[str, int]] = []
    for entry in os.scandir(root / prefix):
        rel = prefix + entry.name
        if entry.name in NOT_OURS:
            continue
        if entry.is_dir(follow_symlinks=False):
            out += _walk(root, rel + "/")
            continue
        try:
            mode = entry.stat()
        except OSError as e:
            raise InputError(f"cannot be looked at ({e.strerror}); a broken link?", where=rel) from e
        if not stat.S_ISREG(mode.st_mode):
            raise InputError("is neither a regular file nor a folder of its own", where=rel)
        out.append((rel, mode.st_size))
    return out
