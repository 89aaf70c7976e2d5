"""Work on several threads that an interrupt ends within seconds, whatever they wait for."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

GRACE = 1.5  # seconds that an interrupt waits for the threads; they are daemons, so the end of Python does not wait
J = TypeVar("J")
T = TypeVar("T")


class Stopped(BaseException):
    """Raised on a thread that has to stop. Not an Exception: nothing on the way may take it for an error."""


class Stop(threading.Event):
    """Tells threads to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.on_interrupt: list[Callable[[], None]] = []  # called once an interrupt has set it

    def check(self) -> None:
        """Raise Stopped if it is set."""
        if self.is_set():
            raise Stopped


# Those that requests of `run_parallel`'s threads were sent over. An interrupt shuts them down, which wakes whoever
# waits for a server; what else of this process uses them sees a connection that was lost.
connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _shut_down_connections() -> None:
    for connection in list(connections):
        with contextlib.suppress(OSError):  # it has ended
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not SSLSocket's, which another thread is using


_current = threading.local()


def current_stop() -> Stop:
    """Return what stops this thread; on other threads than those of `run_parallel` it is never set."""
    return getattr(_current, "stop", None) or Stop()


def run_parallel(
    work: Callable[[J], T],
    jobs: Sequence[J],
    workers: int,
    *,
    name: str,
    finish_running: bool = False,
    tick: Callable[[], None] | None = None,
) -> list[T]:
    """Return the results in order. An interrupt stops every job, and is raised at most `GRACE` seconds later.

    The first error ends it too: jobs that have not begun are left out, the others stop or, with `finish_running`, go
    on to their end. Where the system starts no thread the jobs run on this one. `tick` is called every second; what it
    raises is an interrupt, too.
    """
    stop, closed = Stop(), threading.Event()
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T] | BaseException] = queue.SimpleQueue()

    def draw_jobs() -> None:
        _current.stop = stop
        try:
            while not closed.is_set():
                index = waiting.get_nowait()
                done.put((index, work(jobs[index])))
        except queue.Empty:
            pass
        except BaseException as e:  # raised again below, on the other thread
            done.put(e)
        finally:
            _current.stop = None

    for index in range(len(jobs)):
        waiting.put(index)
    count = min(workers, len(jobs))
    threads = [threading.Thread(target=draw_jobs, name=f"{name}-{i}", daemon=True) for i in range(count)]
    started: list[threading.Thread] = []
    late: Exception | None = None  # what `tick` raised
    results: dict[int, T] = {}
    try:
        _start_threads(threads, started)
        if not started:
            draw_jobs()
        while len(results) < len(jobs):
            try:
                found = done.get(timeout=None if tick is None else 1)
            except queue.Empty:
                assert tick is not None
                try:
                    tick()
                except Exception as e:
                    late = e
                    raise
                continue
            if isinstance(found, BaseException):
                raise found
            results[found[0]] = found[1]
    except BaseException as e:  # an interrupt too, raised again
        closed.set()
        interrupted = e is late or not isinstance(e, Exception)
        patient = finish_running and not interrupted
        if not patient:
            stop.set()
        if interrupted:
            _shut_down_connections()
            for call in stop.on_interrupt:
                call()
        deadline = time.monotonic() + GRACE
        for thread in started:
            thread.join(None if patient else max(0.0, deadline - time.monotonic()))
        raise
    return [results[index] for index in range(len(jobs))]


def _start_threads(threads: Iterable[threading.Thread], started: list[threading.Thread]) -> None:
    """Start threads until the system refuses one."""
    with contextlib.suppress(RuntimeError):
        for thread in threads:
            thread.start()
            started.append(thread)
