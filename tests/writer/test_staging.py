"""What a repair finds at its destination: links, pipes, locks, the journal and the files of a killed run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix import UsageError
from bnbfix.planner.plan import JOURNAL
from bnbfix.writer.staging import Staging
from tests.support.build import Make

OUT, STAGING, OLD = "out", ".out.bnbfix-partial", ".out.bnbfix-old"


def fix(source: Path, out: Path, **options: Any) -> bnbfix.RepairResult:
    return bnbfix.repair(source, out, vllm="0.22.1", device="cpu", **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(pristine: Make) -> Path:
    return pristine("text", "single", shards=2)


@pytest.fixture(scope="module")
def right(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a repair writes where nothing is in its way."""
    out = tmp_path_factory.mktemp("right") / OUT
    fix(source, out)
    return tree(out)


def only_the_output(tmp_path: Path, right: dict[str, bytes], *others: str) -> bool:
    return tree(tmp_path / OUT) == right and sorted(p.name for p in tmp_path.iterdir()) == sorted([OUT, *others])


# Something else in the place of the staging folder


@pytest.mark.parametrize("what", ["link to a folder", "link to nothing", "file"])
def test_a_link_or_file_in_the_place_of_the_staging_folder_is_removed_and_its_target_stays(
    source: Path, right: dict[str, bytes], tmp_path: Path, what: str
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    if what == "file":
        (tmp_path / STAGING).write_text("in the way")
    else:
        (tmp_path / STAGING).symlink_to("precious" if what == "link to a folder" else "nothing")
    assert fix(source, tmp_path / OUT).written
    assert only_the_output(tmp_path, right, "precious") and not (tmp_path / OUT).is_symlink()
    assert tree(tmp_path / "precious") == {"file": b"precious"}


# What a killed run left


def interrupt(source: Path, out: Path) -> str:
    """Interrupts a repair after its first finished file, and names that."""
    journal = out.with_name(STAGING) / JOURNAL

    def progress(n: int) -> None:
        if journal.read_text().count("\n") > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fix(source, out, progress=progress)
    text = journal.read_text()
    return next(p.name for p in journal.parent.iterdir() if f'"{p.name}"' in text)


def test_a_finished_file_is_kept(
    source: Path, right: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = interrupt(source, tmp_path / OUT)
    before = (tmp_path / STAGING / name).stat().st_ino
    with caplog.at_level("INFO", "bnbfix.writer"):
        kept = fix(source, tmp_path / OUT).kept
    assert name in kept
    assert f"resuming an interrupted repair: {len(kept)} finished files in {tmp_path / STAGING}" in caplog.messages
    assert (tmp_path / OUT / name).stat().st_ino == before and only_the_output(tmp_path, right)


def gone(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [gone, link, pipe, folder])
def test_a_finished_file_that_became_something_else_is_written_anew(
    source: Path, right: dict[str, bytes], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    name = interrupt(source, tmp_path / OUT)
    change(tmp_path / STAGING / name)
    assert name not in fix(source, tmp_path / OUT).kept
    assert only_the_output(tmp_path, right, *["elsewhere"] * (change is link))
    assert not (tmp_path / OUT / name).is_symlink()


def test_a_finished_file_that_cannot_be_read_is_written_anew(
    source: Path, right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, tmp_path / OUT)

    def broken(fd: int, n: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as m:
        m.setattr(os, "read", broken)
        result = fix(source, tmp_path / OUT)
    assert result.kept == () and only_the_output(tmp_path, right)


@pytest.mark.parametrize("change", [gone, link, pipe, folder])
def test_a_journal_that_is_not_a_regular_file_is_neither_read_nor_waited_for(
    source: Path, right: dict[str, bytes], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    interrupt(source, tmp_path / OUT)
    text = (tmp_path / STAGING / JOURNAL).read_bytes()
    change(tmp_path / STAGING / JOURNAL)
    assert fix(source, tmp_path / OUT).kept == ()
    assert only_the_output(tmp_path, right, *["elsewhere"] * (change is link))
    assert change is not link or (tmp_path / "elsewhere").read_bytes() == text


def test_an_old_output_that_a_killed_run_had_moved_comes_back_and_needs_overwrite(
    source: Path, right: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / OLD).mkdir()
    (tmp_path / OLD / "old.txt").write_text("old")

    with pytest.raises(bnbfix.UsageError, match="exists and is not empty"):
        fix(source, tmp_path / OUT)
    assert tree(tmp_path) == {f"{OUT}/old.txt": b"old"}
    assert fix(source, tmp_path / OUT, overwrite=True).written and only_the_output(tmp_path, right)


# Locks


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_written_to_all_the_same(
    source: Path, right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert fix(source, tmp_path / OUT).written and only_the_output(tmp_path, right)


@pytest.mark.parametrize("another", [False, True], ids=["published", "published, and a third begins"])
def test_a_staging_folder_that_is_published_before_it_is_locked_is_left_to_its_owner(
    source: Path, right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    flock, calls = fcntl.flock, 0

    def late(fd: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / STAGING / "theirs").write_text("theirs")
            (tmp_path / STAGING).rename(tmp_path / "published")
            if another:
                (tmp_path / STAGING).mkdir()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert fix(source, tmp_path / OUT).written
    assert calls == 2 and only_the_output(tmp_path, right, "published")
    assert tree(tmp_path / "published") == {"theirs": b"theirs"}


def test_a_staging_folder_that_is_deleted_before_it_is_opened_is_made_again(
    source: Path, right: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    mkdir = Path.mkdir

    def removed(path: Path, *args: Any, **options: Any) -> None:
        mkdir(path, *args, **options)
        if path.name == STAGING:
            made.append(path)
            if len(made) == 1:
                path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed)
    assert fix(source, tmp_path / OUT).written
    assert len(made) > 1 and only_the_output(tmp_path, right)


def test_an_output_that_another_repair_published_before_the_lock_was_had_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, flock = 0, fcntl.flock

    def late(fd: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / STAGING / "theirs").write_text("theirs")
            (tmp_path / STAGING).rename(tmp_path / OUT)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(bnbfix.UsageError, match="exists and is not empty"):
        fix(source, tmp_path / OUT)
    assert only_the_output(tmp_path, {"theirs": b"theirs"})


def test_an_output_that_is_filled_while_a_repair_runs_is_not_replaced(source: Path, tmp_path: Path) -> None:
    def fill(done: int) -> None:
        (tmp_path / OUT).mkdir(exist_ok=True)
        (tmp_path / OUT / "theirs").write_text("theirs")

    with pytest.raises(bnbfix.OutputError, match=r"out: cannot be written \(Directory not empty\)"):
        fix(source, tmp_path / OUT, progress=lambda *step: fill(0))
    assert only_the_output(tmp_path, {"theirs": b"theirs"})


def test_only_the_folder_that_is_locked_is_cleared(tmp_path: Path) -> None:
    staging = Staging(tmp_path / OUT, "plan")
    staging.path.rename(tmp_path / "moved")
    staging.path.mkdir()
    (staging.path / "theirs").write_text("theirs")
    staging.discard()
    staging.close()
    assert tree(tmp_path / STAGING) == {"theirs": b"theirs"}
    mine = Staging(tmp_path / "mine", "plan")
    mine.discard()
    mine.close()
    assert not mine.path.exists()


# One folder by two names


@pytest.fixture
def mounted(pristine: Make, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder with a checkpoint in it, `model`, and another name of the same folder."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(pristine("text", "single"), one / "model")
    other.mkdir()
    command = ["mount", "--bind", str(one), str(other)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("folders cannot be mounted here")
    yield one, other
    subprocess.run(["umount", "--lazy", str(other)], check=True)


@pytest.mark.parametrize("place", ["model", "model/out", "."])
def test_an_output_that_is_the_source_by_another_name_is_refused(mounted: tuple[Path, Path], place: str) -> None:
    one, other = mounted
    before = tree(one)
    with pytest.raises(UsageError, match="the output must be outside the source"):
        fix(one / "model", other / place, overwrite=True)
    assert tree(one) == before
