"""A limit of requests to the Hub that many processes share. A 429 makes all of them wait as long as it asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .byte_ranges import url_origin
from .limits import read_wait
from .parallel import current_stop

LONGEST_WAIT = 3600.0  # seconds that an answer can make everybody wait


class Pace(Protocol):
    """Says when the next request may be made."""

    def reserve(self) -> float:
        """Take the next turn; return the seconds until it comes."""

    def pause(self, seconds: float) -> None:
        """Give out no turn before these seconds are over."""


class Clock:
    """The pace of `rate` requests a second: one place where all processes take turns."""

    def __init__(self, rate: float) -> None:
        self._lock, self._interval, self._next = threading.Lock(), 1 / rate, 0.0

    def reserve(self) -> float:
        """As in Pace."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
            return turn - now

    def pause(self, seconds: float) -> None:
        """As in Pace."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + min(seconds, LONGEST_WAIT))


@contextmanager
def keep_pace(pace: Pace) -> Iterator[None]:
    """Make this process's requests to the Hub wait for their turn, as long as the context lasts.

    What the Hub redirects to other hosts is not counted there.
    """
    from .client import describe_request, hook_session

    home = url_origin(describe_request("", None).endpoint)

    def wait_turn(request: Any) -> None:
        if url_origin(str(request.url)) == home:
            stop = current_stop()
            stop.wait(pace.reserve())
            stop.check()

    def heed(answer: Any) -> None:
        if (seconds := read_wait(answer.status_code, answer.headers)) is not None:
            pace.pause(seconds)

    with hook_session(wait_turn, heed):
        yield
