"""How many threads the system starts, and what they share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

logger = logging.getLogger(__name__)


def count_threads(wanted: int) -> int:
    """How many threads can run at the same time, this one included, up to `wanted`: OpenMP ends the process when the
    system refuses one.
    """
    done = threading.Event()
    others = [threading.Thread(target=done.wait, daemon=True) for _ in range(wanted - 1)]
    started = 0
    try:
        for thread in others:
            thread.start()
            started += 1
    except RuntimeError:
        logger.info("the system starts no more than %d threads of %d", started + 1, wanted)
    finally:
        done.set()
        for thread in others[:started]:
            thread.join()
    return started + 1


class SharedContext:
    """A context of the whole process: the first thread that comes enters it, the last that goes leaves it."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make, self._lock, self._inside = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._context = self._make()
                self._context.__enter__()
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._context.__exit__(None, None, None)
