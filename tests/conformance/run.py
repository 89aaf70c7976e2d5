"""Judges bnbfix by real vLLM: does each checkpoint do in each release what `scan` says, before a repair and after?

    python tests/conformance/run.py                       every release of pins.json: every cell by dry load, about
                                                          fifteen in the real engine: two hours
    python tests/conformance/run.py --real all            every cell in the real engine: many hours
    python tests/conformance/run.py --real none --load 20 dry loads; 20 of them against real loads, without a prompt
    python tests/conformance/run.py --smoke               0.22.1 and the newest, cells that cover each code once
    python tests/conformance/run.py --bf16                what `repair --bf16` writes, in a vLLM without bitsandbytes
                                                          and in transformers
    python tests/conformance/run.py --partial-groups quantize   what `repair --partial-groups quantize` writes
    python tests/conformance/run.py --releases 0.27.1 --cells dense31b-all,moe26b-skip
    python tests/conformance/run.py --results tests/conformance/RESULTS.md

It makes its checkpoints and, one release after another, its virtual environments below --work. Cells
recorded in WORK/cells.jsonl are not run again: an interrupted run resumes, and a new one needs a new --work. Dry loads
are made again. Where the real engine does otherwise than a dry load, the forward pass is why: `scan` knows, and the
end of the output lists it. The exit status is 0 only when every prediction is right and every repaired checkpoint loads
and answers right; 75 when an environment could not be built, so that nothing was judged in it. OMP_NUM_THREADS
(default 2) is every engine's.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(HERE)]

import numpy as np
import venvs
from cells import (
    BOUNDARIES,
    CELLS,
    FAMILIES,
    SECONDS,
    SMOKE,
    SMOKE_RELEASES,
    WAY_RELEASES,
    environment,
    make,
    make_parser,
    split,
)
from dry_loads import DryCells, load_dry
from judge import TOLERANCE_INT8

import bnbfix

REFERENCE = "0.27.1"  # any release whose pinned transformers is 5.13 or newer serves for the right answers
OWN_ERROR = 1.5  # times what a release's outputs are off in full precision: still no fault of the checkpoint


@dataclass(frozen=True)
class Way:
    """A repair that is asked for by options, in place of the one that bnbfix takes by itself."""

    name: str  # of its log and its folder
    options: dict[str, Any]
    words: str
    cells: list[str]


BF16 = Way(
    "bf16",
    {"bf16": True},
    "--bf16",
    [
        "dense31b-all",
        "dense31b-fp4",
        "dense31b-int8",
        "dense31b-storage-bf16",
        "e4b-mixed",
        "e4b-noshared-single",
        "e2b-all",
        "moe26b-skip",
        "moe26b-fp4",
        "unified12b-all",
    ],
)
PARTIAL_GROUPS = Way(
    "partial-groups",
    {"partial_groups": "quantize"},
    "--partial-groups quantize",
    [f"{family}-partial" for family in FAMILIES],
)


@dataclass(frozen=True)
class Seen:
    """What one engine did with one folder: loads, wrong or fails, in few words why, and the judge's full answer."""

    verdict: str
    why: str


@dataclass(frozen=True)
class Cell:
    """One row of the result."""

    release: str
    checkpoint: str
    before: Seen | None  # None where a Way is judged: the run without one reports it
    predicted: str | None
    repair: str  # what was done: repaired for the release, --bf16, nothing to do, or why nothing can be done
    after: Seen | None
    predicted_after: str | None
    transformers: Seen | None = None  # of --bf16: what transformers makes of it, held against the source

    @property
    def ok(self) -> bool:
        """Was scan right both times, and is the repaired checkpoint right?"""
        after = self.after is None or (self.after.verdict == "loads" and self.predicted_after in ("loads", None))
        return self.predicted_right and after and (self.transformers is None or self.transformers.verdict == "loads")

    @property
    def predicted_right(self) -> bool:
        """Degraded means right with some releases of transformers, so it is right with the pinned ones."""
        if self.before is None:
            return True
        said = "loads" if self.predicted == "degraded" else self.predicted
        return self.before.verdict == said


def quantization(folder: Path) -> dict[str, Any]:
    """A folder's quantization_config; empty where it is in full precision."""
    return dict(json.loads((folder / "config.json").read_text()).get("quantization_config") or {})


def reference(work: Path, folder: Path, python: Path) -> Path:
    """The right answers for a folder: of itself dequantized, run by transformers."""
    full = work / "bf16" / f"{folder.parent.name}-{folder.name}"
    if not full.exists() and quantization(folder):
        bnbfix.repair(folder, full, vllm=REFERENCE, bf16=True)
    return asked_of_transformers(work / "references", full if full.exists() else folder, python)


