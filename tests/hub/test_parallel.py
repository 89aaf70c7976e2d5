"""Work on several threads: results, errors, and interrupts, which come from outside or while an error waits."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from bnbfix.errors import HubError
from bnbfix.hub import parallel
from bnbfix.hub.parallel import Stopped, current_stop, run_parallel


def test_results_come_in_the_order_of_the_jobs() -> None:
    assert run_parallel(lambda n: n * n, range(50), 4, name="test") == [n * n for n in range(50)]
    assert run_parallel(lambda n: n, [], 4, name="test") == []


def test_an_error_stops_the_others() -> None:
    stopped = threading.Event()

    def work(job: int) -> None:
        if job == 0:
            raise HubError("refused")
        current_stop().wait(60)
        try:
            current_stop().check()
        except Stopped:
            stopped.set()
            raise

    with pytest.raises(HubError, match="refused"):
        run_parallel(work, [1, 0, 2, 3], 2, name="test")
    assert stopped.is_set()


def test_an_error_lets_what_has_begun_end() -> None:
    begun, finished = threading.Event(), list[int]()

    def work(job: int) -> None:
        if job == 0:
            begun.wait(60)
            raise HubError("refused")
        begun.set()
        assert not current_stop().wait(0.2)
        finished.append(job)

    with pytest.raises(HubError, match="refused"):
        run_parallel(work, [0, 1, 2, 3], 2, name="test", finish_running=True)
    assert finished[:1] == [1] and len(finished) < 3


@pytest.mark.parametrize("after_an_error", [False, True])
def test_an_interrupt_stops_all(after_an_error: bool) -> None:
    calls, begun = list[str](), threading.Event()

    def work(job: int) -> None:
        if job == 0:
            begun.wait(60)
            if after_an_error:
                threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1]).start()
                raise HubError("refused")
            os.kill(os.getpid(), signal.SIGUSR1)
        current_stop().on_interrupt.append(lambda: calls.append("called"))
        begun.set()
        current_stop().wait(60)
        current_stop().check()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_parallel(work, [0, 1], 2, name="test", finish_running=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == ["called"] * (1 if after_an_error else len(calls))
    for thread in threading.enumerate():
        if thread.name.startswith("test-"):
            thread.join(60)  # it may be about to end
            assert not thread.is_alive()


def test_an_error_of_the_tick_stops_all() -> None:
    with pytest.raises(HubError, match="too late"):
        run_parallel(
            lambda job: current_stop().wait(60),
            [1],
            1,
            name="test",
            finish_running=True,
            tick=lambda: HubError("too late"),
        )


def test_an_interrupt_does_not_wait_for_what_cannot_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "GRACE", 0.05)
    release = threading.Event()
    with pytest.raises(HubError, match="too late"):
        run_parallel(lambda job: release.wait(60), [1], 1, name="stuck", tick=lambda: HubError("too late"))
    (left,) = (t for t in threading.enumerate() if t.name.startswith("stuck-"))
    assert left.daemon
    release.set()
    left.join()


@pytest.mark.parametrize("threads", [0, 1])
def test_with_fewer_threads_the_work_is_done(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    start, left = threading.Thread.start, [threads]

    def refuse(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert run_parallel(lambda n: n + 1, range(10), 4, name="test") == list(range(1, 11))
