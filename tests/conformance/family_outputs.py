"""Log probabilities of other classes' checkpoints in real vLLM against transformers, before and after a repair.

    python tests/conformance/family_outputs.py                            0.22.1, 0.27.1 and 0.32.0
    python tests/conformance/family_outputs.py --classes LlamaForCausalLM --releases 0.32.0

Of every class without pictures and without experts, whose router has no kernel for the CPU: the forms that a release
loads as they are, and what a repair for it writes of the others. The right answers are those of transformers in float32
on the dequantized model; the tolerance is judge.py's. With --vllm or --transformers it is what runs inside an
environment, with a list of folders, each with a file for its answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

HERE = Path(__file__).parent
INSIDE = HERE.parents[1] / "bnbfix" / "engines" / "vllm" / "inside"
IDS = list(range(20, 60))


def answer_by_vllm(folder: str, out: str) -> None:
    """The log probabilities at every position but the first."""
    import numpy as np
    import vllm
    from inside.engine import start_engine

    llm = start_engine(folder, lambda model: None, skip_tokenizer_init=True, max_logprobs=-1)
    options = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": -1, "logprobs": -1, "detokenize": False}
    answer = llm.generate({"prompt_token_ids": IDS}, vllm.SamplingParams(**options), use_tqdm=False)[0]
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    np.savez(out, logp=np.array([[row[t].logprob for t in range(len(row))] for row in rows]))


def run_vllm(jobs: Path) -> None:
    """An answer for each folder, in a process of its own forked after the imports; why there is none, in a line."""
    package = types.ModuleType("inside")
    package.__path__ = [str(INSIDE)]
    sys.modules["inside"] = package
    from inside.engine import ENVIRONMENT, import_vllm

    os.environ.update({k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()})
    import_vllm()
    for folder, out in json.loads(jobs.read_text()):
        if (child := os.fork()) == 0:
            try:
                answer_by_vllm(folder, out)
            except BaseException as e:
                traceback.print_exc()
                Path(out).with_suffix(".error").write_text(f"{type(e).__name__}: {e}"[:300])
            os._exit(0)  # the engine's own shutdown can hang
        os.waitpid(child, 0)


def run_transformers(jobs: Path) -> None:
    """For each folder the log probabilities in float32, and what bfloat16 differs by."""
    import numpy as np
    import torch
    from reference import load

    for folder, out in json.loads(jobs.read_text()):
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                logits = load(Path(folder), dtype)(input_ids=torch.tensor([IDS])).logits[0]
            found[dtype] = torch.log_softmax(logits.float(), -1).numpy()
        noise = np.abs(found[torch.float32] - found[torch.bfloat16]).mean()
        np.savez(out, logp=found[torch.float32], noise=noise)


def run_inside(python: Path, what: str, jobs: list[tuple[Path, Path]], log: Path) -> None:
    """Has an environment answer the jobs."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f, log.open("a") as output:
        json.dump([list(map(str, job)) for job in jobs], f)
        f.flush()
        paths = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
        env = {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        command = [str(python), "-W", "ignore", __file__, what, f.name]
        subprocess.run(command, env=env, stdout=output, stderr=output, check=True)


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


def compare(answer: Path, truth: Path, *, int8: bool) -> tuple[bool, str]:
    """(is it right?, the mean difference of what is allowed, or why there is no answer)."""
    import numpy as np
    from judge import TOLERANCE, TOLERANCE_INT8

    if not answer.exists():
        error = answer.with_suffix(".error")
        return False, error.read_text() if error.exists() else "no answer"
    right, got = np.load(truth), np.load(answer)["logp"]
    mean = float(np.nan_to_num(np.abs(got - right["logp"]), nan=99.0).mean())
    allowed = float(right["noise"]) * (TOLERANCE_INT8 if int8 else TOLERANCE)
    return mean <= allowed, f"{mean:.4f} of {allowed:.4f}"


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:2] in (["--vllm"], ["--transformers"]):
        (run_vllm if sys.argv[1] == "--vllm" else run_transformers)(Path(sys.argv[2]))
        return
    from cells import choose_releases, environment, make_parser
    from families import FAMILIES
    from family_loads import CLASSES, make
    from survey import SHAPES_RELEASE

    import bnbfix

    parser = make_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="every release of pins.json")
    parser.add_argument("--classes", help="comma-separated")
    options = parser.parse_args()
    venvs = options.venvs or options.work / "venvs"
    referee, log = environment(SHAPES_RELEASE, venvs), options.work / "outputs.log"
    left_out = {"vision_config", "num_experts", "num_local_experts"}
    text = [name for name in CLASSES if not left_out & set(FAMILIES[name].configs[0])]
    chosen = options.classes.split(",") if options.classes else text
    sources = [folder for name in chosen for folder in make(options.work, name, referee)]
    compared = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        jobs = []
        for i, source in enumerate(sources):
            bnbfix.repair(source, scratch / f"full-{i}", SHAPES_RELEASE, bf16=True, device="cpu")
            jobs.append((scratch / f"full-{i}", scratch / f"{i}.npz"))
        run_inside(referee, "--transformers", jobs, log)
        truths = {source: answer for source, (_, answer) in zip(sources, jobs, strict=True)}
        for release in choose_releases(options):
            loads = choose_folders(sources, release, scratch / release)
            answers = {source: scratch / f"{release}-{i}.npz" for i, source in enumerate(loads)}
            run_inside(environment(release, venvs), "--vllm", [(loads[s], answers[s]) for s in loads], log)
            for source, loaded in loads.items():
                right, words = compare(answers[source], truths[source], int8=source.name == "int8")
                what = f"{source.parent.name} {source.name}{'' if loaded == source else ', repaired'}"
                print(f"{release} {what}: {words}{'' if right else ' WRONG'}", flush=True)
                compared, wrong = compared + 1, wrong + (not right)
    print(f"{compared} compared, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
