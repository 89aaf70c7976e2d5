"""SIGINT and SIGTERM while something is waited for that does not come: the command ends all the same, and says so."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make
from tests.support.fake_vllm import fake_python
from tests.support.hub import Hub, Ran
from tests.support.hub_server import TOKEN, Fault
from tests.support.processes import wait_for, wait_for_end

PATIENCE = 25  # seconds; what these tests hold is held until the command has ended
TARGET = ("--vllm", "0.22.1", "--device", "cpu")
NUMBERS = count()
# SIGINT is ignored in a job in a shell's background, and so in its children.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
MAIN = "from bnbfix.cli.main import main\nmain()\n"
PATIENT = "import bnbfix.cli.signals\nbnbfix.cli.signals.SECONDS = 3600\n"  # however slow the machine is, it may finish
SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)


@pytest.fixture
def held(hub: Hub) -> Iterator[Hub]:
    """The Hub; what it holds is let go in the end, whatever happens."""
    yield hub
    hub.server.released.set()


@pytest.fixture
def source(pristine: Make) -> Path:
    return pristine("dense31b", "skip", shards=4)


@pytest.fixture
def repo(hub: Hub, source: Path) -> str:
    name = f"org/interrupted-{next(NUMBERS)}"
    hub.server.add(name, source)
    return name


def interrupt(
    environment: dict[str, str],
    *arguments: object,
    when: Callable[[], bool],
    number: int = signal.SIGINT,
    times: int = 1,
    script: str = "",
) -> Ran:
    """Runs the command line after a script, and sends it a signal, or several, when `when` says so."""
    command = [sys.executable, "-c", START + script + MAIN, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: when() or process.poll() is not None, "its start")
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.1)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    return Ran(process.returncode, out, err)


def fetching(hub: Hub, file: str) -> Callable[[], bool]:
    """Is a whole file being fetched? A scan reads ranges."""
    return lambda: any(s.origin == "cdn" and file in s.path and s.range is None for s in hub.server.seen)


def used(fault: Fault) -> Callable[[], bool]:
    before = fault.times
    return lambda: fault.times < before


def incomplete(hub: Hub, repo: str) -> list[Path]:
    return list((hub.home / "hub" / f"models--{repo.replace('/', '--')}").rglob("*.incomplete"))


@SIGNALS
def test_a_download_ends_and_says_what_stays(held: Hub, repo: str, tmp_path: Path, number: int, code: int) -> None:
    held.server.fault("holds", "model-00003")
    snapshot = held.home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots"
    begun = fetching(held, "model-00003")
    done = interrupt(
        held.environment,
        *("repair", repo, "--out", tmp_path / "out", *TARGET),
        when=lambda: begun() and len(list(snapshot.glob("*/model-*"))) == 3,
        number=number,
    )
    assert (done.code, done.out) == (code, "")
    error, hint, _ = done.err.splitlines()
    assert error == f"error: interrupted; {tmp_path / 'out'} was not written"
    assert "files (0.0 GB) are downloaded and stay in " + str(held.home / "hub") in hint
    assert os.listdir(tmp_path) == [] and len(list(snapshot.glob("*/model-*"))) == 3


def test_a_download_that_trickles_ends_and_leaves_no_part(held: Hub, repo: str, tmp_path: Path) -> None:
    held.server.fault("trickles", "model-00003")
    begun = fetching(held, "model-00003")
    done = interrupt(held.environment, "repair", repo, "--out", tmp_path / "out", *TARGET, when=begun)
    assert (done.code, done.out) == (130, "") and done.err.startswith("error: interrupted"), done.err
    assert incomplete(held, repo) == []


def test_a_scan_of_many_models_ends(held: Hub, repo: str, tmp_path: Path) -> None:
    fault = held.server.fault("holds ranges", repo)
    models = [*(f"{repo}-{n}" for n in range(3)), repo, "org/last"]
    done = interrupt(held.environment, "scan", *models, when=used(fault))
    assert done.code == 130 and done.err.startswith("error: interrupted\n")


def test_a_listing_ends(held: Hub, repo: str) -> None:
    fault = held.server.fault("holds", "/api/models/", origin="hub")
    done = interrupt(held.environment, "scan", repo, when=used(fault), number=signal.SIGTERM)
    assert (done.code, done.out) == (143, "")


def test_a_verification_that_downloads_ends(held: Hub, source: Path, repo: str, tmp_path: Path) -> None:
    bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu")
    held.server.fault("holds", "model-00004")
    begun = fetching(held, "model-00004")
    done = interrupt(held.environment, "verify", tmp_path / "out", "--source", repo, when=begun)
    assert (done.code, done.out) == (130, "") and "are downloaded and stay in" in done.err


def test_a_push_ends_without_a_commit(held: Hub, checkpoint: Make, tmp_path: Path) -> None:
    source, to = checkpoint("dense31b", "skip", shards=2), f"me/interrupted-{next(NUMBERS)}"
    (source / "weights.safetensors").write_bytes(os.urandom(64))  # new to this Hub
    shutil.move(source / "weights.safetensors", source / "notes.safetensors.txt")
    fault = held.server.fault("holds", "/upload/")
    done = interrupt(
        held.environment | {"HF_TOKEN": TOKEN},
        *("repair", source, "--out", tmp_path / "out", *TARGET, "--push-to", to),
        when=used(fault),
        script=PATIENT,
    )
    assert done.code == 130 and f"hf upload {to} {tmp_path / 'out'}" in done.err, done.err
    assert bnbfix.verify(tmp_path / "out", source).ok
    held.server.released.set()
    time.sleep(0.5)
    assert list(held.server.repos[to].commits.values()) == [{}]


def test_a_pull_request_of_a_config_ends_without_a_commit(held: Hub, checkpoint: Make) -> None:
    repo = f"org/interrupted-{next(NUMBERS)}"
    held.server.add(repo, checkpoint("dense31b", "skip", shards=2))
    fault = held.server.fault("holds", "/commit/", origin="hub")
    command = ("repair", repo, "--vllm", "0.32.0", "--create-pr")
    done = interrupt(held.environment | {"HF_TOKEN": TOKEN}, *command, when=used(fault), script=PATIENT)
    assert (done.code, done.out) == (130, "")
    assert done.err == f"error: interrupted; nothing was pushed\n  {shlex.join(('bnbfix', *command))}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["INT", "KILL"])
@pytest.mark.parametrize("wait", ["time", "__import__('ctypes').PyDLL(None)"], ids=["Python", "C"])
def test_a_dry_load_leaves_no_process(source: Path, tmp_path: Path, number: int, wait: str) -> None:
    if "PyDLL" in wait and sys.platform != "linux":
        pytest.skip("only Linux ends a process that waits in C, as an import of torch does")
    pids = tmp_path / "pids"
    python = fake_python(
        tmp_path,
        does="sys.path.insert(0, os.getcwd()); from bnbfix_worker.parent import watch_parent; watch_parent(); "
        f"child = os.fork(); open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n'); {wait}.sleep(600)",
    )
    done = interrupt(
        os.environ | {"TMPDIR": str(tmp_path)},  # what a killed one leaves goes with it
        *("scan", source, "--dry-load", "--python", python),
        when=lambda: pids.exists() and pids.read_text().count("\n") == 2,
        number=number,
    )
    assert done.code == (130 if number == signal.SIGINT else -signal.SIGKILL), done.err
    wait_for_end([int(pid) for pid in pids.read_text().split()])


# A wait in native code that no signal interrupts, as for a name server: a lock that is taken twice. The sign is made by
# another thread, which has its turn only once this one has left Python for that wait.
DEADLOCK = """
import ctypes, socket, sys, threading
def never(*args, **kwargs):
    print("waiting", file=sys.stderr, flush=True)
    lock, libc, turn = ctypes.create_string_buffer(128), ctypes.CDLL(None), threading.Lock()
    libc.pthread_mutex_lock(lock)
    turn.acquire()
    threading.Thread(target=lambda: turn.acquire() and open({sign!r}, "w").close(), daemon=True).start()
    sys.setswitchinterval(3600)
    turn.release()
    libc.pthread_mutex_lock(lock)
