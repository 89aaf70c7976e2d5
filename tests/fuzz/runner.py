"""Runs cases one after the other, each under a time limit, and counts how they ended."""

from __future__ import annotations

import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from tests.fuzz.cases import case
from tests.fuzz.judges import Disagreement

LIMIT = 10.0  # CPU seconds for a case; the slowest takes a tenth of one


class Hang(BaseException):
    """A case ran into the time limit."""


@dataclass
class Figures:
    """How cases ended, by surface; and what went wrong, in words."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __add__(self, other: Figures) -> Figures:
        failures = [*self.failures, *other.failures]
        return Figures(self.ends + other.ends, failures, max(self.slowest, other.slowest))

    def count(self, *ends: str) -> int:
        """Cases that ended so."""
        return sum(n for (_, end), n in self.ends.items() if end in ends)

    def by_surface(self) -> dict[str, Counter[str]]:
        """Ends of each surface."""
        out: dict[str, Counter[str]] = {}
        for (surface, end), n in self.ends.items():
            out.setdefault(surface, Counter())[end] += n
        return out

    def lines(self) -> Iterator[str]:
        """The figures for people."""
        for surface, ends in sorted(self.by_surface().items()):
            counts = ", ".join(f"{end} {n:,}" for end, n in sorted(ends.items()))
            yield f"  {surface:<18} {sum(ends.values()):>9,}: {counts}"
        yield (
            f"mutations {sum(self.ends.values()):,}, accepted {self.count('accepted'):,}, refused "
            f"{self.count('refused', 'stricter'):,} (where the library is laxer: {self.count('stricter'):,}), crashes "
            f"{self.count('crash')}, hangs {self.count('hang')}, oracle disagreements {self.count('disagreement')}; "
            f"slowest {self.slowest:.2f} s"
        )


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang inside when the block takes longer, in CPU time: a machine may stop for a while. Main thread only."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_cases(seed: int, numbers: Iterable[int]) -> Figures:
    """Runs the cases of a seed with these numbers."""
    figures = Figures()
    for number in numbers:
        surface, run = case(seed, number)
        began = time.perf_counter()
        try:
            with limited(LIMIT):
                end = run()
        except Hang:
            end = "hang"
            figures.failures.append(f"seed {seed}, case {number}, {surface}: hang")
        except Exception as e:  # whatever it is, it is the finding
            end = "disagreement" if isinstance(e, Disagreement) else "crash"
            trace = "".join(traceback.format_exception(e))[-3000:]
            figures.failures.append(f"seed {seed}, case {number}, {surface}: {end}\n{trace}")
        figures.ends[surface, end] += 1
        figures.slowest = max(figures.slowest, time.perf_counter() - began)
    return figures
