"""Standard streams that are closed (`2>&-`), or that cannot be written to."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def open_streams() -> None:
    """Put the null device in the place of standard streams that are closed.

    Else Python has None there, and the next files that are opened get their numbers: what a library in C prints to
    stderr would be written into the output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:  # it stays open as long as the process
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold characters that stdout's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Forget what was printed and cannot be written: at its end Python would try again, and end with status 120."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
