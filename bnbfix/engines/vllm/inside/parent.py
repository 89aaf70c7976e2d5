"""Ends the worker when the process that started it ends, even if that was killed."""

from __future__ import annotations

import os
import signal
import stat
import threading


def watch_parent() -> None:
    """Watches stdin, which is a pipe that the parent never writes to, in a session of the worker's own."""
    if stat.S_ISFIFO(os.fstat(0).st_mode) and os.getsid(0) == os.getpid():
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)  # with whatever the worker started
