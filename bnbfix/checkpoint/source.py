"""Where a checkpoint's bytes come from: byte ranges of named files. This module knows local folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, cast

from ..errors import InputError, UsageError

MAX_DEPTH = 50  # folders inside folders; real checkpoints have one or two
IGNORED_DIRS = (".git", ".cache")  # version control, and huggingface_hub's download records

# Those that this system has; Windows would read text without O_BINARY.
OPEN_FLAGS = sum({getattr(os, f"O_{name}", 0) for name in ("RDONLY", "CLOEXEC", "NONBLOCK", "NOCTTY", "BINARY")})

Progress = Callable[[int], None]  # called with the number of bytes just read, fetched or written


class Source(Protocol):
    """Where a checkpoint's bytes come from."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of every file, by path relative to the checkpoint, with forward slashes.

        Files in subfolders are listed only by what `with_subfolders` returns: vLLM reads none of them.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """What changes when the files do: a commit, or sizes and times."""
        ...

    @property
    def origin(self) -> Mapping[str, str] | None:
        """Where it was published: {"repo": "org/name", "revision": commit sha}; None for a folder."""
        ...

    def with_subfolders(self) -> Source:
        """Return the same source with the files in its subfolders, which a repair copies."""
        ...

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each (offset, length); raises InputError when the file ends before."""
        ...

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        """Read ranges of several files; a remote source fetches them in parallel."""
        ...

    def local_path(self, file: str) -> Path | None:
        """Return the path of the file on this machine; None when only `read` has its bytes."""
        ...

    def check_copyable(self, files: Iterable[str]) -> None:
        """Raise InputError for a file that must not be copied: not a regular file, or a link out of the checkpoint."""
        ...

    def check_unchanged(self) -> None:
        """Raise InputError when a file is no longer the one that was listed."""
        ...


class RemoteSource(Source, Protocol):
    """A source on another machine, whose files can be fetched whole."""

    @property
    def sha256(self) -> Mapping[str, str]:
        """The SHA-256 of each file for which it lists one."""
        ...

    @property
    def store(self) -> Path:
        """The folder that fetched files go to."""
        ...

    def fetch(self, file: str, folder: Path | None, step: Progress) -> None:
        """Fetch a whole file to the store or to `folder`, unless it is here already; `step` counts bytes."""
        ...

    def forget(self, file: str, folder: Path) -> None:
        """Delete a file that was fetched to `folder`, and no other."""
        ...


def as_remote(source: Source) -> RemoteSource | None:
    """Return the source as a remote one, if it is one."""
    return cast(RemoteSource, source) if source.origin is not None else None


def read_file(source: Source, name: str) -> bytes:
    """Return the bytes of a whole file."""
    return source.read(name, [(0, source.files[name])])[0]


class FileStat(NamedTuple):
    """Which file it is: bytes, nanoseconds since 1970 of the last change, device and inode.

    `mtime` can be set to any time, as unpacking tools do; `ctime`, of the last change of the file or of what is known
    about it, cannot. A new hard link is such a change and does no harm: so `links` are counted.
    """

    size: int
    mtime: int
    device: int
    inode: int
    ctime: int
    links: int

    @classmethod
    def at(cls, path: str | Path) -> FileStat:
        """Describe a file; links are followed to regular files only, so that a broken link can be listed too."""
        try:
            s = os.stat(path)
            if not stat.S_ISREG(s.st_mode):
                s = os.lstat(path)
        except OSError:
            s = os.lstat(path)
        return cls(s.st_size, s.st_mtime_ns, s.st_dev, s.st_ino, s.st_ctime_ns, s.st_nlink)

    def same(self, other: FileStat) -> bool:
        """Say whether a file is still the one that it was, with the same bytes."""
        return self[:4] == other[:4] and (self.ctime == other.ctime or self.links != other.links)


@dataclass(frozen=True)
class LocalSource:
    """A folder. Links to files are followed.

    What is not a regular file (a pipe, a broken link, a link to a folder) is listed all the same: it is an error where
    it is read or copied, and nowhere else.
    """

    path: Path
    stats: Mapping[str, FileStat] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> LocalSource:
        """List the top level of a folder.

        Raises:
            UsageError: There is no such folder.
            InputError: It cannot be listed.
        """
        if not path.is_dir():
            what = "is a file; name the folder it is in" if path.exists() else "no such folder"
            raise UsageError(what, where=str(path))
        return cls(path, MappingProxyType(dict(sorted(_list_files(path, subfolders=False)))))

    def with_subfolders(self) -> LocalSource:
        # Files that are listed already keep their first stat: `check_unchanged` covers what was read in between.
        stats = dict(_list_files(self.path, subfolders=True)) | dict(self.stats)
        return LocalSource(self.path, MappingProxyType(dict(sorted(stats.items()))))

    def find_models(self) -> list[str]:
        """Return the folders just below that hold a model: a Trainer's checkpoints, the Hub cache's snapshots."""
        found = [*self.path.glob("*/config.json"), *self.path.glob("snapshots/*/config.json")]
        return sorted((str(path.parent) for path in found), key=lambda name: (len(name), name))

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def files(self) -> Mapping[str, int]:
        return MappingProxyType({name: found.size for name, found in self.stats.items()})

    @property
    def fingerprint(self) -> str:
        return repr([(name, *found[:5]) for name, found in self.stats.items()])

    @property
    def origin(self) -> None:
        return None

    @cached_property
    def external_links(self) -> frozenset[str]:
        """Files that are links out of the folder.

        A snapshot of the Hub cache consists of links into the `blobs` folder of its repo, which counts as inside.
        """
        real = os.path.realpath(self.path)
        inside = [real]
        snapshots = os.path.dirname(real)
        if os.path.basename(snapshots) == "snapshots":
            inside.append(os.path.join(os.path.dirname(snapshots), "blobs"))
        links = [name for name in self.stats if os.path.islink(self.path / name)]
        # Both paths are resolved to the end, so that no link on the way leads out again.
        targets = {name: os.path.realpath(self.path / name) for name in links}
        return frozenset(n for n in links if not any(targets[n].startswith(folder + os.sep) for folder in inside))

    def local_path(self, file: str) -> Path:
        return self.path / file

    def check_copyable(self, files: Iterable[str]) -> None:
        for name in sorted(set(files) & set(self.stats)):
            # An output may be published, and a checkpoint may come from a stranger: it could link to a secret.
            if name in self.external_links:
                raise InputError(
                    "is a link out of the model folder; a repair would copy what it leads to",
                    where=name,
                    hint="Put the file itself in its place. Only weights may be stored elsewhere.",
                )
            try:
                os.close(open_regular(self.path / name, name))
            except InputError as e:
                e.hint = "A repair copies every file of the folder: remove it, or put a regular file in its place."
                raise

    def check_unchanged(self) -> None:
        for name, before in self.stats.items():
            try:
                now = FileStat.at(self.path / name)
            except OSError as e:
                raise InputError(f"went away while it was being read ({e.strerror})", where=name) from e
            if not now.same(before):
                raise InputError("changed while it was being read", where=name, hint="Run it again.")

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return read_ranges(self.path / file, ranges, file)

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        return {file: self.read(file, ranges) for file, ranges in wanted.items()}


def open_regular(path: Path, where: str) -> int:
    """Open a regular file and return its descriptor; raises InputError for anything else, without waiting for it."""
    try:
        fd = os.open(path, OPEN_FLAGS)
    except OSError as e:
        doubt = "; a broken link?" if os.path.islink(path) else ""
        raise InputError(f"cannot be opened ({e.strerror}){doubt}", where=where) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError("is not a regular file", where=where)
    return fd


def read_ranges(path: Path, ranges: Sequence[tuple[int, int]], where: str) -> list[bytes]:
    """Return the bytes of each (offset, length) of a file on this machine; raises InputError."""
    fd = open_regular(path, where)
    try:
        return [read_exactly(fd, offset, length, where) for offset, length in ranges]
    finally:
        os.close(fd)


def read_exactly(fd: int, offset: int, length: int, where: str) -> bytes:
    """Return `length` bytes at `offset`, however short the system's reads are; raises InputError at an early end."""
    parts = []
    while length > 0:
        try:
            part = _read_at(fd, length, offset)
        except OSError as e:
            raise InputError(f"cannot be read at byte {offset:,} ({e.strerror})", where=where) from e
        if not part:
            raise InputError(f"ended at byte {offset:,} while it was being read", where=where)
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_at(fd: int, length: int, offset: int) -> bytes:
    call: Callable[[int, int, int], bytes] | None = getattr(os, "pread", None)
    if call is not None:
        return call(fd, length, offset)
    os.lseek(fd, offset, os.SEEK_SET)  # Windows; no other thread has this descriptor
    return os.read(fd, length)


def _list_files(root: Path, prefix: str = "", *, subfolders: bool) -> Iterator[tuple[str, FileStat]]:
    """Yield (path relative to the root, stat) of every entry that is not a folder."""
    if prefix.count("/") > MAX_DEPTH:
        raise InputError(f"is more than {MAX_DEPTH} folders deep", where=prefix)
    try:
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if entry.name in IGNORED_DIRS:
                    continue
                if not entry.is_dir(follow_symlinks=False):
                    yield prefix + entry.name, FileStat.at(entry.path)
                elif subfolders:
                    yield from _list_files(root, f"{prefix}{entry.name}/", subfolders=True)
    except OSError as e:
        raise InputError(f"cannot be listed ({e.strerror})", where=prefix or str(root)) from e
