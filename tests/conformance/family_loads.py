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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cells import SECONDS, WAY_RELEASES, environment
from dry_loads import compare, open_folder, verdict, words, write_repair
from families import FAMILIES
from make_family import FORMS
from survey import SHAPES_RELEASE
from venvs import PINS

from bnbfix.engines.vllm.live import DryLoad, LiveVllm

CLASSES = tuple(name for name in FAMILIES if not name.startswith("Gemma4"))  # whose cells are run.py's


def make(work: Path, name: str, python: Path) -> list[Path]:
    """The checkpoints of a class, made once."""
    folder = work / "families" / name
    missing = [form for form in FORMS if not (folder / form / "config.json").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"config": FAMILIES[name].configs[0], "out": str(folder), "forms": missing}
        (folder / "in.json").write_text(json.dumps(asked))
        subprocess.run([str(python), str(Path(__file__).with_name("make_family.py")), folder / "in.json"], check=False)
    if preprocessor := FAMILIES[name].preprocessor:
        for form in FORMS:
            (folder / form / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return [path for form in FORMS if (path := folder / form) and (path / "config.json").exists()]


def compare_real(python: str, folders: Sequence[Path], answers: Sequence[DryLoad]) -> list[str]:
    """Where dry loads disagree with loads of the bytes."""
    command = [python, str(Path(__file__).with_name("real_load.py")), *map(str, folders)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    faults = []
    for real, answer in zip([json.loads(line) for line in lines if line.startswith("{")], answers, strict=True):
        said = (answer.error is None, answer.quantized, len(answer.unbound), len(answer.requantized))
        seen = (real["error"] is None, *(real.get(key) for key in ("quantized", "unbound", "requantized")))
        if said[0] != seen[0] or (said[0] and said != seen):
            faults.append(f"{real['folder']}: a dry load says {said}, a real one {seen} {real['error'] or ''}")
    return faults


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--venvs", type=Path, help="where environments are or go; default: below --work")
    parser.add_argument("--releases", help="comma-separated")
    parser.add_argument("--all", action="store_true", help="every release of pins.json")
    parser.add_argument("--classes", help="comma-separated")
    parser.add_argument("--real", action="store_true", help="load everything for real as well")
    parser.add_argument("--transformers", action="store_true", help="and compare what transformers makes of both")
    a = parser.parse_args()
    releases = a.releases.split(",") if a.releases else list(PINS["releases"]) if a.all else WAY_RELEASES
    venvs = a.venvs or a.work / "venvs"
    bad = 0
    for name in a.classes.split(",") if a.classes else CLASSES:
        sources = make(a.work, name, environment(SHAPES_RELEASE, venvs))
        for release in releases:
            python = str(environment(release, venvs))
            live = LiveVllm(python, seconds=SECONDS * 3)
            answers = live.dry_load([open_folder(source) for source in sources])
            faults = []
            for source, answer in zip(sources, answers, strict=True):
                faults += [f"{source.name}: {fault}" for fault in compare(source, release, answer)]
            if a.real:
                faults += compare_real(python, sources, answers)
            with tempfile.TemporaryDirectory() as scratch:
                outs = {s.name: Path(scratch) / s.name for s in sources}
                written = [s for s in sources if write_repair(s, outs[s.name], release)]
                repaired = live.dry_load([open_folder(outs[s.name]) for s in written]) if written else []
                if a.real and written:
                    faults += compare_real(python, [outs[s.name] for s in written], repaired)
                if a.transformers and written:
                    pairs = [path for s in written for path in (s, outs[s.name])]
                    referee = environment(SHAPES_RELEASE, venvs)
                    subprocess.run([referee, Path(__file__).with_name("same_outputs.py"), *pairs], check=False)
                for source, answer in zip(written, repaired, strict=True):
                    if not answer.ok:
                        faults.append(f"{source.name}: repaired, {words(answer)}")
            seen = " ".join(f"{s.name}={verdict(answer)}" for s, answer in zip(sources, answers, strict=True))
            after = " ".join(s.name for s in written)
            print(f"{release} {name}: {seen}; repaired: {after}; {len(faults)} disagreements")
            print(*(f"  NO {fault}" for fault in faults), sep="\n", flush=True)
            bad += len(faults)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
