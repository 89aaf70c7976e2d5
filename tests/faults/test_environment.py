"""Environments in which something is missing: the work goes as far as it can, and what stops it is said in words."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import bnbfix
from bnbfix.errors import EngineError, InputError, OutputError
from bnbfix.kernels.threads import count_threads
from tests.faults.test_faults import run_with, tree
from tests.support.build import Make
from tests.support.command_line import Cli
from tests.support.fake_vllm import fake_python


@pytest.fixture
def source(pristine: Make) -> Path:
    return pristine("text", "partial", shards=2)


def shell(*arguments: object, streams: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a shell that redirects its streams."""
    command = shlex.join([sys.executable, "-m", "bnbfix", *map(str, arguments)])
    return subprocess.run(["bash", "-c", f"{command} {streams}"], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_repair_without_streams_writes_the_same_bytes(source: Path, tmp_path: Path, streams: str) -> None:
    command = ["repair", source, "--vllm", "0.22.1", "--device", "cpu"]
    done = shell(*command, "--out", tmp_path / "out", streams=streams)
    assert done.returncode == 0, done.stderr
    bnbfix.repair(source, tmp_path / "right", "0.22.1", device="cpu")
    assert tree(tmp_path / "out") == tree(tmp_path / "right")


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "code"), [(["--vllm", "0.22.1"], 1), (["--exit-zero"], 0), (["--from", "-"], 2), (["nowhere"], 2)]
)
def test_a_scan_without_streams_has_the_same_exit_code(
    source: Path, streams: str, arguments: list[str], code: int
) -> None:
    models = [] if "--from" in arguments else [source]
    done = shell("scan", *models, *arguments, streams=streams)
    assert done.returncode == code and "Traceback" not in done.stderr


FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
"""
NO_NULL_DEVICE = """
import os
os.close(0)
def refuse(*args):
    raise OSError(2, "No such file or directory")
os.open = refuse
"""


def run_after(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line after a script, once Python has started and imported it."""
    command = [sys.executable, "-c", f"from bnbfix.cli.main import main\n{script}main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("files", range(3, 11))
def test_few_open_files_end_in_words_or_the_right_bytes(source: Path, tmp_path: Path, files: int) -> None:
    command = ["repair", source, "--out", tmp_path / "out", "--vllm", "0.22.1", "--device", "cpu"]
    done = run_after(FEW_FILES.format(files=files), *command)
    if done.returncode != 0:
        assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out").exists()
        assert done.stderr.startswith("error: ") and "Too many open files" in done.stderr.splitlines()[0]
        assert shell(*command, streams="").returncode == 0
    bnbfix.repair(source, tmp_path / "right", "0.22.1", device="cpu")
    assert tree(tmp_path / "out") == tree(tmp_path / "right")


def test_too_few_open_files_to_import_name_their_limit(source: Path) -> None:
    done = run_after(FEW_FILES.format(files=3), "scan", source)
    assert done.returncode == 2 and "  Is it limited (ulimit -n)?" in done.stderr.splitlines()


def test_too_few_open_files_to_ask_a_vllm_are_one_error(source: Path, tmp_path: Path) -> None:
    done = run_after(FEW_FILES.format(files=6), "scan", source, "--dry-load", "--python", fake_python(tmp_path))
    error = "error: vLLM: cannot be asked ([Errno 24] Too many open files: "
    assert done.returncode == 2 and done.stderr.startswith(error), done.stderr


def test_without_a_null_device_closed_streams_are_an_error(source: Path) -> None:
    done = run_after(NO_NULL_DEVICE, "scan", source)
    error = "error: a standard stream cannot be used (No such file or directory)"
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, error)


def test_an_error_that_cannot_be_printed_keeps_its_exit_code() -> None:
    assert shell("scan", "nowhere", streams="2>/dev/full").returncode == 2


@pytest.mark.parametrize("command", ["scan", "repair"])
def test_a_result_that_cannot_be_printed_is_an_error_in_one_line(source: Path, tmp_path: Path, command: str) -> None:
    more = ["--out", tmp_path / "out", "--device", "cpu"] if command == "repair" else []
    done = shell(command, source, "--format", "json", "--vllm", "0.22.1", *more, streams=">/dev/full")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: input/output: No space left on device")


@pytest.mark.parametrize("threads", range(8))
def test_without_threads_nothing_is_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    start, left = threading.Thread.start, [threads]

    def refuse(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    opened = os.listdir("/dev/fd")
    try:
        bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu")
    except OutputError as e:
        assert "no thread can be started" in str(e) and "ulimit" in str(e.hint)
        assert os.listdir(tmp_path) == []
    else:
        assert threads > 2
    monkeypatch.setattr(threading.Thread, "start", start)
    for thread in threading.enumerate():
        if thread.name.startswith("bnbfix"):
            thread.join(60)
            assert not thread.is_alive(), thread
    assert len(os.listdir("/dev/fd")) <= len(opened)


def test_kernels_use_as_many_threads_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    start, left = threading.Thread.start, [2]

    def refuse(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert (count_threads(1), count_threads(8), count_threads(8)) == (1, 3, 1)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert count_threads(4) == 4


@pytest.mark.parametrize("error", [MemoryError(), ImportError("libx.so: failed to map segment")], ids=["memory", "map"])
def test_memory_that_runs_out_is_said_in_words(
    run: Cli, source: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("bnbfix.report.outcome.scan_checkpoint", fail)
    done = run("scan", source)
    assert done.code == 2 and ("memory" in done.error or "cannot be imported" in done.error)


def test_without_a_temporary_folder_vllm_is_not_asked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(EngineError, match=r"cannot be asked.*No usable temporary directory") as caught:
        bnbfix.scan(source, dry_load=bnbfix.LiveVllm(fake_python(tmp_path)))
    assert "TMPDIR" in str(caught.value.hint)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("call", ["open", "pwrite", "read back", "fsync", "rename"])
def test_errors_of_file_systems_are_said_in_words(source: Path, tmp_path: Path, call: str, code: int) -> None:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    error, calls = run_with(call, 0, lambda: bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu"), refuse)
    assert calls and isinstance(error, (OutputError, InputError)), error
    assert os.strerror(code) in str(error) and not (tmp_path / "out").exists()


def test_a_file_that_may_not_grow_is_an_error(source: Path, tmp_path: Path) -> None:
    done = shell(
        "repair", source, "--out", tmp_path / "out", "--device", "cpu", "--vllm", "0.22.1", streams=""
    ).returncode
    limited = (
        f"ulimit -f 8; {sys.executable} -m bnbfix repair {source} --out {tmp_path / 'two'} --device cpu --vllm 0.22.1"
    )
    small = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)
    assert (done, small.returncode) == (0, 2) and "File too large" in small.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("home", [None, "/nowhere", "/proc/self"])
def test_a_repair_needs_no_home(source: Path, tmp_path: Path, home: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"HOME": home} if home else {}
    command = [
        sys.executable,
        "-m",
        "bnbfix",
        "repair",
        source,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--vllm",
        "0.22.1",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
