"""The parts of writing: chunks made ahead, hashes on their own thread, system calls, how many workers."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bnbfix
from bnbfix.errors import InputError, OutputError, UsageError
from bnbfix.kernels import native
from bnbfix.writer import shard_writer, syscalls
from bnbfix.writer.background import Hasher, Prefetch
from bnbfix.writer.output_file import OutputFile
from bnbfix.writer.shard_writer import keep_in_page_cache
from bnbfix.writer.write import BASE_MEMORY, choose_workers, worker_memory, write_plan
from tests.support.build import Make, planned


def test_items_come_in_order_and_no_more_are_made_than_may_wait() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    ahead = iter(Prefetch(items(), 3))
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:  # one drawn, three waiting, one that finds no room
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5
    assert list(ahead) == list(range(1, 20))
    assert list(ahead) == [], "the end stays the end"


def test_items_that_are_not_counted_do_not_keep_counted_ones_from_being_made() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in [-1, -2, -3, 1, -4, 2, -5, 3, -6]:
            yield i
            made.append(i)

    prefetch = Prefetch(items(), 2, lambda item: item > 0)
    deadline = time.monotonic() + 5
    while 2 not in made and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [-1, -2, -3, 1, -4, 2, -5], "the third counted item waits for room"
    assert list(prefetch) == [-1, -2, -3, 1, -4, 2, -5, 3, -6]


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    ahead = iter(Prefetch(items(), 4))
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="broken"):
        next(ahead)


def test_closing_stops_a_maker_that_waits() -> None:
    before = threading.active_count()
    ahead = Prefetch(range(10**9), 2)
    assert next(iter(ahead)) == 0
    ahead.close()
    assert threading.active_count() == before


def test_a_hash_is_that_of_the_file_and_sees_one_that_is_cut_short(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    with (tmp_path / "file").open("w+b") as f:
        stop = threading.Event()
        hasher = Hasher(f.fileno(), stop)
        for at in range(0, len(data), 700_000):
            f.write(data[at : at + 700_000])
            f.flush()
            hasher.reach(f.tell())
        assert hasher.result() == hashlib.sha256(data).hexdigest()
        short = Hasher(f.fileno(), stop)
        short.reach(len(data) + 1)
        with pytest.raises(OutputError, match=r"ended at byte 3,000,001"):
            short.result()
        stop.set()
        stopped = Hasher(f.fileno(), stop)
        stopped.reach(len(data))
        with pytest.raises(OutputError, match="stopped before a file was whole"):
            stopped.result()


def test_all_but_the_last_of_what_was_hashed_leaves_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(40 * 1000)
    dropped: list[int] = []
    monkeypatch.setattr(syscalls, "drop_page_cache", lambda fd, end: dropped.append(end))
    for cached_bytes in (None, 4000):
        path = tmp_path / str(cached_bytes)
        file = OutputFile(path, lambda n: None, lambda digest: None, threading.Event(), cached_bytes=cached_bytes)
        with file, ThreadPoolExecutor(1) as pool:
            for at in range(0, len(data), 1000):
                deadline = time.monotonic() + 5
                while file.hashed < at:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                file.append(data[at : at + 1000])
            assert file.finish(pool).result() == hashlib.sha256(data).hexdigest()
        assert bool(dropped) is (cached_bytes is not None)
    assert dropped == sorted(dropped) and 4000 <= dropped[0] <= 6000 and 31_000 <= dropped[-1] <= 36_000


def test_bytes_that_are_dropped_leave_the_page_cache_once_they_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *said: advice.append(said))
    syscalls.drop_page_cache(7, 1_000_000)
    assert advice == [(0, 1_000_000, os.POSIX_FADV_DONTNEED)]
    monkeypatch.undo()
    with (tmp_path / "file").open("wb") as f:
        closed = os.dup(f.fileno())
    os.close(closed)
    syscalls.drop_page_cache(closed, 1)  # an error is only advice that was not taken
    monkeypatch.delattr(os, "posix_fadvise")
    syscalls.drop_page_cache(closed, 1)


def test_an_output_stays_in_memory_up_to_half_of_what_is_free() -> None:
    assert keep_in_page_cache(6 << 30, 12 << 30) and not keep_in_page_cache((6 << 30) + 1, 12 << 30)
    assert keep_in_page_cache(1 << 50, None)


def test_free_memory_is_that_of_the_system_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert syscalls.free_memory() == 4_096_000

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert syscalls.free_memory() is None


def test_an_output_that_does_not_stay_in_memory_is_the_same(
    pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(pristine("dense31b", "skip"), "0.22.1")
    kept = write_plan(plan, tmp_path / "kept")
    monkeypatch.setattr(shard_writer, "CACHED_BYTES", 100)
    monkeypatch.setattr(syscalls, "free_memory", lambda: 0)
    assert write_plan(plan, tmp_path / "out").files == kept.files


@pytest.mark.parametrize("in_kernel", [True, False])
def test_ranges_are_copied_to_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("w+b") as b:
        assert syscalls.copy(a.fileno(), 10, b.fileno(), 5, 50_000, "a") is in_kernel
        syscalls.copy(a.fileno(), 0, b.fileno(), 50_005, 0, "a")
        assert (tmp_path / "b").read_bytes() == bytes(5) + data[10:50_010]
        with pytest.raises(InputError, match=r"a: ended at byte 100,000 while it was being read"):
            syscalls.copy(a.fileno(), 90_000, b.fileno(), 0, 10_001, "a")


def test_two_folders_are_swapped_or_left(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
    swapped = syscalls.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "of").read_text() == ("b" if swapped else "a")
    if swapped:
        with pytest.raises(FileNotFoundError):
            syscalls.exchange(tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("code", "raised"),
    [(errno.EINVAL, False), (errno.ENOSYS, False), (errno.EXDEV, True), (errno.EPERM, True), (errno.EIO, True)],
)
def test_a_file_system_that_cannot_swap_says_so_and_what_went_wrong_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    def renameat2(*arguments: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(syscalls, "libc_function", lambda name: renameat2)
    if raised:
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            syscalls.exchange(tmp_path / "a", tmp_path / "b")
        assert (caught.value.errno, caught.value.filename2) == (code, str(tmp_path / "b"))
    else:
        assert syscalls.exchange(tmp_path / "a", tmp_path / "b") is False


def test_a_clone_is_made_or_refused_but_nothing_between(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 8192)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        made = syscalls.clone(a.fileno(), b.fileno())
    assert (tmp_path / "b").read_bytes() == (b"x" * 8192 if made else b"")


def test_systems_without_these_calls_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls.sys, "platform", "darwin")
    with (tmp_path / "a").open("wb") as f:
        assert not syscalls.clone(f.fileno(), f.fileno())
        syscalls.start_writeback(f.fileno(), 0, 1)
    assert not syscalls.exchange(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("asked", "shards", "cores", "max_memory", "expected"),
    [
        (None, 10, 1, None, 1),
        (None, 10, 7, None, 1),
        (None, 10, 8, None, 2),
        (None, 10, 128, None, 4),
        (None, 1, 128, None, 1),
        (None, 0, 2, None, 1),
        (6, 10, 2, None, 6),
        (6, 3, 2, None, 3),
        (6, 10, 2, BASE_MEMORY + 250, 2),
        (None, 10, 16, BASE_MEMORY + 100, 1),
    ],
)
def test_workers_are_as_many_as_cores_shards_and_memory_allow(
    asked: int | None, shards: int, cores: int, max_memory: int | None, expected: int
) -> None:
    assert choose_workers(asked, shards, cores, 100, max_memory) == expected


def test_too_little_memory_and_no_workers_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=rf"max_memory is {BASE_MEMORY + 99:,} bytes, which is too little") as caught:
        choose_workers(None, 1, 1, 100, BASE_MEMORY + 99)
    assert f"{BASE_MEMORY + 100:,}" in str(caught.value.hint)
    with pytest.raises(UsageError, match="workers is 0, not a positive number"):
        choose_workers(0, 1, 1, 100, None)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_shards_written_at_the_same_time_give_the_same_bytes(pristine: Make, tmp_path: Path, workers: int) -> None:
    source = pristine("dense31b", "partial", shards=3)
    seen: list[int] = []
    one = bnbfix.repair(source, tmp_path / "one", vllm="portable", device="cpu", workers=1)
    many = bnbfix.repair(
        source, tmp_path / "many", vllm="portable", device="cpu", workers=workers, progress=seen.append
    )
    assert one.files == many.files
    record = (tmp_path / "many" / "bnbfix.json").stat().st_size
    assert sum(seen) == many.plan.bytes_written + record
    assert worker_memory(one.plan) < 100 << 20


def test_an_error_of_one_worker_stops_all(pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pristine("dense31b", "partial", shards=3)

    monkeypatch.setattr(native, "load_library", broken_library)
    with pytest.raises(OutputError, match="Input/output error"):
        bnbfix.repair(source, tmp_path / "out", vllm="portable", device="cpu", workers=3)
    assert list(tmp_path.iterdir()) == []


def broken_library() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_whose_end_no_thread_could_be_started_for_is_closed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[str] = []
    before, busy = os.listdir("/dev/fd"), threading.Event()
    file = OutputFile(tmp_path / "file", lambda n: None, digests.append, threading.Event(), cached_bytes=None)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ThreadPoolExecutor(2) as pool:
        pool.submit(busy.wait)  # its thread finds afterwards what was left in the queue
        with pytest.raises(RuntimeError, match="new thread"), file, monkeypatch.context() as m:
            file.append(b"data")
            m.setattr(threading.Thread, "start", refuse)
            file.finish(pool)
        other = os.open(tmp_path / "file", os.O_RDONLY)  # has the number of what was closed
        busy.set()
    with file:  # left once more
        pass
    os.close(other)  # nobody else did
    assert digests == [] and len(os.listdir("/dev/fd")) == len(before)
    assert (tmp_path / "file").read_bytes() == b"data", "unfinished, and not deleted"
