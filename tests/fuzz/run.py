#!/usr/bin/env python3
"""Fuzzes headers, indexes, configs and quant states on demand, and prints the figures.

    python tests/fuzz/run.py --mutations 1000000 [--seed N] [--jobs 2]
    python tests/fuzz/run.py --seed N --case 12345      one case again, with its traceback

Every process may take a gigabyte more than it has when the corpus is made: a case that takes more is a crash.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import secrets
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "examples")]

from tests.fuzz.cases import case, corpus, families  # noqa: E402
from tests.fuzz.runner import Figures, run_cases  # noqa: E402

BATCH = 2000
SHOWN = 20  # failures printed in full; all are counted
MEMORY = 1 << 30  # bytes


def limit_memory() -> None:
    """Bounds what this process may take from here on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def batch(job: tuple[int, int, int]) -> Figures:
    """Cases `first` to `last` of a seed."""
    seed, first, last = job
    return run_cases(seed, range(first, last))


def main() -> int:
    """Runs what the command line asks for; 1 when anything went wrong."""
    parser = argparse.ArgumentParser(description="Fuzzes what bnbfix reads, on demand.")
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="left out: a fresh one, which is printed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--case", type=int, default=None, help="only this one")
    args = parser.parse_args()
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    corpus(), families()  # before the forks
    if args.case is not None:
        print(*case(seed, args.case)[0:1], case(seed, args.case)[1](), sep=": ")
        return 0
    jobs = [(seed, i, min(i + BATCH, args.mutations)) for i in range(0, args.mutations, BATCH)]
    began, total = time.perf_counter(), Figures()
    with multiprocessing.get_context("fork").Pool(args.jobs, limit_memory) as pool:
        for done, figures in enumerate(pool.imap_unordered(batch, jobs), 1):
            for failure in figures.failures[: max(0, SHOWN - len(total.failures))]:
                print(failure, flush=True)
            total += figures
            if done % 25 == 0:
                took = time.perf_counter() - began
                print(f"{done * BATCH:,} mutations in {took:.0f} s", file=sys.stderr, flush=True)
    took = time.perf_counter() - began
    print(*total.lines(), sep="\n")
    print(f"{took:.0f} s with {args.jobs} jobs, {args.mutations / took:,.0f} mutations a second")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
