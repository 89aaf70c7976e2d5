"""Where a checkpoint's bytes come from: byte ranges of named files. This module knows local folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, cast

from ..errors import InputError, UsageError

MAX_DEPTH = 50  # folders inside folders; real checkpoints have one or two
IGNORED_DIRS = (".git", ".cache")  # version control, and huggingface_hub's download records


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
    def fingerprint(self) -> str:
        """What changes when the files do: a commit, or sizes and times."""
        ...

    @property
    def external_links(self) -> frozenset[str]:
        """Files that are links out of the checkpoint: weights may lie anywhere, what is copied as it is may not."""
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

    def local_path(self, file: str) -> Path | None:
        """Where the file lies on this machine, whole; None when `read` alone has its bytes."""
        ...

    def check_unchanged(self) -> None:
        """Raises InputError when a file is no longer the one that was listed."""
        ...


class RemoteSource(Source, Protocol):
    """A source elsewhere, whose files can be fetched whole."""

    @property
    def store(self) -> Path:
        """The folder that fetched files go to."""
        ...

    def fetch(self, file: str, folder: Path | None, step: Callable[[int], None]) -> None:
        """Brings a file here whole, to the store or to `folder`; `step` counts bytes. Nothing when it is here."""
        ...

    def forget(self, file: str, folder: Path) -> None:
        """Deletes a file that was fetched to `folder`, and no other."""
        ...


def as_remote(source: Source) -> RemoteSource | None:
    """The source as one that is elsewhere, if it is."""
    return cast(RemoteSource, source) if source.origin is not None else None


class FileStat(NamedTuple):
    """Which file it is: bytes, nanoseconds since 1970 of the last change, device and inode."""

    size: int
    mtime: int
    device: int
    inode: int

    @classmethod
    def of(cls, s: os.stat_result) -> FileStat:
        return cls(s.st_size, s.st_mtime_ns, s.st_dev, s.st_ino)


@dataclass(frozen=True)
class LocalSource:
    """A directory. Symlinks to files are followed; `external_links` has those that leave the directory.

    A snapshot of the Hub cache is links into the `blobs` folder of its repo, which counts as inside.
    """

    path: Path
    stats: Mapping[str, FileStat] = field(repr=False)
    external_links: frozenset[str] = field(repr=False, default=frozenset())

    @classmethod
    def open(cls, path: Path) -> LocalSource:
        """Lists a directory; raises UsageError if there is none."""
        if not path.is_dir():
            what = "is a file; name the folder it lies in" if path.exists() else "no such folder"
            raise UsageError(what, where=str(path))
        entries = sorted(_walk(path))
        outside = frozenset(_find_external_links(path, [name for name, _, link in entries if link]))
        return cls(path, MappingProxyType({name: stamp for name, stamp, _ in entries}), outside)

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def files(self) -> Mapping[str, int]:
        return MappingProxyType({name: stamp.size for name, stamp in self.stats.items()})

    @property
    def fingerprint(self) -> str:
        return repr([(name, *stamp) for name, stamp in self.stats.items()])

    @property
    def origin(self) -> None:
        return None

    def local_path(self, file: str) -> Path:
        return self.path / file

    def check_unchanged(self) -> None:
        for name, before in self.stats.items():
            try:
                now = FileStat.of((self.path / name).stat())
            except OSError as e:
                raise InputError(f"went away while it was being read ({e.strerror})", where=name) from e
            if now != before:
                raise InputError("changed while it was being read", where=name, hint="Run it again.")

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        fd = open_regular(self.path / file, file)
        try:
            return [read_exactly(fd, offset, length, file) for offset, length in ranges]
        finally:
            os.close(fd)

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        return {file: self.read(file, ranges) for file, ranges in wanted.items()}


def open_regular(path: Path, where: str) -> int:
    """A file descriptor for reading; raises InputError for what is no regular file, without waiting for it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as e:
        raise InputError(f"cannot be opened ({e.strerror})", where=where) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError("is no regular file", where=where)
    return fd


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


def _walk(root: Path, prefix: str = "") -> list[tuple[str, FileStat, bool]]:
    """(path relative to the root, stamp, is it a link?) of every file."""
    if prefix.count("/") > MAX_DEPTH:
        raise InputError(f"lies more than {MAX_DEPTH} folders deep", where=prefix)
    out: list[tuple[str, FileStat, bool]] = []
    for entry in os.scandir(root / prefix):
        rel = prefix + entry.name
        if entry.name in IGNORED_DIRS:
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
        out.append((rel, FileStat.of(mode), entry.is_symlink()))
    return out


def _find_external_links(root: Path, links: Sequence[str]) -> Iterator[str]:
    """Those of the links that lead neither into the root nor into the blobs of the Hub cache it lies in."""
    real = os.path.realpath(root)
    inside = [real]
    snapshots = os.path.dirname(real)
    if os.path.basename(snapshots) == "snapshots":
        inside.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    for name in links:
        # Both paths are resolved to the end, so that no link on the way leads out again.
        target = os.path.realpath(root / name)
        if not any(target.startswith(folder + os.sep) for folder in inside):
            yield name
