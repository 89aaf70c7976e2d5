"""A file being written from its first byte to its last: moved or appended bytes, early writeback, a hash beside."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..checkpoint.source import Source, open_regular
from . import syscalls
from .background import Hasher
from .tensor_data import copy_range

KERNEL_BYTES = 8 << 20  # moved by one call in the kernel
LAG = 64 << 20  # bytes that were hashed last, which the disk may not have yet


class OutputFile:
    """A new file, that must not exist. Leaving its block without `finish` closes it, unfinished.

    `step` is told of bytes as they are written, `finished` of the whole file's SHA-256, on another thread; `stop` makes
    that thread give up. Unless the file `stays` in memory, the kernel is told that it need not.
    """

    def __init__(
        self,
        path: Path,
        step: Callable[[int], None],
        finished: Callable[[str], None],
        stop: threading.Event,
        *,
        stays: bool,
    ) -> None:
        self._step, self._finished, self._at = step, finished, 0
        self._stays, self._gone = stays, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._hasher = Hasher(self._fd, stop)
        self._flushing = False

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._flushing:
            self._close()

    def append(self, chunk: bytes | memoryview) -> None:
        """Writes bytes after those already there."""
        syscalls.write_all(self._fd, chunk, self._at)
        self._moved(len(chunk))

    def copy_file(self, source: Source, name: str, size: int) -> None:
        """The whole of a file of the source, sharing its bytes on disk where the file system can."""
        path = source.local_path(name)
        if path is not None and size:
            with _opened(path, name) as fd:
                if os.fstat(fd).st_size == size and syscalls.clone(fd, self._fd):
                    self._moved(size)
                    return
        self.copy(source, name, 0, size)

    def copy(self, source: Source, name: str, offset: int, length: int) -> None:
        """A range of a file of the source."""
        path = source.local_path(name)
        if path is None:
            for chunk in copy_range(source, name, offset, length):
                self.append(chunk)
            return
        with _opened(path, name) as fd:
            for begin in range(offset, offset + length, KERNEL_BYTES):
                n = min(KERNEL_BYTES, offset + length - begin)
                syscalls.copy(fd, begin, self._fd, self._at, n, name)
                self._moved(n)

    def _moved(self, n: int) -> None:
        syscalls.start_writeback(self._fd, self._at, n)
        self._at += n
        self._hasher.reach(self._at)
        # Here and not where it is hashed: of the two threads this is the one that waits.
        if not self._stays and self._hasher.at >= self._gone + 2 * LAG:
            self._gone = self._hasher.at - LAG
            syscalls.drop_page_cache(self._fd, self._gone)
        self._step(n)

    def finish(self, pool: ThreadPoolExecutor) -> Future[str]:
        """Flushes, hashes and closes the file on a thread of the pool; the future has its SHA-256."""
        self._flushing = True
        return pool.submit(self._finish)

    def _finish(self) -> str:
        try:
            os.fsync(self._fd)
            digest = self._hasher.result()
        finally:
            self._close()
        self._finished(digest)
        return digest

    def _close(self) -> None:
        self._hasher.close()
        os.close(self._fd)


def write_small(path: Path, data: bytes) -> None:
    """A new file of a few bytes, flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        syscalls.write_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(path: Path, where: str) -> Iterator[int]:
    fd = open_regular(path, where)
    try:
        yield fd
    finally:
        os.close(fd)
