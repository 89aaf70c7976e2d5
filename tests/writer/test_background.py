"""The parts that writing is made of: chunks made ahead, hashes beside, system calls, how many workers."""

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
from bnbfix.writer import output_file, syscalls, write
from bnbfix.writer.background import Hasher, Prefetch
from bnbfix.writer.write import BASE_MEMORY, choose_workers, keep_in_page_cache, worker_memory, write_plan
from tests.support.build import Make, planned


def test_items_come_in_order_and_no_more_are_made_than_may_wait() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    ahead = Prefetch(items(), 3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:  # one drawn, three waiting, one in the maker's hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5
    assert list(ahead) == list(range(1, 20))
    assert list(ahead) == [], "the end stays the end"


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    ahead = Prefetch(items(), 4)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            next(ahead)


def test_closing_stops_a_maker_that_waits() -> None:
    before = threading.active_count()
    ahead = Prefetch(iter(range(10**9)), 2)
    assert next(ahead) == 0
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


def test_what_was_hashed_is_let_go_of_but_for_the_last_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(40 * 1000)
    monkeypatch.setattr(output_file, "LAG", 4000)
    gone: list[int] = []
    monkeypatch.setattr(syscalls, "drop_page_cache", lambda fd, end: gone.append(end))
    for stays in (True, False):
        file = output_file.OutputFile(
            tmp_path / str(stays), lambda n: None, lambda digest: None, threading.Event(), stays=stays
        )
        with file, ThreadPoolExecutor(1) as pool:
            for at in range(0, len(data), 1000):
                deadline = time.monotonic() + 5
                while file._hasher.at < at:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                file.append(data[at : at + 1000])
            assert file.finish(pool).result() == hashlib.sha256(data).hexdigest()
        assert bool(gone) is not stays
    assert gone == sorted(gone) and 4000 <= gone[0] <= 6000 and 31_000 <= gone[-1] <= 36_000


def test_letting_go_loses_nothing_and_fails_in_silence(tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    with (tmp_path / "file").open("w+b", buffering=0) as f:
        f.write(data)
        syscalls.drop_page_cache(f.fileno(), len(data))
        os.fsync(f.fileno())
        syscalls.drop_page_cache(f.fileno(), len(data))
        assert os.pread(f.fileno(), len(data), 0) == data
        gone = os.dup(f.fileno())
    os.close(gone)
    syscalls.drop_page_cache(gone, 1)


def test_an_output_stays_in_memory_up_to_half_of_what_is_free() -> None:
    free = syscalls.free_memory()
    assert free is None or free > 0
    assert keep_in_page_cache(6 << 30, 12 << 30) and not keep_in_page_cache((6 << 30) + 1, 12 << 30)
    assert keep_in_page_cache(1 << 50, None)


def test_an_output_that_does_not_stay_is_the_same(
    pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(pristine("dense31b", "skip"), "0.22.1")
    kept = write_plan(plan, tmp_path / "kept")
    monkeypatch.setattr(output_file, "LAG", 100)
    monkeypatch.setattr(syscalls, "free_memory", lambda: 0)
    assert write_plan(plan, tmp_path / "out").files == kept.files


@pytest.mark.parametrize("in_kernel", [True, False])
def test_ranges_are_copied_to_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("w+b") as b:
        syscalls.copy(a.fileno(), 10, b.fileno(), 5, 50_000, "a")
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

    monkeypatch.setattr(syscalls, "_libc", lambda name: renameat2)
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
    monkeypatch.setattr(syscalls, "_libc", syscalls._libc.__wrapped__)
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
def test_workers_are_as_many_as_cores_shards_and_memory_bear(
    asked: int | None, shards: int, cores: int, max_memory: int | None, expected: int
) -> None:
    assert choose_workers(asked, shards, cores, 100, max_memory) == expected


def test_too_little_memory_and_no_workers_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--max-memory") as caught:
        choose_workers(None, 1, 1, 100, BASE_MEMORY + 99)
    assert f"{BASE_MEMORY + 100:,}" in str(caught.value.hint)
    with pytest.raises(UsageError, match="--workers 0"):
        choose_workers(0, 1, 1, 100, None)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_shards_side_by_side_give_the_same_bytes(pristine: Make, tmp_path: Path, workers: int) -> None:
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

    def broken(*args: object) -> Iterator[bytes]:
        yield b""
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(write, "weight_values", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        bnbfix.repair(source, tmp_path / "out", vllm="portable", device="cpu", workers=3)
    assert list(tmp_path.iterdir()) == []
