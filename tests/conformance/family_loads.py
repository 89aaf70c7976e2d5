"""Holds `scan` of every family against dry loads by real vLLM, before and after a repair.

    python tests/conformance/family_loads.py                              0.22.1, 0.27.1 and 0.32.0, every class
    python tests/conformance/family_loads.py --all                        every release of pins.json
    python tests/conformance/family_loads.py --classes LlamaForCausalLM --releases 0.32.0
    python tests/conformance/family_loads.py --real --transformers        load all for real, and in transformers

Checkpoints are make_family.py's: of each class, every form. What is compared is dry_loads.py's. Exits as run.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cells import ROOT, SECONDS, choose_releases, environment, make_parser
from dry_loads import compare, open_folder, verdict, words, write_repair
from families import FAMILIES
from make_family import FORMS, LISTS
from run import run_in
from survey import SHAPES_RELEASE

from bnbfix.engines.targets import find_range
from bnbfix.engines.vllm.live import DryLoad, LiveVllm
from bnbfix.engines.vllm.recorded import expect
from bnbfix.models.detect import read_model

ROWS = str.maketrans("qkv", "012")  # parts of qkv_proj in the order of its rows; others sort by their names
CLASSES = tuple(name for name in FAMILIES if not name.startswith("Gemma4"))  # whose cells are run.py's


def make(work: Path, name: str, python: Path) -> list[Path]:
    """The checkpoints of a class, made once."""
    folder, family = work / "families" / name, FAMILIES[name]
    forms = (*FORMS, LISTS) if family.expert_lists or family.numbered_experts else FORMS
    missing = [form for form in forms if not (folder / form / "config.json").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"config": family.configs[0], "out": str(folder), "forms": missing, "renames": family.inner_names}
        asked["numbered"] = family.numbered_experts
        (folder / "in.json").write_text(json.dumps(asked))
        subprocess.run([str(python), str(Path(__file__).with_name("make_family.py")), folder / "in.json"], check=False)
    if preprocessor := family.preprocessor:
        for form in forms:
            (folder / form / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return [path for form in forms if (path := folder / form) and (path / "config.json").exists()]


def list_sources(original: Path, release: str) -> dict[str, list[str]]:
    """The tensors that make up each of vLLM's parameters, in the order of its rows, as the profile has them."""
    checkpoint, found = open_folder(original), find_range(release)
    expectation = expect(read_model(checkpoint.config), found) if found else None
    parts: dict[str, list[tuple[tuple[int, str], str]]] = {}
    for name in checkpoint.tensors if expectation else ():
        if (place := expectation.place(name)) is not None:
            for parameter, part in place.fills:
                number, _, matrix = part.rpartition(",")
                parts.setdefault(parameter, []).append(((int(number or 0), matrix.translate(ROWS)), name))
    return {parameter: [name for _, name in sorted(found)] for parameter, found in parts.items()}


def compare_real(
    python: Path, release: str, folders: Sequence[tuple[Path, Path]], answers: Sequence[DryLoad]
) -> list[str]:
    """Where loads of the bytes disagree with dry loads, or give other weights than the originals'."""
    jobs = [
        {"folder": str(folder), "original": str(original), "sources": list_sources(original, release)}
        for folder, original in folders
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump(jobs, f)
        f.flush()
        lines = run_in(python, Path(__file__).with_name("real_load.py"), f.name).stdout.splitlines()
    faults, total = [], Counter[str]()
    for real, answer in zip([json.loads(line) for line in lines if line.startswith("{")], answers, strict=True):
        said = (answer.error is None, answer.quantized, len(answer.unbound), len(answer.requantized))
        seen = (real["error"] is None, *(real.get(key) for key in ("quantized", "unbound", "requantized")))
        if said[0] != seen[0] or (said[0] and said != seen):
            faults.append(f"{real['folder']}: a dry load says {said}, a real one {seen} {real['error'] or ''}")
        if answer.ok and real.get("wrong"):
            faults.append(f"{real['folder']}: {len(real['wrong'])} parameters hold other values: {real['wrong'][:3]}")
        if answer.ok:
            total += Counter({key: real.get(key, 0) for key in ("exact", "rounded", "permuted")})
    counts = ", ".join(f"{count} {key}" for key, count in total.items())
    print(f"{release}: {len(jobs)} real loads; parameters of those that load: {counts}")
    return faults


@dataclass(frozen=True)
class Found:
    """What a release did with the forms of a class."""

    words: str
    faults: list[str]


def load_release(
    release: str, python: Path, sources: dict[str, list[Path]], referee: Path, options: argparse.Namespace
) -> dict[str, Found]:
    """Dry-loads every class's checkpoints in one vLLM process, and in another what repairs write, by class."""
    live = LiveVllm(str(python), seconds=SECONDS * 6)
    everything = [source for folders in sources.values() for source in folders]
    before = dict(zip(everything, live.dry_load([open_folder(s) for s in everything]), strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        outs = {s: Path(scratch) / s.parent.name / s.name for s in everything}
        for out in outs.values():
            out.parent.mkdir(exist_ok=True)
        written = [s for s in everything if write_repair(s, outs[s], release)]
        repaired = live.dry_load([open_folder(outs[s]) for s in written]) if written else []
        after = dict(zip(written, repaired, strict=True))
        real = []
        if options.real:
            originals = {s: s.with_name("bf16") for s in everything}
            real += compare_real(python, release, list(originals.items()), list(before.values()))
            real += compare_real(python, release, [(outs[s], originals[s]) for s in written], repaired)
        if options.transformers and written:
            pairs = [path for s in written for path in (s, outs[s])]
            command = [referee, Path(__file__).with_name("same_outputs.py"), *pairs]
            subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    out = {}
    for name, folders in sources.items():
        faults = [f"{s.name}: {fault}" for s in folders for fault in compare(s, release, before[s])]
        faults += [f"{s.name}: repaired, {words(after[s])}" for s in folders if s in after and not after[s].ok]
        faults += [fault for fault in real if f"/{name}/" in fault]
        seen = " ".join(f"{s.name}={verdict(before[s])}" for s in folders)
        out[name] = Found(f"{seen}; repaired: {' '.join(s.name for s in folders if s in after)}", faults)
    return out


def main() -> None:
    """See the module's docstring."""
    parser = make_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="every release of pins.json")
    parser.add_argument("--classes", help="comma-separated")
    parser.add_argument("--real", action="store_true", help="load everything for real as well")
    parser.add_argument("--transformers", action="store_true", help="and compare what transformers makes of both")
    a = parser.parse_args()
    releases = choose_releases(a)
    venvs = a.venvs or a.work / "venvs"
    names = a.classes.split(",") if a.classes else CLASSES
    referee = environment(SHAPES_RELEASE, venvs)
    sources = {name: make(a.work, name, referee) for name in names}
    bad = 0
    for release in releases:
        for name, found in load_release(release, environment(release, venvs), sources, referee, a).items():
            line = f"{release} {name}: {found.words}; {len(found.faults)} disagreements"
            print(line, *(f"  NO {fault}" for fault in found.faults), sep="\n", flush=True)
            bad += len(found.faults)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
