"""Holds what a scan says of damaged checkpoints against a dry load: never "loads" where vLLM refuses.

    python tests/conformance/mutations.py --count 10 --releases 0.22.1,0.27.1,0.32.0 --work WORK

In each of four shapes of Gemma4: a tensor lost, one renamed, one added, one reshaped, --count times each, by --seed.
The checkpoints load before. Exits with 1 where the scan promises more than vLLM keeps; lists where it is too strict.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from cells import SECONDS, WAY_RELEASES, environment, make, make_parser
from dry_loads import open_folder, verdict

import bnbfix
from bnbfix.checkpoint.checkpoint import Checkpoint
from bnbfix.engines.targets import resolve_target
from bnbfix.engines.vllm.live import LiveVllm
from bnbfix.rules.rule import AFTER_LOADING, Code, Severity
from bnbfix.rules.scan import scan_checkpoint
from tests.support.mutations import MUTATIONS

SHAPES = ("dense31b", "e4b", "moe26b", "unified12b")


def repaired(work: Path, shape: str, release: str) -> Path | None:
    """A checkpoint of this shape that loads in the release; None where there is none."""
    out = work / f"{shape}-for-{release}"
    if not out.exists():
        try:
            result = bnbfix.repair(make(work, f"{shape}-skip"), out, release, device="cpu")
        except bnbfix.Unrepairable:
            return None
        return out if result.written else make(work, f"{shape}-skip")
    return out


def said(checkpoint: Checkpoint, release: str) -> Severity:
    """What a scan says of a load, without what was after loading before the mutation."""
    result = scan_checkpoint(checkpoint, resolve_target(release))
    later = AFTER_LOADING - {Code.PARTLY_FILLED}
    return max((f.severity for f in result.findings if f.counts and f.code not in later), default=Severity.LOADS)


def main() -> None:
    """See the module's docstring."""
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    broken = 0
    for release in a.releases.split(",") if a.releases else WAY_RELEASES:
        choose = random.Random(a.seed)
        sources = [s for shape in SHAPES if (s := repaired(a.work, shape, release)) is not None]
        cases = [
            mutate(open_folder(source), choose) for source in sources for mutate in MUTATIONS for _ in range(a.count)
        ]
        live = LiveVllm(str(environment(release, a.venvs or a.work / "venvs")), seconds=SECONDS * 6)
        answers = live.dry_load([checkpoint for _, checkpoint in cases])
        too_good, too_strict = [], []
        for (words, checkpoint), answer in zip(cases, answers, strict=True):
            here, there = said(checkpoint, release), verdict(answer)
            line = f"{checkpoint.source.name}: {words}: {here}, vLLM {there} {answer.error or ''}"[:300]
            if here < there:
                too_good.append(line)
            elif here > there:
                too_strict.append(line)
        counts = f"{len(too_good)} said to be better than they are, {len(too_strict)} worse"
        print(f"{release}: {len(cases)} mutations of {len(sources)} checkpoints, {counts}")
        print(*(f"  NO {line}" for line in too_good), sep="\n")
        print(*(f"  too strict: {line}" for line in too_strict), sep="\n", flush=True)
        broken += len(too_good)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
