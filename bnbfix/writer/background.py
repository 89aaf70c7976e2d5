"""Work that runs beside the writing: chunks made ahead of their turn, and hashes of what was written."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from ..errors import OutputError

T = TypeVar("T")
# Bytes read back and hashed at a time: they stay in the cache of the core that hashes. SHA-256 straight from a chunk
# that another core has just made is slower than that, by a tenth on a Xeon with SHA-NI.
PIECE = 512 << 10
STOPPED = "stopped before a file was whole"


class Prefetch(Generic[T]):
    """Draws an iterator on a thread of its own, at most `ahead` items before they are asked for.

    What the iterator raises is raised where its item would have come. `close` stops the thread.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bnbfix-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as e:  # raised again in `__next__`, on the other thread
            self._put((None, e))

    def _put(self, item: tuple[T | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            self._put((None, error))  # it is raised again if it is asked for again
            raise error
        return item  # type: ignore[return-value]  # None only beside an error, or where T holds it

    def close(self) -> None:
        """Stops the thread once its current item is done."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)


class Hasher:
    """SHA-256 of a file that grows, read back on its own thread. With `stop` set it gives up, and `result` raises."""

    def __init__(self, fd: int, stop: threading.Event) -> None:
        self._fd, self._stop = fd, stop
        self._digest = hashlib.sha256()
        self.at = 0  # bytes that were hashed
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
        buffer = memoryview(bytearray(PIECE))
        try:
            while (end := self._written.get()) is not None and not self._closed:
                self._read_back(end, buffer)
        except BaseException as e:  # raised again in `result`, on the other thread
            self._error = e

    def _read_back(self, end: int, buffer: memoryview) -> None:
        while self.at < end and not self._closed:
            if self._stop.is_set():
                raise OutputError(STOPPED)
            got = os.preadv(self._fd, [buffer[: end - self.at]], self.at)
            if not got:
                raise OutputError(f"a file being written ended at byte {self.at:,}; is something else writing it?")
            self._digest.update(buffer[:got])
            self.at += got
