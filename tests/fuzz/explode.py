#!/usr/bin/env python3
"""Scans and plans every bomb of bombs.py in little memory, and prints how long each took.

    python tests/fuzz/explode.py [--scale 1] [--seconds 120] [--memory 2000]

Ends with 1 when one of them took longer, took more memory, or ended in anything but a BnbfixError.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent)]

from bnbfix.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from bnbfix.engines.targets import resolve_target  # noqa: E402
from bnbfix.errors import BnbfixError  # noqa: E402
from bnbfix.planner.plan_repair import plan_checkpoint  # noqa: E402
from bnbfix.rules.scan import scan_checkpoint  # noqa: E402
from tests.fuzz.bombs import Files, bombs  # noqa: E402
from tests.fuzz.memory import MemorySource  # noqa: E402


def ending(files: Files) -> str:
    """How a scan and a plan of these files end, in a few words."""
    target = resolve_target("portable")
    try:
        scan_checkpoint(open_checkpoint(MemorySource(files)), target)
        return f"planned, {len(plan_checkpoint(MemorySource(files), target).edits):,} edits"
    except BnbfixError as e:
        return f"{type(e).__name__}: {str(e)[:100]}"


def main() -> int:
    """Runs all; 1 when a limit was broken."""
    parser = argparse.ArgumentParser(description="Scans and plans files that are long to read.")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=120.0, help="that each may take")
    parser.add_argument("--memory", type=int, default=2000, help="MB that all of it may take")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (args.memory << 20, args.memory << 20))
    wrong = 0
    for name, make in bombs(args.scale).items():
        files = make()
        began = time.process_time()
        try:
            said = ending(files)
        except (Exception, MemoryError) as e:
            said, wrong = f"CRASH {type(e).__name__}: {str(e)[:200]}", wrong + 1
        took = time.process_time() - began
        wrong += took > args.seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{name:<28} {sum(map(len, files.values())):>11,} bytes {took:6.1f} s, peak {peak:,} MB: {said}", flush=True
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
