"""Work that runs beside the writing: chunks made ahead of their turn, and hashes of what was written."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from .errors import OutputError

T = TypeVar("T")
PIECE = 512 << 10  # bytes read back and hashed at a time: they stay in the processor's cache
STOPPED = "stopped before a file was whole"
HELD = 4  # chunks kept in memory for the hashes, at most; what comes while they lag behind is read back


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
    """SHA-256 of a file that grows, on its own thread: of chunks as they were written, of other bytes by reading back.

    `room` bounds the chunks that are kept for it, and for other files. Once `stop` is set it gives up; `result` then
    raises.
    """

    def __init__(self, fd: int, stop: threading.Event, room: threading.Semaphore) -> None:
        self._fd, self._stop, self._room = fd, stop, room
        self._digest = hashlib.sha256()
        self._at = 0  # bytes that were hashed
        self._written: queue.SimpleQueue[int | bytes | memoryview | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bnbfix-hash", daemon=True)
        self._thread.start()

    def reach(self, end: int, chunk: bytes | memoryview | None = None) -> None:
        """Says that the bytes before `end` are written; `chunk` holds the last of them where they are in memory."""
        held = chunk is not None and self._room.acquire(blocking=False)
        self._written.put(chunk if held else end)

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
            while (item := self._written.get()) is not None and not self._closed:
                if self._stop.is_set():
                    raise OutputError(STOPPED)
                if isinstance(item, int):
                    self._read_back(item, buffer)
                    continue
                self._digest.update(item)
                self._at += len(item)
                self._room.release()
        except BaseException as e:  # raised again in `result`, on the other thread
            self._error = e

    def _read_back(self, end: int, buffer: memoryview) -> None:
        while self._at < end and not self._closed:
            if self._stop.is_set():
                raise OutputError(STOPPED)
            got = os.preadv(self._fd, [buffer[: end - self._at]], self._at)
            if not got:
                raise OutputError(f"a file being written ended at byte {self._at:,}; is something else writing it?")
            self._digest.update(buffer[:got])
            self._at += got
