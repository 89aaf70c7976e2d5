"""Judges bnbfix by real vLLM: does each checkpoint do in each release what `scan` says, before a repair and after?

    python tests/conformance/run.py                       every release of pins.json, every cell: hours
    python tests/conformance/run.py --boundaries          every release, about fifteen cells: two hours
    python tests/conformance/run.py --smoke               0.22.1 and the newest, cells that cover each code once
    python tests/conformance/run.py --releases 0.27.1 --cells dense31b-all,moe26b-skip
    python tests/conformance/run.py --results tests/conformance/RESULTS.md

It makes its checkpoints and, one release after another, its virtual environments below --work. Cells that
WORK/cells.jsonl tells of are not run again: a run that was cut off goes on, and a new one needs a new --work. The exit
status is 0 only when every prediction is right and every repaired checkpoint loads and answers right; 75 when an
environment could not be built, so that nothing was judged in it.
"""

from __future__ import annotations

import argparse
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

import tiny_gemma4
import venvs

import bnbfix

FAMILIES = ("dense31b", "e4b", "e4b-noshared", "e2b", "moe26b", "unified12b")
QUANTS = ("all", "skip", "mixed", "ragged", "fp4", "single", "storage-bf16", "int8")
NEW_CONFIG = "+per-layer-config"  # a checkpoint whose config.json has the newer form
CELLS = [f"{f}-{q}" for f in FAMILIES for q in QUANTS] + [f"dense31b-skip{NEW_CONFIG}", f"e4b-all{NEW_CONFIG}"]
SMOKE = [
    "dense31b-all", "dense31b-ragged", "dense31b-storage-bf16", "e4b-noshared-skip", "moe26b-skip", "unified12b-all",
    f"dense31b-skip{NEW_CONFIG}",
]  # fmt: skip
BOUNDARIES = [
    *SMOKE, "dense31b-skip", "dense31b-fp4", "dense31b-int8", "e4b-all", "e4b-single", "e2b-mixed", "moe26b-all",
    "unified12b-skip",
]  # fmt: skip
SMOKE_RELEASES = ["0.22.1", "0.32.0"]
REFERENCE = "0.27.1"  # any release whose pinned transformers is 5.13 or newer serves for the right answers
SECONDS = 600
OWN_ERROR = 1.5  # times what a release's outputs are off in full precision: still no fault of the checkpoint


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
    before: Seen
    predicted: str
    repair: str  # what was done: repaired for the release, --bf16, nothing to do, or why nothing can be done
    after: Seen | None
    predicted_after: str | None

    @property
    def ok(self) -> bool:
        """Was scan right both times, and is the repaired checkpoint right?"""
        after = self.after is None or (self.after.verdict == "loads" and self.predicted_after in ("loads", None))
        return self.predicted_right and after

    @property
    def predicted_right(self) -> bool:
        """Degraded means right beside some releases of transformers, so it is right beside the pinned ones."""
        said = "loads" if self.predicted == "degraded" else self.predicted
        return self.before.verdict == said


def make(work: Path, name: str) -> Path:
    """The checkpoint of a cell."""
    folder = work / "checkpoints" / name
    if not (folder / "config.json").exists():
        family, quant = split(name)
        tiny_gemma4.make(folder, family, quant, per_layer_config=name.endswith(NEW_CONFIG))
    return folder


def split(name: str) -> tuple[str, str]:
    """(family, quant) of a cell's name."""
    name = name.removesuffix(NEW_CONFIG)
    family = max((f for f in FAMILIES if name.startswith(f + "-")), key=len)
    return family, name[len(family) + 1 :]


def reference(work: Path, folder: Path, python: Path) -> Path:
    """The right answers for a folder: of itself dequantized, run by transformers; once for each set of bytes."""
    full = work / "bf16" / f"{folder.parent.name}-{folder.name}"
    if not full.exists() and "quantization_config" in json.loads((folder / "config.json").read_text()):
        bnbfix.repair(folder, full, vllm=REFERENCE, bf16=True)
    source = full if full.exists() else folder
    digest = hashlib.sha256()
    for file in [source / "config.json", *sorted(source.glob("*.safetensors"))]:
        digest.update(file.read_bytes())
    out = work / "references" / f"{digest.hexdigest()}.npz"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        run_in(python, HERE / "reference.py", str(source), str(out))
    return out


