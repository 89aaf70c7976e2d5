"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.managers import BaseManager

from ..hub.pace import Clock
from .task import Lines, Task, describe_loss, run_task

TRIES = 3  # of a model whose process is killed


class _Clocks(BaseManager):
    """The process that holds the clock of all workers."""


_Clocks.register("Clock", Clock)


def run_on_processes(tasks: Sequence[Task], *, jobs: int, rate: float) -> Lines:
    """Yield each task with its line, as soon as it is done. Ending the iteration ends what runs.

    Each process has a pool of its own, so that one that is killed takes no other model with it.
    """
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    clocks = _Clocks(ctx=context)
    clocks.start(_end_with_driver)
    queue, killed = deque(tasks), Counter[Task]()
    running: dict[Future[str | None], tuple[Task, ProcessPoolExecutor]] = {}
    make_pool = partial(ProcessPoolExecutor, 1, context, _end_with_driver)
    pools = [make_pool() for _ in range(min(jobs, len(queue)))]
    try:
        pace = clocks.Clock(rate)  # type: ignore[attr-defined]  # it is registered above

        def start_next(pool: ProcessPoolExecutor) -> None:
            task = queue.popleft()
            running[pool.submit(run_task, task, pace)] = task, pool

        for pool in pools:
            start_next(pool)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task, pool = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    pools.append(pool := make_pool())
                    killed[task] += 1
                    if killed[task] < TRIES:
                        queue.append(task)
                if queue:
                    start_next(pool)
                if error is None:
                    yield task, future.result()
                elif not isinstance(error, BrokenProcessPool):
                    yield task, describe_loss(task, f"{type(error).__name__}: {error}")
                elif killed[task] == TRIES:
                    yield task, describe_loss(task, f"its process was killed {TRIES} times")
    finally:
        for process in set(multiprocessing.active_children()) - before if running else ():
            process.kill()
        for pool in pools:
            pool.shutdown()
        clocks.shutdown()


def _end_with_driver() -> None:
    """A process leaves interrupts to the driver, and ends with it even where that is killed.

    Otherwise it could go on with a repo that the next driver begins with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = multiprocessing.parent_process()
    assert driver is not None

    def wait_and_end() -> None:
        wait_for_end([driver.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_end, name="bnbfix-fleet", daemon=True).start()
