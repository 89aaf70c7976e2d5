"""A file being written from its first byte to its last: copied or appended bytes, early writeback, a hash."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..checkpoint.source import Progress, Source, open_regular
from ..errors import OutputError
from . import syscalls
from .background import STOPPED, Hasher
from .tensor_data import copy_range

logger = logging.getLogger(__name__)
COPY_BYTES = 8 << 20  # copied by one call in the kernel


class OutputFile:
    """A new file, which must not exist. Leaving its block without `finish` closes it, unfinished.

    `step` is called with the number of bytes just written, `finished` with the whole file's SHA-256, on another
    thread; `stop` makes that thread give up. `cached_bytes` says how many of the bytes hashed last stay in the page
    cache, since the disk may not have them yet; the bytes before them may leave it. None: the whole file stays.
    """

    def __init__(
        self,
        path: Path,
        step: Progress,
        finished: Callable[[str], None],
        stop: threading.Event,
        *,
        cached_bytes: int | None,
    ) -> None:
        self._path, self._step, self._finished, self._at = path, step, finished, 0
        self._finishing = False
        self._cached_bytes, self._dropped = cached_bytes, 0
        self._ways: set[str] = set()  # how its bytes came here
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, syscalls.open_flags("RDWR", "CREAT", "EXCL", "CLOEXEC"), 0o666)
        self._ending = threading.Lock()  # taken once and for all, by whoever closes the file
        try:
            self._hasher = Hasher(self._fd, stop)
        except BaseException:  # no thread can be started; raised again
            os.close(self._fd)
            raise

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._finishing:
            self._give_up()

    @property
    def hashed(self) -> int:
        """Bytes hashed so far."""
        return self._hasher.hashed

    def append(self, chunk: bytes | memoryview) -> None:
        """Writes bytes after those already there."""
        syscalls.write_all(self._fd, chunk, self._at)
        self._moved(len(chunk), "written")

    def copy_file(self, source: Source, name: str, size: int) -> None:
        """Copies a whole file of the source, sharing its bytes on disk where the file system can."""
        path = source.local_path(name)
        if path is not None and size:
            with _opened(path, name) as fd:
                if os.fstat(fd).st_size == size and syscalls.clone(fd, self._fd):
                    self._moved(size, "reflink")
                    return
        self.copy(source, name, 0, size)

    def copy(self, source: Source, name: str, offset: int, length: int) -> None:
        """Copies a range of a file of the source."""
        path = source.local_path(name)
        if path is None:
            for chunk in copy_range(source, name, offset, length):
                self.append(chunk)
            return
        with _opened(path, name) as fd:
            for begin in range(offset, offset + length, COPY_BYTES):
                n = min(COPY_BYTES, offset + length - begin)
                in_kernel = syscalls.copy(fd, begin, self._fd, self._at, n, name)
                self._moved(n, "kernel copy" if in_kernel else "read and written")

    def _moved(self, n: int, way: str) -> None:
        self._ways.add(way)
        syscalls.start_writeback(self._fd, self._at, n)
        self._at += n
        self._hasher.reach(self._at)
        # Here and not where it is hashed: of the two threads this is the one that waits.
        if self._cached_bytes is not None and self.hashed >= self._dropped + 2 * self._cached_bytes:
            self._dropped = self.hashed - self._cached_bytes
            syscalls.drop_page_cache(self._fd, self._dropped)
        self._step(n)

    def finish(self, pool: ThreadPoolExecutor) -> Future[str]:
        """Flushes, hashes and closes the file on a thread of the pool; the future has its SHA-256."""
        future = pool.submit(self._finish)  # may fail to start a thread, and then another of the pool may still run it
        self._finishing = True
        future.add_done_callback(lambda done: self._give_up() if done.cancelled() else None)
        return future

    def _finish(self) -> str:
        if not self._ending.acquire(blocking=False):
            raise OutputError(STOPPED)
        try:
            os.fsync(self._fd)
            digest = self._hasher.result()
        finally:
            self._close()
        self._finished(digest)
        logger.debug("%s: %s bytes, %s", self._path.name, f"{self._at:,}", ", ".join(sorted(self._ways)) or "empty")
        return digest

    def _give_up(self) -> None:
        if self._ending.acquire(blocking=False):
            self._close()

    def _close(self) -> None:
        self._hasher.close()
        os.close(self._fd)


def write_small(path: Path, data: bytes) -> None:
    """Writes a new file of a few bytes and flushes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, syscalls.open_flags("WRONLY", "CREAT", "EXCL", "CLOEXEC"), 0o666)
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
