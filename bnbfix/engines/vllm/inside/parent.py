"""Ends the worker when the process that started it ends, even if that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
import threading


def watch_parent() -> None:
    """Watches stdin, which is a pipe that the parent never writes to, in a session of the worker's own."""
    if stat.S_ISFIFO(os.fstat(0).st_mode) and os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            _ask_kernel()
        if select.select([0], [], [], 0)[0]:  # it has ended already
            _end()
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _ask_kernel() -> None:
    """Have Linux end the worker: a thread has to wait for the import of a library in C, which can take many seconds."""
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    _end()


def _end() -> None:
    os.killpg(0, signal.SIGKILL)  # with whatever the worker started