def asked_of_transformers(answers: Path, folder: Path, python: Path, *options: str) -> Path:
    """What reference.py says of a folder, once for each set of bytes."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.read_bytes())
    out = answers / f"{digest.hexdigest()}.npz"
    if not out.exists():
        answers.mkdir(parents=True, exist_ok=True)
        run_in(python, HERE / "reference.py", folder, out, *options)
    return out


def run_in(python: Path, *command: object, PYTHONPATH: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """A script in a release's environment, with this checkout's bnbfix in reach."""
    paths = [*filter(None, [PYTHONPATH]), str(ROOT), str(HERE)]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | ours | more
    done = subprocess.run(
        [str(python), "-W", "ignore", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done


def ask(python: Path, folder: Path, truth: Path, answers: Path, without_bnb: bool = False) -> dict[str, Any] | None:
    """What judge.py says of a folder; None when it takes too long. `without_bnb`: it cannot dequantize any weight."""
    with tempfile.TemporaryDirectory() as scratch:
        answer, without = Path(scratch) / "answer.json", {}
        if without_bnb:
            (Path(scratch) / "bitsandbytes.py").write_text('raise ImportError("bitsandbytes is kept away")\n')
            without = {"PYTHONPATH": scratch, "VLLM_PLUGINS": ""}
        try:
            run_in(python, HERE / "judge.py", folder, answer, "--weights", truth, "--reference", answers, **without)
        except subprocess.TimeoutExpired:
            return None
        return dict(json.loads(answer.read_text()))


def own_error(work: Path, release: str, python: Path, name: str, truth: Path, referee: Path) -> dict[str, float]:
    """By how much the release's outputs are off for the same model in full precision, by prompt: quantization is not
    the cause.
    """
    kept = work / "originals" / f"{release}-{name}.json"
    if not kept.exists():
        full = make(work, name)
        if quantization(full):
            source, full = full, work / "originals" / release / name
            bnbfix.repair(source, full, vllm=release, bf16=True, overwrite=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        r = ask(python, full, truth, reference(work, full, referee))
        if r is None or r["error"]:
            raise RuntimeError(f"vLLM {release} does not run {name} in full precision: {r and r['error']}")
        kept.write_text(json.dumps({k: o["mean"] for k, o in r["outputs"].items()}))
    return dict(json.loads(kept.read_text()))


def judge(
    work: Path, release: str, python: Path, folder: Path, truth: Path, referee: Path, without_bnb: bool = False
) -> Seen:
    """Loads a folder in the engine; `truth` is its bf16 original."""
    r = ask(python, folder, truth, reference(work, folder, referee), without_bnb)
    if r is None:
        return Seen("fails", f"no answer in {SECONDS} s")
    if without_bnb and r["bnb"]:
        return Seen("wrong", f"it was run with {', '.join(r['bnb'])}")
    if r["error"]:
        words = " ".join(r["error"].split())[:100] + (f" ({r['at'][-1]})" if r["error"].endswith(": ") else "")
        return Seen("fails", words)
    w, outputs = r["weights"], r["outputs"]
    own = ""
    if not w["wrong"] and not w["requantized"] and not r["ok"]:
        compared = folder.name if quantization(folder) else truth.name  # what is in full precision: with its original
        errors = own_error(work, release, python, compared, truth, referee)
        for name, o in outputs.items():
            if not o["ok"] and name != "red against blue" and o["mean"] <= OWN_ERROR * errors[name]:
                o["ok"], own = True, f"{own}, {name} {o['mean']} as in full precision {errors[name]}"
        r["ok"] = all(o["ok"] for o in outputs.values())
    off = [f"{k} {o['mean']}>{o['allowed']}" for k, o in outputs.items() if not o["ok"]]
    off += [f"{len(w[k])} {k}" for k in ("wrong", "requantized") if w[k]]
    shares = [o["mean"] / o["allowed"] for k, o in outputs.items() if k != "red against blue"]
    within = max((s for s in shares if s <= 1), default=0)
    weights = f"{w['exact']} exact, {w['rounded']} 4 bit, {w['quantized']} quantized"
    good = f"{weights}, outputs within {within:.0%} of the tolerance{own}"
    return Seen("loads" if r["ok"] else "wrong", ", ".join(off) or good)


def verdict(folder: Path, release: str) -> str:
    """What scan says."""
    try:
        return bnbfix.scan(folder, vllm=release).verdict
    except bnbfix.NotApplicable:
        return "loads"  # nothing is quantized any more


def run_cell(work: Path, release: str, name: str, python: Path, referee: Path) -> Cell:
    """Before, prediction, repair, after."""
    source = make(work, name)
    truth = make(work, f"{split(name)[0]}-bf16")
    before = judge(work, release, python, source, truth, referee)
    predicted = verdict(source, release)
    out = work / "repaired" / release / name
    how = f"--vllm {release}"
    try:
        result = bnbfix.repair(source, out, vllm=release, overwrite=True)
        if not result.written:
            return Cell(release, name, before, predicted, "nothing to do", None, None)
    except bnbfix.Unrepairable as e:
        how = "--bf16"
        try:
            bnbfix.repair(source, out, vllm=release, bf16=True, overwrite=True)
        except bnbfix.Unrepairable:
            return Cell(release, name, before, predicted, f"cannot be: {e.hint or e}", None, None)
    after = judge(work, release, python, out, truth, referee)
    return Cell(release, name, before, predicted, how, after, verdict(out, release))


def run_way(work: Path, release: str, name: str, python: Path, referee: Path, way: Way) -> Cell:
    """A repair with the options of `way`, and what becomes of it."""
    source, out = make(work, name), work / "repaired" / way.name / release / name
    truth = make(work, f"{split(name)[0]}-bf16")
    try:
        bnbfix.repair(source, out, vllm=release, overwrite=True, **way.options)
    except bnbfix.Unrepairable as e:
        return Cell(release, name, None, None, f"cannot be: {e.hint or e}", None, None)
    after = judge(work, release, python, out, truth, referee, without_bnb=way is BF16)
    elsewhere = in_transformers(work, source, out, referee) if way is BF16 else None
    return Cell(release, name, None, None, f"{way.words} --vllm {release}", after, verdict(out, release), elsewhere)


def in_transformers(work: Path, source: Path, full: Path, python: Path) -> Seen:
    """Is `full` to transformers what the source is, which bitsandbytes dequantizes as it runs?

    Both calculate in bfloat16 with the same kernels, so the same weights give the same bits: no difference is allowed.
    LLM.int8 rounds what goes into each weight too, which is why it has the tolerance that it has in vLLM.
    """
    dequantized, unquantized = (
        np.load(asked_of_transformers(work / "as-saved", folder, python, "--as-saved")) for folder in (source, full)
    )
    noise = np.load(reference(work, full, python))
    factor = TOLERANCE_INT8 if quantization(source)["load_in_8bit"] else 0
    words, right = [], True
    for key in unquantized.files:
        prompt, apart = key.removesuffix(".logp"), np.abs(unquantized[key] - dequantized[key])
        mean, allowed = float(apart.mean()), factor * float(noise[f"{prompt}.noise"])
        right = right and mean <= allowed
        words.append(f"{prompt} {mean:.4f}" + (f" of {allowed:.4f}" if allowed else ""))
    same = all(np.array_equal(unquantized[key], dequantized[key]) for key in unquantized.files)
    prompts = ", ".join(key.removesuffix(".logp") for key in unquantized.files)
    return Seen(
        "loads" if right else "wrong", f"as the source to the last bit ({prompts})" if same else ", ".join(words)
    )


def read_log(log: Path) -> dict[tuple[str, str], Cell]:
    """The cells of earlier runs in the same --work, by release and checkpoint."""
    cells = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        row = json.loads(line)
        row |= {k: Seen(**row[k]) for k in ("before", "after", "transformers") if row.get(k)}
        cells[row["release"], row["checkpoint"]] = Cell(**row)
    return cells


def table(cells: list[Cell]) -> str:
    """The result as markdown, without columns that nothing is in."""
    rows = []
    for c in cells:
        before, after, elsewhere = (f"{s.verdict}: {s.why}" if s else "" for s in (c.before, c.after, c.transformers))
        row = {"vLLM": c.release, "checkpoint": c.checkpoint, "before": before, "predicted": c.predicted or ""}
        row |= {"repair": c.repair, "after": after, "in transformers": elsewhere, "": "ok" if c.ok else "**no**"}
        rows.append({k: v.replace("|", "/") for k, v in row.items()})
    kept = [k for k in rows[0] if any(row[k] for row in rows)]
    lines = [" | ".join(kept), "|".join("---" for _ in kept), *(" | ".join(row[k] for k in kept) for row in rows)]
    return "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))


def summary(cells: list[Cell]) -> str:
    """Counts, and the versions behind them."""
    if not cells:
        return "No cell was run in the engine."
    repaired, found = [c for c in cells if c.after], [c for c in cells if c.before]
    words = [f"{len(cells)} cells"]
    if found:
        words.append(f"{sum(c.predicted_right for c in found)} predicted right")
        words.append(f"{sum(c.before.verdict == 'loads' for c in found if c.before)} right as transformers wrote them")
    words.append(f"{sum(c.ok for c in repaired)} of {len(repaired)} right after a repair")
    if compared := [c.transformers for c in cells if c.transformers]:
        pin = venvs.PINS["releases"][REFERENCE]["transformers"]
        right = sum(s.verdict == "loads" for s in compared)
        words.append(f"{right} of {len(compared)} as the source in transformers {pin}")
    rows = ["; ".join(words) + ".", ""]
    for release in dict.fromkeys(c.release for c in cells):
        pins = venvs.PINS["releases"][release]
        words = ", ".join(f"{k} {v}" for k, v in pins.items()).replace("plugin", "vllm-bnb-plugin")
        rows.append(f"- vLLM {release} (CPU build): {words}, bitsandbytes {venvs.PINS['bitsandbytes']}")
    return "\n".join(rows)


def describe_dry(dry: DryCells) -> str:
    """What was dry-loaded, in a line."""
    loaded = f" ({dry.loaded} against real loads)" if dry.loaded else ""
    return f"{len(dry.answers)} dry loads{loaded}, {dry.repaired} repaired outputs; {len(dry.faults)} disagreements"


def describe_cell(cell: Cell) -> str:
    """A cell in a line."""
    seen = (cell.before, cell.after, cell.transformers)
    before, after, elsewhere = (f"{s.verdict}: {s.why}" if s else "-" for s in seen)
    words = f"{before} (scan: {cell.predicted or '-'}) -> {cell.repair} -> {after}"
    words += f"; transformers: {elsewhere}" if cell.transformers else ""
    return f"{'ok ' if cell.ok else 'NO '} {cell.release} {cell.checkpoint}: {words}"


def main() -> None:
    """See the module's docstring."""
    parser = make_parser(__doc__)
    parser.add_argument("--cells", help="comma-separated; default: all")
    parser.add_argument("--smoke", action="store_true", help="two releases, a few cells")
    parser.add_argument("--real", choices=["boundaries", "all", "none"], default="boundaries", help="cells that run")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="load N cells a release without a prompt")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--bf16", action="store_const", dest="way", const=BF16, help="judge `repair --bf16`")
    ways.add_argument("--partial-groups", choices=["quantize"], help="judge `repair --partial-groups quantize`")
    parser.add_argument("--results", type=Path, help="write the table to this markdown file")
    a = parser.parse_args()
    way: Way | None = PARTIAL_GROUPS if a.partial_groups else a.way
    default = SMOKE_RELEASES if a.smoke else WAY_RELEASES if way else list(venvs.PINS["releases"])
    releases = a.releases.split(",") if a.releases else default
    default = SMOKE if a.smoke else way.cells if way else CELLS
    names = a.cells.split(",") if a.cells else default
    sample = [] if a.real == "none" else names if a.real == "all" or way or a.cells or a.smoke else BOUNDARIES
    folder = a.venvs or a.work / "venvs"
    log = a.work / (f"cells-{way.name}.jsonl" if way else "cells.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    done = read_log(log)
    cells: list[Cell] = []
    faults: list[str] = []
    unlike: list[str] = []
    for release in releases:
        python = environment(release, folder)
        dry = None if way else load_dry(a.work, release, python, names, a.load)
        if dry:
            print(f"{release}: {describe_dry(dry)}", *(f"  NO {fault}" for fault in dry.faults), sep="\n", flush=True)
            faults += dry.faults
        for name in sample:
            if (release, name) not in done:
                newest = releases[-1] if not way and (releases[-1] in SMOKE_RELEASES or a.smoke) else REFERENCE
                common = (a.work, release, name, python, environment(newest, folder))
                done[release, name] = run_way(*common, way) if way else run_cell(*common)
                with log.open("a") as f:
                    print(json.dumps(asdict(done[release, name])), file=f)
            cells.append(done[release, name])
            print(describe_cell(cells[-1]), flush=True)
            if dry and (before := cells[-1].before) and before.verdict != dry.verdict(name):
                unlike.append(f"{release} {name}: {dry.verdict(name)} in a dry load, {before.verdict}: {before.why}")
    if a.results and cells:
        command = f"python tests/conformance/run.py {way.words if way else ''}".rstrip()
        head = f"# Conformance, {datetime.date.today()}\n\nMade by `{command}`.\n\n"
        a.results.write_text(f"{head}{summary(cells)}\n\n{table(cells)}\n")
    if unlike:
        print("\nAfter loading, and so in no dry load:", *unlike, sep="\n  ")
    bad = [c for c in cells if not c.ok]
    print(f"\n{summary(cells)}\n\n{len(cells) - len(bad)} passed, {len(bad)} failed; {len(faults)} faults of dry loads")
    sys.exit(1 if bad or faults else 0)


if __name__ == "__main__":
    main()
