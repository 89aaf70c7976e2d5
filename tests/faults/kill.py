#!/usr/bin/env python3
"""Kills and interrupts commands at random moments and looks at what is left.

    python tests/faults/kill.py [--kills 200] [--interrupts 100] [--seed N] [--python PYTHON-WITH-VLLM]

Repairs of folders, with downloads and with pushes, and scans with dry loads, each in a process of its own. After every
SIGKILL or SIGINT: the source is untouched; the destination is absent (or what it was, with --overwrite) or complete; no
process is left; the Hub has no commit, or a whole one. After a SIGINT the exit code is 130, or that of a command that
had ended. What is left stays for the next run, which resumes from it; one in five runs to its end, and must give the
same bytes as an undisturbed one. Ends with status 1 at the first loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

LET_THROUGH = 5  # one in so many runs is not killed
LASTS = 30.0  # seconds after which a run that was interrupted hangs
STARTS = 20.0  # seconds that a start of Python may take on a loaded machine
OLD = {"old.txt": b"old"}
MARK = "BNBFIX_KILL_RUN"  # in the environment of every process of a run
REPO, PUSHED = "org/source", "me/pushed-"
TOKEN = "hf_OnlyForTheHub"
SHARES = {"repair": 4, "download": 3, "push": 2, "dry load": 1}  # of ten kills
SERVER = """
import sys, time
from pathlib import Path
from tests.support.hub_server import FakeHub
hub = FakeHub(Path(sys.argv[1]))
hub.add("org/source", Path(sys.argv[2]))
hub.fault("slow")
print(hub.url, flush=True)
time.sleep(1e6)
"""
MAKE = """
import sys, tiny_gemma4
from pathlib import Path
tiny_gemma4.make(Path(sys.argv[1]), "dense31b", "partial", shards=4)
"""
WORKER = """#!{python}
import os, sys, time
sys.path.insert(0, os.getcwd())
from bnbfix_worker.parent import watch_parent
watch_parent()
import json
found = {{"versions": {{"vllm": "0.32.0"}}, "error": None, "at": []}}
for answer in sys.argv[5::2]:
    if sys.argv[3] == "dry_load":
        if os.fork() == 0:
            time.sleep(600)
        time.sleep(1)
    with open(answer, "w") as f:
        json.dump(found, f)
"""


class Loss(Exception):
    """Something that must not happen did."""


def expect(condition: bool, words: str) -> None:
    """Raises Loss unless the condition holds; `assert` could be switched off."""
    if not condition:
        raise Loss(words)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def left_over(run: str) -> list[str]:
    """The command lines of the processes of a run that are still there."""
    mark, found = f"{MARK}={run}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@dataclass
class Place:
    """Where everything is."""

    work: Path
    source: Path
    hub: str
    python: str

    @property
    def out(self) -> Path:
        return self.work / "out"

    def command(self, what: str, run: str, overwrite: bool) -> list[str]:
        """The arguments of a command to kill."""
        if what == "dry load":
            return ["scan", str(self.source), "--dry-load", "--python", self.python, "--exit-zero"]
        source = str(self.source) if what == "repair" else REPO
        more = ["--overwrite"] if overwrite else []
        more += ["--push-to", PUSHED + run] if what == "push" else []
        return ["repair", source, "--out", str(self.out), "--vllm", "portable", "--device", "cpu", *more]

    def start(self, what: str, run: str, *, overwrite: bool = False) -> subprocess.Popen[str]:
        """Starts a command; its cache is empty unless it is run again."""
        env = os.environ | {
            MARK: run,
            "HF_ENDPOINT": self.hub,
            "HF_HOME": str(self.work / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
        }
        start = "import signal; signal.signal(2, signal.default_int_handler); from bnbfix.cli.main import main; "
        command = [sys.executable, "-c", f"{start}print('-', flush=True); main()", *self.command(what, run, overwrite)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # what is killed is the command, not the import
        return process

    def pushed(self, run: str) -> set[str]:
        """The files of the repo that a run pushed to."""
        try:
            with urllib.request.urlopen(f"{self.hub}/api/models/{PUSHED}{run}") as answer:
                return {f["rfilename"] for f in json.load(answer)["siblings"]}
        except OSError:
            return set()


def check(place: Place, run: str, before: dict[str, bytes], clean: dict[str, bytes], old: dict[str, bytes]) -> str:
    """Says what a run left; raises Loss when it is not what it may be."""
    expect(tree(place.source) == before, "the source changed")
    blobs = place.work / "home" / "hub"
    for file in blobs.rglob("snapshots/*/*"):
        expect(file.read_bytes() == before[file.name], f"the cache has half of {file.name}")
    expect(place.pushed(run) in (set(), set(clean)), "half a push")
    there = tree(place.out) if place.out.exists() else {}
    aside, staging = place.work / ".out.bnbfix-old", place.work / ".out.bnbfix-partial"
    if same(there, clean):
        return "published"
    # Between two renames, where the system cannot swap, the next run renames the old output back.
    expect(there == old or (not there and tree(aside) == old), f"half an output: {sorted(there)}")
    return "staging" if staging.exists() else "nothing yet"


def same(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Are outputs equal but for where their source was?"""
    if set(one) != set(other):
        return False
    keys = ("source", "record_sha256")
    records = [json.loads(files["bnbfix.json"]) for files in (one, other)]
    records = [{k: v for k, v in r.items() if k not in keys} for r in records]
    return records[0] == records[1] and all(one[n] == other[n] for n in one if n != "bnbfix.json")


