"""Log probabilities of other classes' checkpoints in real vLLM against transformers, before and after a repair.

    python tests/conformance/family_outputs.py                            0.22.1, 0.27.1 and 0.32.0
    python tests/conformance/family_outputs.py --classes LlamaForCausalLM --releases 0.32.0

Of every class: the forms that a release loads as they are, and what a repair for it writes of the others. The prompts
are text, and where a class takes pictures (pictures.py), a red and a blue one. The right answers are those of
transformers in float32 on the dequantized model: the source's, or where a repair quantizes anew the output's. The
tolerance is judge.py's. ask_model.py runs inside the environments.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent


def run_inside(python: Path, what: str, jobs: list[tuple[Path, Path]], log: Path) -> None:
    """Has an environment answer the jobs; exits where its process ends with an error."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f, log.open("a") as output:
        json.dump([list(map(str, job)) for job in jobs], f)
        f.flush()
        paths = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
        env = {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        command = [str(python), "-W", "ignore", str(HERE / "ask_model.py"), what, f.name]
        done = subprocess.run(command, env=env, stdout=output, stderr=output)
    if done.returncode:
        sys.exit(f"{python}: ask_model.py {what} ended with status {done.returncode}; its output is in {log}")


def choose_folders(sources: list[Path], release: str, scratch: Path) -> dict[Path, Path]:
    """What a release loads of each checkpoint: itself, or its repair. Those that it loads in no form are left out."""
    from dry_loads import write_repair

    import bnbfix

    out = {}
    for source in sources:
        repaired = scratch / source.parent.name / source.name
        repaired.parent.mkdir(parents=True, exist_ok=True)
        if write_repair(source, repaired, release):
            out[source] = repaired
        elif bnbfix.scan(source, release).ok:
            out[source] = source
    return out


def compare(answer: Path, truth: Path, factor: float) -> tuple[bool, str]:
    """(is it right?, the mean difference of what is allowed for each prompt, or why there is no answer)."""
    import numpy as np

    if not answer.exists():
        error = answer.with_suffix(".error")
        return False, error.read_text() if error.exists() else "no answer"
    right, got = np.load(truth), np.load(answer)
    found, words = True, []
    for name in [key.removesuffix(".ids") for key in right if key.endswith(".ids")]:
        if right[f"{name}.ids"].tolist() != got[f"{name}.ids"].tolist():
            return False, f"{name}: vLLM makes other tokens of it"
        difference = np.abs(got[f"{name}.logp"] - right[f"{name}.logp"])
        mean = float(np.nan_to_num(difference, nan=99.0).mean())
        allowed = float(right[f"{name}.noise"]) * factor
        found = found and mean <= allowed
        words.append(f"{name} {mean:.4f} of {allowed:.4f}")
    return found, ", ".join(words)


def prepare(source: Path, out: Path) -> Path:
    """A checkpoint as it is asked: with a processor where its class takes pictures, and all experts active.

    Of experts that are almost equal bfloat16 chooses others than float32, after which all differs.
    """
    from pictures import PICTURES, add_processor, change_config

    config = json.loads((source / "config.json").read_text())
    if (name := source.parent.name) in PICTURES:
        add_processor(source, out, PICTURES[name])
    elif "num_experts_per_tok" in config:
        change_config(source, out, num_experts_per_tok=config.get("num_experts") or config["num_local_experts"])
    else:
        return source
    return out


class Truths:
    """The right answers of checkpoints, asked of transformers once for each model that they dequantize to."""

    def __init__(self, scratch: Path, python: Path, log: Path) -> None:
        self.scratch, self.python, self.log = scratch, python, log
        self.known: dict[str, Path] = {}  # by a hash of the class and the dequantized weights

    def find(self, folders: Iterable[Path]) -> dict[Path, Path]:
        """A file of answers for each folder; the same one for those with the same values."""
        from survey import SHAPES_RELEASE

        import bnbfix

        found, jobs = {}, []
        for folder in folders:
            full = self.scratch / "full"
            try:
                bnbfix.repair(folder, full, SHAPES_RELEASE, bf16=True, device="cpu")
            except bnbfix.NotApplicable:  # it is in full precision
                shutil.copytree(folder, full)
            digest = hash_model(full)
            if digest not in self.known:
                self.known[digest] = self.scratch / f"{digest}.npz"
                jobs.append((full.rename(self.scratch / digest), self.known[digest]))
            shutil.rmtree(full, ignore_errors=True)
            found[folder] = self.known[digest]
        if jobs:
            run_inside(self.python, "--transformers", jobs, self.log)
        return found


def hash_model(folder: Path) -> str:
    """A hash of a folder's class and the bytes of its tensors, whatever their names and files are.

    Classes of the same sizes have the same random weights here, but not the same answers: Granite scales what Llama
    does not.
    """
    from dry_loads import open_folder

    checkpoint = open_folder(folder)
    read = (tensor.read(checkpoint.source) for tensor in checkpoint.tensors.values())
    parts = [checkpoint.config["architectures"][0].encode(), *sorted(hashlib.sha256(v).digest() for v in read)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> None:
    """See the module's docstring."""
    from cells import choose_releases, environment, make_parser
    from family_loads import CLASSES, make
    from judge import TOLERANCE, TOLERANCE_INT8
    from survey import SHAPES_RELEASE

    parser = make_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="every release of pins.json")
    parser.add_argument("--classes", help="comma-separated")
    options = parser.parse_args()
    venvs = options.venvs or options.work / "venvs"
    referee, log = environment(SHAPES_RELEASE, venvs), options.work / "outputs.log"
    chosen = options.classes.split(",") if options.classes else CLASSES
    compared = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        made = [source for name in chosen for source in make(options.work, name, referee)]
        sources = [prepare(source, scratch / "sources" / source.parent.name / source.name) for source in made]
        truths = Truths(scratch, referee, log)
        for release in choose_releases(options):
            loads = choose_folders(sources, release, scratch / release)
            folders = dict.fromkeys([*loads, *loads.values()])
            right = truths.find(folders)
            answers = {folder: scratch / f"{release}-{i}.npz" for i, folder in enumerate(folders)}
            run_inside(environment(release, venvs), "--vllm", list(answers.items()), log)
            for source, loaded in loads.items():
                factor = TOLERANCE_INT8 if source.name == "int8" else TOLERANCE
                judged = {f: compare(answers[f], right[f], factor) for f in (source, loaded)}
                name, (ok, words) = f"{source.parent.name} {source.name}", judged[loaded]
                if loaded != source:
                    new = "" if right[source] == right[loaded] else " and quantized anew"
                    name, words = f"{name}, repaired{new}", f"{words}; before: {judged[source][1]}"
                print(f"{release} {name}: {words}{'' if ok else ' WRONG'}", flush=True)
                compared, wrong = compared + 1, wrong + (not ok)
    print(f"{compared} compared, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
