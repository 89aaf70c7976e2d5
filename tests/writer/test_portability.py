"""Systems that lack what Linux has: the calls are taken away, and a repair writes the same bytes; names for all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

import bnbfix
from bnbfix.checkpoint import source as files
from bnbfix.errors import HubError, InputError
from bnbfix.hub.byte_ranges import check_file_name
from bnbfix.writer import syscalls
from bnbfix.writer.write import check_names
from tests.faults.test_faults import tree
from tests.support.build import Make

POSITIONAL = ("pread", "preadv", "pwrite", "pwritev")
LINUX = ("copy_file_range", "posix_fadvise")
FLAGS = ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_NOFOLLOW", "O_DIRECTORY")
SYSTEMS = {"Windows": (*POSITIONAL, *LINUX, *FLAGS), "macOS": LINUX, "no offsets": POSITIONAL, "no folders": FLAGS}


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    for call in SYSTEMS[name]:
        monkeypatch.delattr(os, call, raising=False)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as where there are no such flags
    monkeypatch.setattr(files, "OPEN_FLAGS", syscalls.open_flags("RDONLY", "CLOEXEC"))
    if name == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    if name in ("Windows", "macOS"):
        monkeypatch.setattr(syscalls, "libc_function", lambda name: None)
        monkeypatch.setattr(syscalls, "clone", lambda source, target: False)
    return name


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_the_same(pristine: Make, tmp_path: Path, system: str, workers: int) -> None:
    source = pristine("dense31b", "partial", shards=3)
    bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu", workers=workers)
    bnbfix.repair(source, tmp_path / "out", "portable", device="cpu", workers=workers, overwrite=True)
    assert bnbfix.verify(tmp_path / "out", source).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_what_is_written_elsewhere_is_what_linux_writes(pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "partial", shards=3)
    bnbfix.repair(source, tmp_path / "linux", "0.22.1", device="cpu")
    for name in SYSTEMS:
        with pytest.MonkeyPatch.context() as m:
            for call in SYSTEMS[name]:
                m.delattr(os, call, raising=False)
            m.setitem(sys.modules, "fcntl", None)
            m.setattr(syscalls, "libc_function", lambda name: None)
            bnbfix.repair(source, tmp_path / name, "0.22.1", device="cpu", workers=2)
        assert tree(tmp_path / name) == tree(tmp_path / "linux")


def test_an_interrupted_repair_resumes_elsewhere(pristine: Make, tmp_path: Path, system: str) -> None:
    source, journal = pristine("dense31b", "partial", shards=3), tmp_path / ".out.bnbfix-partial" / ".bnbfix-journal"

    def interrupt(n: int) -> None:
        if journal.read_text().count("\n") > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu", progress=interrupt)
    assert bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu").kept


def test_a_rename_that_refuses_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if os.path.exists(new):
            raise FileExistsError(errno.EEXIST, "File exists", str(new))
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "file").write_text("x")
    syscalls.rename_folder(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "file").read_text() == "x"
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="not empty"):
        syscalls.rename_folder(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "file").read_text() == "x"


@pytest.mark.parametrize(
    "names",
    [
        ["a.txt", "A.txt"],
        ["sub/x", "SUB/x"],
        ["\u00e9.txt", "e\u0301.txt"],
        ["stra\u00dfe", "STRASSE"],
        ["\u212b", "\u00e5"],
    ],
    ids=["case", "folder", "accent", "sharp s", "angstrom"],
)
def test_names_that_are_one_elsewhere_are_refused(names: list[str]) -> None:
    check_names(names[:1])
    with pytest.raises(InputError, match=r"differs from .* only in case or in how its letters are spelled"):
        check_names([*names, "other"])


@pytest.mark.parametrize("name", ["C:x", "c:", "sub/D:x"])
def test_drive_letters_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="drive letter"):
        check_names([name])
    with pytest.raises(HubError, match="not a valid file name"):
        check_file_name(name, "org/name")


def test_a_checkpoint_with_such_names_is_not_repaired(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "partial")
    (source / "CONFIG.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: differs from CONFIG\.json only in case"):
        bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu")
    assert not (tmp_path / "out").exists()
