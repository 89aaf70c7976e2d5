#!/usr/bin/env python3
"""Fails every system call of a small repair once, with and without the Hub, and looks at what comes of it.

    python tests/faults/every_call.py [--hub] [--every N]

Needs Linux and a C compiler: a library that is loaded before the C library counts calls, and fails one in each run.
The end must be the same bytes and status 0, or status 2 with an error in words, an untouched source and no output. What
is wrong else is printed: a traceback, another status, half an output, a run without an end. Ends with 1 then.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from tests.faults.kill import SERVER, tree

LIMIT = 60.0  # seconds for a run
LIBRARY = "BNBFIX_FAILING_CALLS"


def build(folder: Path) -> Path:
    """Compiles the library."""
    out = folder / "failing_calls.so"
    command = ["cc", "-O1", "-w", "-fno-builtin", "-shared", "-fPIC", "-o", out, HERE / "failing_calls.c", "-ldl"]
    subprocess.run(command, check=True)
    return out


def run_in_child(library: ctypes.CDLL, which: int, arguments: list[str], log: Path) -> tuple[int | None, int, str]:
    """Forks, runs the command line with one failing call; returns its status, the calls it made and which failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.argv = ["bnbfix", *arguments]
            library.fault_arm(which)
            try:
                from bnbfix.cli.main import main

                main()
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 98
            except BaseException:
                library.fault_disarm()
                import traceback

                traceback.print_exc()
            library.fault_disarm()
            os.write(writer, f"{library.fault_count()} {library.fault_name().decode()}".encode())
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writer)
    found = b""
    if select.select([reader], [], [], LIMIT)[0]:
        found = os.read(reader, 100)
    os.close(reader)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended or not found:
            break
        time.sleep(0.05)
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
        return None, 0, ""
    count, _, name = found.decode().partition(" ")
    return os.waitstatus_to_exitcode(status), int(count or 0), name


def fail_each(place: Path, source: Path, model: str, every: int) -> int:
    """Runs a repair again and again; the number of ends that must not be."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    library.fault_name.restype, library.fault_count.restype = ctypes.c_char_p, ctypes.c_long
    library.fault_arm.argtypes = [ctypes.c_long]
    out, log = place / "out", place / "log"
    command = ["repair", model, "--out", str(out), "--vllm", "0.22.1", "--device", "cpu"]
    home = Path(os.environ["HF_HOME"])

    def run(which: int) -> tuple[int | None, int, str]:
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(home, ignore_errors=True)
        return run_in_child(library, which, command, log)

    status, calls, _ = run(-1)
    assert status == 0, log.read_text()
    before, right = tree(source), tree(out)
    ends, names, wrong = Counter[str](), Counter[str](), 0
    for which in range(0, calls, every):
        status, _, name = run(which)
        said, there = log.read_text(errors="replace"), tree(out) if out.exists() else {}
        problems = []
        if status not in (0, 2):
            problems.append(f"status {status}")
        if "Traceback" in said or "Exception ignored" in said:
            problems.append("a traceback")
        if status == 0 and there != right:
            problems.append("status 0 without the right output")
        if status != 0 and there and there != right:
            problems.append("half an output")
        if tree(source) != before:
            problems.append("the source changed")
        ends["same bytes" if status == 0 else "words"] += not problems
        names[name or "none: fewer calls this time"] += 1
        if problems:
            wrong += 1
            print(f"call {which}, {name}: {', '.join(problems)}\n{said[-1500:]}", flush=True)
    print(f"{model}: {sum(names.values())} of {calls} calls failed once each: {dict(ends)}, {wrong} wrong ends")
    print(", ".join(f"{name} {n}" for name, n in names.most_common()))
    return wrong


def warm_up(arguments: list[str]) -> None:
    """Runs a command before the forks, so that all modules are imported: what fails is the repair, not Python."""
    from bnbfix.cli.main import main

    sys.argv = ["bnbfix", *arguments]
    try:
        main()
    except SystemExit as e:
        assert e.code == 0, e.code


def preload(arguments: list[str]) -> int:
    """Runs this script again with the library loaded first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build(folder)
        for part in ("work", "uploads"):
            (folder / part).mkdir()
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        make = "import sys, tiny_gemma4\nfrom pathlib import Path\n"
        make += "tiny_gemma4.make(Path(sys.argv[1]), 'text', 'partial', shards=2)"
        subprocess.run([sys.executable, "-c", make, folder / "source"], env=env, check=True, capture_output=True)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER.replace('hub.fault("slow")', ""), folder / "uploads", folder / "source"],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        env |= {"HF_ENDPOINT": server.stdout.readline().strip(), LIBRARY: str(library), "LD_PRELOAD": str(library)}
        try:
            return subprocess.run(
                [sys.executable, __file__, *arguments, "--in", folder], env=env, check=False
            ).returncode
        finally:
            server.kill()


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", action="store_true", help="repair from the Hub: its reads and sockets fail too")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth call")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.folder is None:
        return preload(sys.argv[1:])
    from bnbfix.hub import client

    client.FIRST_WAIT = 0.01
    sleep: Callable[[float], None] = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    source = a.folder / "source"
    warm_up(["repair", "org/source", "--out", str(a.folder / "warm"), "--vllm", "0.22.1", "--device", "cpu"])
    return min(1, fail_each(a.folder / "work", source, "org/source" if a.hub else str(source), a.every))


if __name__ == "__main__":
    sys.exit(main())