def run_in(python: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A script in a release's environment, with this checkout's bnbfix in reach."""
    ours = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    environment = os.environ | ours
    done = subprocess.run(
        [str(python), "-W", "ignore", *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done


def ask(python: Path, folder: Path, truth: Path, answers: Path) -> dict[str, Any] | None:
    """What judge.py says of a folder; None when it takes too long."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        try:
            run_in(python, HERE / "judge.py", folder, answer, "--weights", truth, "--reference", answers)
        except subprocess.TimeoutExpired:
            return None
        return dict(json.loads(answer.read_text()))


def own_error(work: Path, release: str, python: Path, name: str, truth: Path, referee: Path) -> dict[str, float]:
    """By how much the release's outputs are off for the same model in full precision, by prompt: quantization is not
    the cause.
    """
    kept = work / "originals" / f"{release}-{name}.json"
    if not kept.exists():
        full = work / "originals" / release / name
        bnbfix.repair(make(work, name), full, vllm=release, bf16=True, overwrite=True)
        r = ask(python, full, truth, reference(work, full, referee))
        if r is None or r["error"]:
            raise RuntimeError(f"vLLM {release} does not run {name} in full precision: {r and r['error']}")
        kept.write_text(json.dumps({k: o["mean"] for k, o in r["outputs"].items()}))
    return dict(json.loads(kept.read_text()))


def judge(work: Path, release: str, python: Path, folder: Path, truth: Path, referee: Path) -> Seen:
    """Loads a folder in the engine; `truth` is its bf16 original."""
    r = ask(python, folder, truth, reference(work, folder, referee))
    if r is None:
        return Seen("fails", f"no answer in {SECONDS} s")
    if r["error"]:
        words = " ".join(r["error"].split())[:100] + (f" ({r['at'][-1]})" if r["error"].endswith(": ") else "")
        return Seen("fails", words)
    w, outputs = r["weights"], r["outputs"]
    own = ""
    if not w["wrong"] and not w["requantized"] and not r["ok"]:
        errors = own_error(work, release, python, folder.name, truth, referee)
        for name, o in outputs.items():
            if not o["ok"] and name != "red against blue" and o["mean"] <= OWN_ERROR * errors[name]:
                o["ok"], own = True, f"{own}, {name} {o['mean']} as in full precision {errors[name]}"
        r["ok"] = all(o["ok"] for o in outputs.values())
    off = [f"{k} {o['mean']}>{o['allowed']}" for k, o in outputs.items() if not o["ok"]]
    off += [f"{len(w[k])} {k}" for k in ("wrong", "requantized") if w[k]]
    shares = [o["mean"] / o["allowed"] for k, o in outputs.items() if k != "red against blue"]
    within = max((s for s in shares if s <= 1), default=0)
    good = f"{w['exact']} exact, {w['rounded']} 4 bit, outputs within {within:.0%} of the tolerance{own}"
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


def read_log(log: Path) -> dict[tuple[str, str], Cell]:
    """The cells of earlier runs in the same --work, by release and checkpoint."""
    cells = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        row = json.loads(line)
        row |= {k: Seen(**row[k]) for k in ("before", "after") if row[k]}
        cells[row["release"], row["checkpoint"]] = Cell(**row)
    return cells


def table(cells: list[Cell]) -> str:
    """The result as markdown."""
    lines = [
        "| vLLM | checkpoint | before | predicted | repair | after | |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        after = f"{c.after.verdict}: {c.after.why}" if c.after else ""
        cell = (c.release, c.checkpoint, f"{c.before.verdict}: {c.before.why}", c.predicted, c.repair, after)
        lines.append("| " + " | ".join(x.replace("|", "/") for x in cell) + f" | {'ok' if c.ok else '**no**'} |")
    return "\n".join(lines)


def summary(cells: list[Cell]) -> str:
    """Counts, and the versions behind them."""
    repaired = [c for c in cells if c.after]
    rows = [
        f"{len(cells)} cells; {sum(c.predicted_right for c in cells)} predicted right; "
        f"{sum(c.before.verdict == 'loads' for c in cells)} right as transformers wrote them; "
        f"{sum(c.ok for c in repaired)} of {len(repaired)} right after a repair.",
        "",
    ]
    for release in dict.fromkeys(c.release for c in cells):
        pins = venvs.PINS["releases"][release]
        words = ", ".join(f"{k} {v}" for k, v in pins.items()).replace("plugin", "vllm-bnb-plugin")
        rows.append(f"- vLLM {release} (CPU build): {words}, bitsandbytes {venvs.PINS['bitsandbytes']}")
    return "\n".join(rows)


def environment(release: str, folder: Path) -> Path:
    """A release's interpreter. Ends with 75 where it cannot be built: no network, no disk."""
    try:
        return venvs.build(release, folder / release)
    except (subprocess.CalledProcessError, OSError) as e:
        print(f"the environment of vLLM {release} could not be built: {e}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--releases", help="comma-separated; default: all of pins.json")
    parser.add_argument("--cells", help="comma-separated; default: all")
    parser.add_argument("--smoke", action="store_true", help="two releases, a few cells")
    parser.add_argument("--boundaries", action="store_true", help="every release, some cells")
    parser.add_argument("--venvs", type=Path, help="where environments are or go; default: below --work")
    parser.add_argument("--results", type=Path, help="write the table to this markdown file")
    a = parser.parse_args()
    releases = a.releases.split(",") if a.releases else SMOKE_RELEASES if a.smoke else list(venvs.PINS["releases"])
    names = a.cells.split(",") if a.cells else SMOKE if a.smoke else BOUNDARIES if a.boundaries else CELLS
    folder = a.venvs or a.work / "venvs"
    newest = releases[-1] if releases[-1] in SMOKE_RELEASES or a.smoke else REFERENCE
    referee = environment(newest, folder)
    log = a.work / "cells.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = read_log(log)
    cells: list[Cell] = []
    for release in releases:
        for name in names:
            if (release, name) in done:
                cells.append(done[release, name])
                continue
            python = environment(release, folder)
            cell = run_cell(a.work, release, name, python, referee)
            cells.append(cell)
            with log.open("a") as f:
                print(json.dumps(asdict(cell)), file=f)
            after = (
                f" -> {cell.repair} -> {cell.after.verdict}: {cell.after.why}" if cell.after else f" ({cell.repair})"
            )
            words = f"{cell.before.verdict}: {cell.before.why} (scan: {cell.predicted}){after}"
            print(f"{'ok ' if cell.ok else 'NO '} {release} {name}: {words}", flush=True)
    text = f"{summary(cells)}\n\n{table(cells)}\n"
    if a.results:
        head = f"# Conformance, {datetime.date.today()}\n\nMade by `python tests/conformance/run.py`.\n\n"
        a.results.write_text(head + text)
    bad = [c for c in cells if not c.ok]
    print(f"\n{summary(cells)}\n\n{len(cells) - len(bad)} passed, {len(bad)} failed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