def kill(place: Place, what: str, number: int, count: int, rng: random.Random) -> tuple[Counter[str], list[float]]:
    """Sends a signal to `count` runs, and returns what was left, and the seconds that each took to stop."""
    numbers = itertools.count()
    before, seen, stops = tree(place.source), Counter[str](), list[float]()
    begin = time.perf_counter()
    finish(place.start("repair", "first"))
    clean = tree(place.out)
    shutil.rmtree(place.out)
    begin = time.perf_counter()
    finish(place.start(what, "timed"))
    lasts, done, overwrite = time.perf_counter() - begin, 0, False
    reset(place)
    while done < count:
        run, let_through = f"{os.getpid()}-{number}-{next(numbers)}", rng.randrange(LET_THROUGH) == 0
        process = place.start(what, run, overwrite=overwrite)
        if not let_through:
            time.sleep(rng.uniform(0, lasts))
            process.send_signal(number)
            begin = time.perf_counter()
        try:
            _, err = process.communicate(timeout=LASTS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Loss(f"{what}: it goes on") from None
        if not let_through:
            done += 1
            stops.append(time.perf_counter() - begin)
        expect("Traceback" not in err, f"{what}: a traceback\n{err}")
        # -2: the signal came while Python itself ended, after the command.
        expect(
            process.returncode in ((0,) if let_through else (0, -9, 130, -2)), f"{what}: {process.returncode}, {err}"
        )
        wait_for_end(run, f"{what}: a process is left")
        left = check(place, run, before, clean, OLD if overwrite else {})
        ended = "ended before" if process.returncode == 0 else "killed" if number == signal.SIGKILL else "interrupted"
        seen[f"{what}: {'let through' if let_through else ended}, {left}"] += 1
        expect(process.returncode != 0 or what == "dry load" or left == "published", f"{what}: no output, but status 0")
        if left == "published":
            reset(place)
            if overwrite := rng.random() < 0.5:
                place.out.mkdir()
                (place.out / "old.txt").write_bytes(OLD["old.txt"])
    reset(place)
    return seen, stops


def wait_for_end(run: str, words: str) -> None:
    """Waits for the processes of a run: one that has just started looks for its parent once Python runs in it."""
    deadline = time.monotonic() + STARTS
    while left := left_over(run):
        expect(time.monotonic() < deadline, f"{words}: {left}")
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for a run that must end well."""
    _, err = process.communicate(timeout=300)
    expect(process.returncode == 0, err)


def reset(place: Place) -> None:
    """Deletes what runs left, but for what is published: the next begins anew."""
    for path in place.work.iterdir():
        shutil.rmtree(path)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--interrupts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--python", help="dry loads ask its vLLM; default: a script that takes its place")
    parser.add_argument("--only", choices=SHARES, help="only this command")
    a = parser.parse_args()
    print(f"seed {a.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(a.seed)
        worker, env = folder / "python", os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2])}
        worker.write_text(WORKER.format(python=sys.executable))
        worker.chmod(0o755)
        for part in ("work", "uploads"):
            (folder / part).mkdir()
        subprocess.run([sys.executable, "-c", MAKE, folder / "source"], env=env, check=True, capture_output=True)
        command = [sys.executable, "-c", SERVER, folder / "uploads", folder / "source"]
        server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        place = Place(folder / "work", folder / "source", server.stdout.readline().strip(), a.python or str(worker))
        try:
            run_all(place, {signal.SIGKILL: a.kills, signal.SIGINT: a.interrupts}, a.only, rng)
        except Loss as e:
            print(f"loss: {e}")
            return 1
        finally:
            server.kill()
    return 0


def run_all(place: Place, counts: dict[int, int], only: str | None, rng: random.Random) -> None:
    """Every command with every signal, and the figures."""
    for number, count in counts.items():
        seen, stops = Counter[str](), list[float]()
        for what, share in {only: 10}.items() if only else SHARES.items():
            found, took = kill(place, what, number, -(-count * share // 10), rng)
            seen, stops = seen + found, stops + took
        for words, times in seen.most_common():
            print(f"{times:5} {words}")
        if stops:
            print(f"{len(stops)} times {signal.Signals(number).name}: 0 losses, 0 half outputs, 0 processes left")
            print(f"seconds to stop: median {statistics.median(stops):.2f}, most {max(stops):.2f}")


if __name__ == "__main__":
    sys.exit(main())
