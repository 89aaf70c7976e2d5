"""Every call by which a repair changes the disk fails once, at every place; a full disk and kills, for real."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.errors import InputError, OutputError, UsageError
from tests.support.build import Make

HERE = Path(__file__).parent
OLD = {"old.txt": b"old"}
# What changes the disk, or makes a file safe on it: (module, function, errno).
CALLS = {
    "open": (os, "open", errno.EACCES),
    "mkdir": (os, "mkdir", errno.ENOSPC),
    "pwrite": (os, "pwrite", errno.ENOSPC),
    "write": (os, "write", errno.EIO),
    "copy_file_range": (os, "copy_file_range", errno.EIO),
    "clone": (fcntl, "ioctl", errno.EIO),
    "link": (os, "link", errno.EMLINK),
    "read back": (os, "preadv", errno.EIO),
    "fsync": (os, "fsync", errno.EIO),
    "rename": (os, "rename", errno.EXDEV),
    "unlink": (os, "unlink", errno.EROFS),
    "rmdir": (os, "rmdir", errno.EROFS),
    "lock": (fcntl, "flock", errno.EIO),
}
EVERY_CALL = bool(os.environ.get("BNBFIX_EVERY_CALL"))  # else a few of each: the first, the last, one in the middle
# Calls that do not depend on what is at the destination.
SAME_EVERYWHERE = {"open", "pwrite", "write", "copy_file_range", "clone", "read back", "lock"}
# Calls whose failure costs nothing: another way is taken, or what is left is cleared by the next run.
HARMLESS = {"copy_file_range", "unlink", "rmdir"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def source(pristine: Make) -> Path:
    return pristine("text", "partial", shards=2)


class Failing:
    """Calls through but for one call, counted from 0; what it does then, `fail` says."""

    def __init__(self, function: Callable[..., Any], at: int | None, fail: Callable[[], Any]) -> None:
        self.function, self.at, self.fail, self.calls = function, at, fail, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.at is not None and self.calls == self.at + 1:
            return self.fail()
        return self.function(*args, **kwargs)


def run_with(
    kind: str, at: int | None, run: Callable[[], object], fail: Callable[[], Any] | None = None
) -> tuple[BaseException | None, int]:
    """(what `run` raised when call number `at` failed, how often it was called)."""
    owner, name, code = CALLS[kind]

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    failing = Failing(getattr(owner, name), at, fail or refuse)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(owner, name, failing)
        try:
            run()
        except Exception as e:
            return e, failing.calls
    return None, failing.calls


@pytest.mark.parametrize("how", ["new", "overwrite", "hardlink"])
@pytest.mark.parametrize("kind", CALLS)
def test_whichever_call_fails_nothing_is_lost(
    source: Path,
    tmp_path: Path,
    kind: str,
    how: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if how != "new" and kind in SAME_EVERYWHERE and not EVERY_CALL:
        pytest.skip("BNBFIX_EVERY_CALL tries it")
    if how == "hardlink":
        source = pristine_with_a_clean_shard(source, tmp_path_factory.mktemp("clean"))
    out, before = tmp_path / "out", tree(source)

    def fresh() -> None:
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        if how == "overwrite":
            out.mkdir()
            (out / "old.txt").write_bytes(OLD["old.txt"])

    def run() -> None:
        bnbfix.repair(
            source, out, vllm="0.22.1", device="cpu", overwrite=how == "overwrite", hardlink=how == "hardlink"
        )

    fresh()
    run()
    right = tree(out)
    fresh()
    _, calls = run_with(kind, None, run)
    assert calls or (kind, how) not in {("link", "hardlink"), ("rename", "new"), ("rmdir", "overwrite")}
    if not calls:
        pytest.skip(f"a repair of this kind never calls {kind}")
    outcomes = {"error": 0, "right": 0}
    for at in range(calls) if EVERY_CALL or calls <= 12 else sorted({0, calls // 2, calls - 1}):
        fresh()
        error, _ = run_with(kind, at, run)
        assert tree(source) == before
        if error is None:
            assert tree(out) == right, f"call {at} of {kind}"
            outcomes["right"] += 1
            continue
        assert isinstance(error, (OutputError, InputError)), (at, error)
        assert os.strerror(CALLS[kind][2]) in str(error), (at, error)
        assert (tree(out) if out.exists() else {}) == (OLD if how == "overwrite" else {}), f"call {at} of {kind}"
        outcomes["error"] += 1
        run()
        assert tree(out) == right
        assert [p.name for p in tmp_path.iterdir()] == ["out"], "the next run leaves nothing else"
    assert kind in HARMLESS or outcomes["error"] > 0
    if EVERY_CALL:
        with capsys.disabled():
            print(f"\n{kind}, {how}: {calls} calls, each failed once: {outcomes}")


@pytest.mark.parametrize("answer", [0, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_kernel_that_does_not_copy_ranges_is_replaced_by_reads_and_writes(
    source: Path, tmp_path: Path, answer: int
) -> None:
    def refuse() -> int:
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    bnbfix.repair(source, tmp_path / "one", vllm="0.22.1", device="cpu")
    for at in (0, 1, 5):
        error, calls = run_with(
            "copy_file_range", at, lambda: bnbfix.repair(source, tmp_path / "two", vllm="0.22.1", device="cpu"), refuse
        )
        assert (error, calls > at) == (None, True)
        assert tree(tmp_path / "one") == tree(tmp_path / "two")
        shutil.rmtree(tmp_path / "two")


def test_a_link_to_another_file_system_is_a_copy(source: Path, tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    source = pristine_with_a_clean_shard(source, tmp_path)
    linked = bnbfix.repair(source, tmp_path / "a", vllm="0.22.1", device="cpu", hardlink=True)
    assert linked.linked
    error, calls = run_with(
        "link", 0, lambda: bnbfix.repair(source, tmp_path / "b", vllm="0.22.1", device="cpu", hardlink=True), refuse
    )
    assert (error, calls) == (None, 1)
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert a.pop("bnbfix.json") != b.pop("bnbfix.json")
    assert a == b


def pristine_with_a_clean_shard(source: Path, tmp_path: Path) -> Path:
    """The same checkpoint, its embeddings in a shard of their own, which no repair touches."""
    import json

    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(source, tmp_path / "source"))
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    name = next(n for n in index["weight_map"] if n.endswith("embed_tokens.weight"))
    shard = copy / index["weight_map"][name]
    tensors = load_file(shard)
    save_file({name: tensors.pop(name)}, copy / "embeddings.safetensors", {"format": "pt"})
    save_file(tensors, shard, {"format": "pt"})
    index["weight_map"][name] = "embeddings.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def test_hard_links_are_verified_against_the_source(source: Path, tmp_path: Path) -> None:
    source = pristine_with_a_clean_shard(source, tmp_path)
    result = bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu", hardlink=True)
    assert result.linked == ("embeddings.safetensors",) and "embeddings.safetensors" not in result.files
    assert (tmp_path / "out" / "embeddings.safetensors").samefile(source / "embeddings.safetensors")
    assert bnbfix.verify(tmp_path / "out", source).ok and bnbfix.verify(tmp_path / "out").ok
    copied = bnbfix.repair(source, tmp_path / "copied", vllm="0.22.1", device="cpu")
    assert copied.linked == () and "embeddings.safetensors" in copied.files
    (tmp_path / "out" / "embeddings.safetensors").unlink()
    assert [p.message for p in bnbfix.verify(tmp_path / "out").problems] != []
    data = bytearray((source / "embeddings.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "embeddings.safetensors").write_bytes(data)
    assert [p.file for p in bnbfix.verify(tmp_path / "out", source).problems] == ["embeddings.safetensors"]


def test_a_second_repair_to_one_destination_refuses(source: Path, tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def meanwhile(n: int) -> None:
        if not refused:
            with pytest.raises(UsageError, match="another repair is writing there") as caught:
                bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu")
            refused.append(caught.value)

    bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu", progress=meanwhile)
    assert len(refused) == 1
    bnbfix.repair(source, tmp_path / "clean", vllm="0.22.1", device="cpu")
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")


@pytest.mark.parametrize("change", ["other plan", "other source", "spoilt file", "spoilt journal"])
def test_what_an_interrupted_run_left_is_kept_only_where_it_fits(checkpoint: Make, tmp_path: Path, change: str) -> None:
    source, target = checkpoint("dense31b", "partial", shards=2), "0.22.1"
    left = 2

    def interrupt(n: int) -> None:
        nonlocal left
        if (tmp_path / ".out.bnbfix-partial" / ".bnbfix-journal").read_text().count("\n") > left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnbfix.repair(source, tmp_path / "out", vllm=target, device="cpu", progress=interrupt)
    staging = tmp_path / ".out.bnbfix-partial"
    names = [p.name for p in staging.iterdir() if p.name != ".bnbfix-journal"]
    assert names
    first = next(n for n in names if n in (staging / ".bnbfix-journal").read_text())
    if change == "other plan":
        target = "portable"
    elif change == "other source":
        os.utime(source / "config.json", (1, 1))
    elif change == "spoilt file":
        data = bytearray((staging / first).read_bytes())
        data[-1] ^= 1
        (staging / first).write_bytes(data)
    else:
        (staging / ".bnbfix-journal").write_bytes(b'\xff{"plan"')
    result = bnbfix.repair(source, tmp_path / "out", vllm=target, device="cpu")
    assert first not in result.kept
    clean = bnbfix.repair(source, tmp_path / "clean", vllm=target, device="cpu")
    assert clean.kept == () and tree(tmp_path / "out") == tree(tmp_path / "clean")


@pytest.mark.parametrize("moment", ["while it is written", "before the end"])
@pytest.mark.parametrize("change", ["replaced", "touched", "shortened", "removed"])
def test_a_source_that_changes_is_noticed(checkpoint: Make, tmp_path: Path, change: str, moment: str) -> None:
    source = checkpoint("dense31b", "partial", shards=2)
    victim = source / "model-00001-of-00002.safetensors"
    seen = 0

    def meddle(n: int) -> None:
        nonlocal seen
        seen += 1
        if seen != (1 if moment == "while it is written" else 12):
            return
        data = victim.read_bytes()
        if change == "replaced":
            (source / "new").write_bytes(data)
            (source / "new").rename(victim)
        elif change == "touched":
            os.utime(victim, (1, 1))
        elif change == "shortened":
            victim.write_bytes(data[: len(data) // 2])
        else:
            victim.unlink()

    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors"):
        bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu", progress=meddle)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.bnbfix-partial").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_up(pristine: Make, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnbfix.writer.write.check_space", lambda plan, out, stream: None)  # filled later
    source = pristine("dense31b", "partial", shards=2)
    with pytest.raises(OutputError, match="No space left on device"):
        bnbfix.repair(source, tiny_disk / "out", vllm="0.22.1", device="cpu")
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_is_read_only(source: Path, tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(OutputError, match=r"not enough disk|Read-only file system"):
        bnbfix.repair(source, tiny_disk / "out", vllm="0.22.1", device="cpu")


@pytest.mark.parametrize(("signal", "code"), [("INT", 130), ("TERM", 143)])
def test_a_signal_stops_a_repair_and_says_what_was_kept(source: Path, tmp_path: Path, signal: str, code: int) -> None:
    # The script slows each write down, so that the signal comes in the middle.
    script = (
        "import os, signal, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a job in a shell's background
        "from bnbfix.cli import main as cli\nfrom bnbfix.writer import syscalls\n"
        "write_all, seen = syscalls.write_all, []\n"
        "def slow(fd, data, at):\n"
        "    seen.append(1)\n"
        f"    if len(seen) == 3: os.kill(os.getpid(), signal.SIG{signal})\n"
        "    time.sleep(0.01)\n"
        "    write_all(fd, data, at)\n"
        "syscalls.write_all = slow\n"
        "cli.main()\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "repair",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--vllm",
        "0.22.1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: interrupted; {tmp_path / 'out'} was not written")
    assert not (tmp_path / "out").exists()
    result = bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu")
    assert result.written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_commands_that_are_killed_or_interrupted_lose_nothing() -> None:
    command = [sys.executable, str(HERE / "kill.py"), "--kills", "5", "--interrupts", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 losses, 0 half outputs, 0 processes left") == 2


def test_modes_match_the_umask(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu")
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert modes == {0o640} and (tmp_path / "out").stat().st_mode & 0o777 == 0o750
