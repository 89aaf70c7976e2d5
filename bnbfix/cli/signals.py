"""SIGINT and SIGTERM: one interrupts the command; a second, or seconds without an end, end the process.

Python runs a signal's handler between two steps of its main thread, which may wait for a name server, a disk or a
library much longer than people do. So a thread of its own reads the signals, and ends the process in its place.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from ..report.terminal import print_error

INTERRUPTED, TERMINATED = 130, 143
CODES = {int(signal.SIGINT): INTERRUPTED, int(signal.SIGTERM): TERMINATED}
SECONDS = 1.8  # for everything that an interrupted command still does


class Interrupted(Exception):
    """A command was interrupted and has something to say about it. The option parser catches KeyboardInterrupt."""

    def __init__(self, words: str = "interrupted", hint: str | None = None, command: str | None = None) -> None:
        super().__init__(words)
        self.hint, self.command = hint, command


class Signals:
    """The first signal that came: `code` is the exit code that it asks for, 130 before there is one."""

    code = INTERRUPTED
    seen = False

    def interrupt(self, number: int, frame: object) -> None:
        """Handle a signal: raise KeyboardInterrupt, the second time end the process."""
        if self.seen:
            end_process(self.code)
        self.code, self.seen = CODES[number], True
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals as long as the context lasts. A signal that is ignored, as by nohup, stays so."""
        old = {n: signal.getsignal(n) for n in CODES if signal.getsignal(n) is not signal.SIG_IGN}
        for number in old:
            signal.signal(number, self.interrupt)
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OSError, RuntimeError):  # the system gives no pipe, or starts no thread
                    stack.enter_context(_watched())
                yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Watch signals on a thread of its own as long as the context lasts."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(target=_watch, args=(read,), name="bnbfix-signals", daemon=True)
    try:
        watcher.start()
    except RuntimeError:
        os.close(read)
        os.close(write)
        raise
    try:
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
    finally:
        os.close(write)
        watcher.join()
        os.close(read)


def _watch(read: int) -> None:
    """End the process at a second signal, or `SECONDS` after the first, unless the other end is closed before."""
    if (first := _next_signal(read)) is None:
        return
    with contextlib.suppress(TimeoutError):
        if _next_signal(read, SECONDS) is None:
            return
    end_process(CODES[first])


def _next_signal(read: int, seconds: float | None = None) -> int | None:
    """Return the signal that comes next; None where none can: the other end is closed, or reading fails.

    Raises TimeoutError when none comes in so many seconds.
    """
    poll = select.poll()
    poll.register(read, select.POLLIN)
    while poll.poll(seconds and seconds * 1000):
        try:
            number = os.read(read, 1)
        except OSError:  # as without a watcher, the signal's handler has to do
            return None
        if not number:
            return None
        if number[0] in CODES:
            return number[0]
    raise TimeoutError


def end_process(code: int) -> NoReturn:
    """End the process at once, as a kill would: what it leaves is what the next run expects."""
    with contextlib.suppress(Exception):
        print_error("interrupted; what was not finished is left to the next run")
    _exit(code)


def exit_interrupted(code: int) -> NoReturn:
    """End an interrupted process, without the wait of Python's own end for threads of other packages."""
    if threading.active_count() > 1:
        _exit(code)
    sys.exit(code)


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
