#!/usr/bin/env python3
"""Kills repairs at random moments and looks at what is left.

    python tests/faults/kill.py [--kills 200] [--seed N]

After every SIGKILL: the source is untouched; the destination is absent (or what it was, with --overwrite) or complete.
What is left stays for the next repair, which resumes from it. Every few kills one repair is not killed, and must give
the same bytes as an undisturbed one. Ends with status 1 at the first loss.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "examples")]

import bitsandbytes  # noqa: F401  # before the fork: what is killed is the repair, not the import
import tiny_gemma4

import bnbfix

LET_THROUGH = 5  # one in so many repairs is not killed
OLD = {"old.txt": b"old"}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def repair(source: Path, out: Path, overwrite: bool) -> None:
    """What is killed: a scan and a repair."""
    bnbfix.scan(source, vllm="portable")
    bnbfix.repair(source, out, vllm="portable", device="cpu", overwrite=overwrite)


def in_child(function: Callable[[], None], kill_after: float | None) -> bool:
    """Runs a function in a forked process; True when it ended before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as e:  # the parent must not run on here
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, "a repair failed before it was killed"
    return not os.WIFSIGNALED(status)


def kill(source: Path, work: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kills repairs of `source` below `work`, and counts what was left each time. Raises AssertionError at a loss."""
    before, out = tree(source), work / "out"
    in_child(lambda: repair(source, work / "clean", False), None)
    begin = time.perf_counter()
    in_child(lambda: repair(source, work / "timed", False), None)
    lasts = time.perf_counter() - begin
    clean = tree(work / "clean")
    assert tree(work / "timed") == clean
    seen: Counter[str] = Counter()
    overwrite, done = False, 0
    while done < kills:
        let_through = rng.randrange(LET_THROUGH) == 0
        after = None if let_through else rng.uniform(0, 1.1 * lasts)
        ended = in_child(partial(repair, source, out, overwrite), after)
        done += not ended
        assert tree(source) == before, "the source changed"
        there = tree(out) if out.exists() else {}
        staging, aside = work / ".out.bnbfix-partial", work / ".out.bnbfix-old"
        if ended or there == clean:
            assert there == clean, "a finished repair differs from an undisturbed one"
            seen["let through" if ended else "published, then killed"] += 1
            shutil.rmtree(out)
            overwrite = rng.random() < 0.5
            if overwrite:
                out.mkdir()
                (out / "old.txt").write_bytes(OLD["old.txt"])
            continue
        old = OLD if overwrite else {}
        # Between two renames, where the system cannot swap, the next run renames the old output back.
        assert there == old or (not there and overwrite and tree(aside) == OLD), f"half an output: {sorted(there)}"
        finished = len(tree(staging)) if staging.exists() else -1
        seen["nothing yet" if finished < 0 else f"staging, {'files' if finished else 'nothing'} in it"] += 1
    in_child(lambda: repair(source, out, overwrite), None)
    assert tree(out) == clean
    assert sorted(p.name for p in work.iterdir()) == ["clean", "out", "timed"], "something is left next to the output"
    return seen


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    a = parser.parse_args()
    print(f"seed {a.seed}")
    with tempfile.TemporaryDirectory() as folder:
        work, source = Path(folder) / "work", Path(folder) / "source"
        work.mkdir()
        in_child(lambda: print(tiny_gemma4.make(source, "dense31b", "partial", shards=4).name), None)
        seen = kill(source, work, a.kills, random.Random(a.seed))
    for what, count in seen.most_common():
        print(f"{count:5} {what}")
    print(f"{a.kills} kills, 0 losses, 0 half outputs")


if __name__ == "__main__":
    main()
