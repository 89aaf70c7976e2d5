"""Threads that work while a file is written: one makes items ahead of their turn, one hashes what was written."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from ..errors import OutputError
from . import syscalls

T = TypeVar("T")
# Bytes read back and hashed at a time: they stay in the cache of the core that hashes. SHA-256 straight from a chunk
# that another core has just made is slower than that, by a tenth on a Xeon with SHA-NI.
HASH_BYTES = 512 << 10
STOPPED = "stopped before a file was whole"


class Prefetch(Generic[T]):
    """Draws items on its own thread, before they are asked for.

    At most `ahead` of the items that `counted` accepts wait at a time; the others cost no memory and wait in any
    number. An error of the items is raised where its item would have come. `close` stops the thread.
    """

    def __init__(self, items: Iterable[T], ahead: int, counted: Callable[[T], bool] = lambda item: True) -> None:
        self._items, self._counted = items, counted
        self._free = threading.Semaphore(ahead)
        self._waiting: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bnbfix-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if self._counted(item):
                    self._free.acquire()
                if self._closed:
                    return
                self._waiting.put((item,))
            self._waiting.put(None)
        except BaseException as e:  # raised again in `__iter__`, on the other thread
            self._waiting.put(e)

    def __iter__(self) -> Iterator[T]:
        while (found := self._waiting.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            if self._counted(found[0]):
                self._free.release()
            yield found[0]

    def close(self) -> None:
        """Stops the thread once its current item is made."""
        self._closed = True
        self._free.release()
        self._thread.join()


class Hasher:
    """SHA-256 of a growing file, read back on its own thread. With `stop` set it gives up, and `result` raises."""

    def __init__(self, fd: int, stop: threading.Event) -> None:
        self._fd, self._stop = fd, stop
        self._digest = hashlib.sha256()
        self.hashed = 0  # bytes
        self._written: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bnbfix-hash", daemon=True)
        self._thread.start()

    def reach(self, end: int) -> None:
        """Says that the bytes before `end` are written."""
        self._written.put(end)

    def result(self) -> str:
        """The hash of all that was reached, as hexadecimal digits."""
        self._written.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stops without a result."""
        self._closed = True
        self._written.put(None)
        self._thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(HASH_BYTES))
        try:
            while (end := self._written.get()) is not None and not self._closed:
                self._read_back(end, buffer)
        except BaseException as e:  # raised again in `result`, on the other thread
            self._error = e

    def _read_back(self, end: int, buffer: memoryview) -> None:
        while self.hashed < end and not self._closed:
            if self._stop.is_set():
                raise OutputError(STOPPED)
            got = syscalls.read_into(self._fd, buffer[: end - self.hashed], self.hashed)
            if not got:
                raise OutputError(f"a file being written ended at byte {self.hashed:,}; is something else writing it?")
            self._digest.update(buffer[:got])
            self.hashed += got