socket.getaddrinfo = never
"""


@SIGNALS
def test_a_wait_that_no_signal_interrupts_ends(hub: Hub, tmp_path: Path, number: int, code: int) -> None:
    sign = tmp_path / "waiting"
    script = DEADLOCK.format(sign=str(sign))
    done = interrupt(hub.environment, "scan", "org/model", when=sign.exists, number=number, script=script)
    assert (done.code, done.out) == (code, "")
    assert done.err == "waiting\nerror: interrupted; what was not finished is left to the next run\n"


def test_a_second_signal_ends_at_once(hub: Hub, tmp_path: Path) -> None:
    sign = tmp_path / "waiting"
    script = PATIENT + DEADLOCK.format(sign=str(sign))
    done = interrupt(hub.environment, "scan", "org/model", when=sign.exists, times=2, script=script)
    assert done.code == 130


IGNORED = """
import os, bnbfix.checkpoint.source as source
signal.signal(signal.SIGINT, signal.SIG_IGN)
opened = source.LocalSource.open
def interrupted(path):
    os.kill(os.getpid(), signal.SIGINT)
    return opened(path)
source.LocalSource.open = interrupted
"""


def test_a_signal_that_is_ignored_stays_so(source: Path) -> None:
    done = interrupt(dict(os.environ), "scan", source, "--exit-zero", when=lambda: True, times=0, script=IGNORED)
    assert (done.code, done.err) == (0, "")


UNREADABLE = """
import socket
def fail(self, *args):
    raise ConnectionResetError(104, "Connection reset by peer")
socket.socket.recv = fail
"""


def test_without_a_watcher_of_signals_nothing_else_changes(source: Path) -> None:
    done = interrupt(dict(os.environ), "scan", source, "--exit-zero", when=lambda: True, times=0, script=UNREADABLE)
    assert (done.code, done.err) == (0, "")
