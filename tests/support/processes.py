"""Processes that a test starts or ends, and the wait for what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_for(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within a minute"
        time.sleep(0.02)


def wait_for_end(pids: list[int]) -> None:
    """Waits for killed processes that are not our children: the kernel ends them a few milliseconds later."""
    wait_for(lambda: not any(is_alive(pid) for pid in pids), f"the end of {pids}")


def is_alive(pid: int) -> bool:
    """Return True if a process runs. One that has ended is a zombie until its parent reaps it, which may be never."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False
