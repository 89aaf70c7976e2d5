"""Asks real vLLM what its classes expect of checkpoints, and writes the answers into bnbfix/engines/vllm/profiles/.

    python tests/conformance/survey.py                                every release of pins.json, every class: hours
    python tests/conformance/survey.py --releases 0.32.0 --classes LlamaForCausalLM
    python tests/conformance/survey.py --profiles                     only writes the profiles, of what was asked before

For each class (families.py) and release vLLM builds the model's skeleton, and its loader is given a tensor at a time:
each as transformers names it, unquantized and quantized; in a wrong shape; under other names; unknown ones everywhere.
Answers are kept in WORK/survey/RELEASE/CLASS.json; a class is asked about again where the questions have changed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "examples"), str(HERE)]

import tiny_gemma4
import venvs
from families import FAMILIES, Family, change
from profile_builder import build_profile

from bnbfix.checkpoint.safetensors import TensorInfo, build_header
from bnbfix.engines.vllm import asked
from bnbfix.engines.vllm.asked import Row, can_be_quantized
from bnbfix.engines.vllm.process import run_worker
from bnbfix.engines.vllm.profiles import FOLDER, INDEX, LITERAL, find_pattern

SHAPES_RELEASE = "0.32.0"  # whose transformers says which tensors a model has
SECONDS = 1800
SHARD = "model.safetensors"
TOWERS = (  # that a class without them may meet in the files of one that has them
    *("model.vision_tower", "model.audio_tower", "model.embed_vision", "model.embed_audio", "model.vision_embedder"),
    *("model.visual", "model.multi_modal_projector", "model.mtp", "vision_tower", "audio_tower", "embed_vision"),
    *("embed_audio", "visual", "vision_model", "vision_embedder", "multi_modal_projector", "mm_projector", "mtp"),
)
SAMPLE = 8  # tensors of each top-level module are tried under other names
UNKNOWN = ("bnbfix_unknown", "bnbfix_unknown.weight", "bnbfix_unknown.bias", "bias", "weight", "rotary_emb.inv_freq")
describe_tensor, describe_quantized = partial(asked.describe_tensor, SHARD), partial(asked.describe_quantized, SHARD)


def complete_tensors(tensors: dict[str, list[int]], family: Family) -> dict[str, list[int]]:
    """The tensors of a model, and others that a file may have: what other layers have, and per-expert weights."""
    out = dict(tensors)
    for name, shape in tensors.items():
        for old, new in family.renames:
            if re.search(old, name):
                out.setdefault(re.sub(old, new, name), shape)
    for name, shape in tensors.items():
        for here, elsewhere in family.dialects:
            if name.startswith(here):
                out[elsewhere + name[len(here) :]] = shape
        for theirs, ours in family.inner_names:
            if ours in name:
                out[name.replace(ours, theirs)] = shape
    stacks: dict[str, dict[int, dict[str, list[int]]]] = {}
    for name, shape in out.items():
        if LITERAL not in name and (m := re.match(r"(.*?)\.(\d+)\.(.*)", name)):
            stacks.setdefault(m[1], {}).setdefault(int(m[2]), {})[m[3]] = shape
    for stack, layers in stacks.items():
        for i, layer in layers.items():
            for j, other in sorted(layers.items(), reverse=True):  # one that is like it in what both have
                if j != i and all(layer.get(rest, shape) == shape for rest, shape in other.items()):
                    for rest, shape in other.items():
                        out.setdefault(f"{stack}.{i}.{rest}", shape)
    for name, shape in list(out.items()):
        if len(shape) == 3 and (m := re.fullmatch(r"(.*\.)experts\.(gate_up_proj|down_proj)", name)):
            rows, columns = (shape[2], shape[1]) if family.transposed_experts else (shape[1], shape[2])
            joined = m[2] == "gate_up_proj"
            parts = dict.fromkeys(("gate_proj", "up_proj"), rows // 2) if joined else {"down_proj": rows}
            for expert in range(shape[0]):
                if family.expert_lists:  # and nobody writes them as below
                    linear = f"{m[1]}experts.{m[2]}s.{expert}"
                    out |= {f"{linear}.weight": [rows, columns], f"{linear}.bias": [rows]}
                    continue
                for prefix in ("experts", "moe.experts"):
                    for part, height in parts.items():
                        out[f"{m[1]}{prefix}.{expert}.{part}.weight"] = [height, columns]
    return out


def list_experiments(
    tensors: dict[str, list[int]], others: dict[str, list[int]], seen: set[str]
) -> Iterator[tuple[list[Any], list[Row]]]:
    """(what is tried, the tensors to load): see the module's docstring.

    `others` are tensors that only other models of the class have. What does not depend on sizes is tried once for each
    pattern; `seen` holds those of the models before.
    """
    for name, shape in (tensors | others).items():
        if LITERAL in name and find_pattern(name) in seen:
            continue
        yield ["tensor", name], describe_tensor(name, shape)
        if can_be_quantized(name, shape):
            yield ["quantized", name], describe_quantized(name, shape)
    first = {p: name for name in reversed(tensors) if (p := find_pattern(name)) not in seen}
    for name in [name for name in first.values() if LITERAL not in name]:
        shape = tensors[name]
        for i in range(len(shape)):
            wrong = [n + 8 * (i == at) for at, n in enumerate(shape)]
            yield ["wrong", name, i], describe_tensor(name, wrong)
            if can_be_quantized(name, shape):
                yield ["wrong-quantized", name, i], describe_quantized(name, wrong)
    modules = {
        p: m
        for name in reversed(first.values())
        for m in prefixes_of(name.partition(LITERAL)[0])
        if (p := find_pattern(m)) not in seen
    }
    if not seen:
        modules |= {tower: tower for tower in TOWERS if not any(name.startswith(tower + ".") for name in tensors)}
    for module in modules.values():
        for unknown in UNKNOWN:
            name = f"{module}.{unknown}" if module else unknown
            if name not in tensors:
                yield ["unknown", module, unknown], describe_tensor(name, [8])
    for stack in {m[1] for name in first.values() if LITERAL not in name and (m := re.match(r"(.*?)\.\d+\.", name))}:
        layers = [name for name in tensors if name.startswith(stack + ".")]
        beyond = 1 + max(int(name[len(stack) + 1 :].split(".")[0]) for name in layers)
        example = next(name for name in layers if len(tensors[name]) == min(len(tensors[n]) for n in layers))
        name = re.sub(r"\.\d+\.", f".{beyond}.", stack + example[len(stack) :], count=1)
        yield ["beyond", stack], describe_tensor(name, tensors[example])
    for theirs, ours in list_aliases(tensors):
        for name in [n for n in first.values() if n.startswith(ours)][:SAMPLE]:
            if (alias := theirs + name[len(ours) :]) not in tensors:
                yield ["alias", theirs, ours, name], describe_tensor(alias, tensors[name])
                if can_be_quantized(name, tensors[name]):
                    yield ["alias", theirs, ours, name], describe_quantized(alias, tensors[name])
    seen |= {*first, *modules}


def list_aliases(tensors: dict[str, list[int]]) -> Iterator[tuple[str, str]]:
    """(theirs, ours): beginnings of names as other versions and tools write them, and as transformers does now."""
    for top in dict.fromkeys(re.sub(r"^((?:model\.)?[a-z_]+\.).*", r"\1", name) for name in tensors):
        parts = top.split(".")
        if top.startswith("model.") and parts[1] in ("layers", "embed_tokens", "norm"):
            top = "model."
        inner = top.removeprefix("model.")
        yield from (
            (theirs, top) for theirs in {inner, "model." + top, "base_model.model." + top} - {top, "", "model."}
        )
        if top == "model.language_model.":
            yield from ((theirs, top) for theirs in ("language_model.model.", "model.", "model.language_model.model."))
        elif top == "language_model.":
            yield from (("model.language_model.", top + "model."), ("model.", top + "model."))
            yield "lm_head.", top + "lm_head."
        elif top == "model.":
            yield from ((theirs, top) for theirs in ("language_model.model.", "model.language_model.", ""))
        elif top.endswith("vision_tower."):
            yield from ((theirs + "vision_model.", top) for theirs in (top, inner))
        elif top == "lm_head.":
            yield "language_model.lm_head.", top


def prefixes_of(name: str) -> Iterator[str]:
    """Every module that a tensor is in, the whole model first."""
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(len(parts)))


def find_shapes(work: Path, name: str, family: Family, python: Path) -> list[dict[str, Any]]:
    """What transformers says of a class's configs, and of those for sizes (model_shapes.py), asked once."""
    kept, asked = work / "shapes" / f"{name}.json", json.dumps(family.configs + family.sizes)
    if not kept.exists() or json.loads(kept.read_text())["asked"] != asked:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            given, answer = Path(scratch) / "in.json", Path(scratch) / "out.json"
            given.write_text(asked)
            subprocess.run([str(python), str(HERE / "model_shapes.py"), str(given), str(answer)], check=True)
            kept.write_text(json.dumps({"asked": asked, "models": json.loads(answer.read_text())}))
    models = list(json.loads(kept.read_text())["models"])
    for model in models[len(family.configs) :]:
        model["tensors"] = complete_tensors(model["tensors"], family)
    return models


def write_folder(
    folder: Path, model: dict[str, Any], tensors: dict[str, list[int]], family: Family, quantized: bool = True
) -> None:
    """What vLLM needs to build a skeleton: config.json, a shard of holes, and a processor where the class needs it."""
    folder.mkdir()
    config = model["config"] | ({"quantization_config": tiny_gemma4.ALL} if quantized else {})
    (folder / "config.json").write_text(json.dumps(config))
    if family.processor:
        processor = tiny_gemma4._processor_config(family.processor, config["vision_config"])
        (folder / "processor_config.json").write_text(json.dumps(processor))
        (folder / "tokenizer.json").write_text(json.dumps(tiny_gemma4._tokenizer()))
        roles = tiny_gemma4.SPECIAL_TOKENS | {f"{k}_token": v for k, v in tiny_gemma4.MEDIA_TOKENS.items()}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | roles)
        )
    if family.preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(family.preprocessor))
    infos, at = [], 0
    for name, shape in tensors.items():
        infos.append(TensorInfo(name, "BF16", tuple(shape), at, at + 2 * math.prod(shape)))
        at = infos[-1].end
    header = build_header(infos, {"format": "pt"})
    with (folder / SHARD).open("wb") as f:
        f.write(header)
        f.truncate(len(header) + at)
    (folder / "bnbfix-tensors.json").write_text("[]")


def list_questions(
    family: Family, models: list[dict[str, Any]], scratch: Path
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder for the worker for each model of a class, and what is asked there."""
    seen = set[str]()
    models = models[: len(family.configs)]
    complete = [complete_tensors(model["tensors"], family) for model in models]
    examples = {find_pattern(name): (name, shape) for tensors in reversed(complete) for name, shape in tensors.items()}
    for number, (model, own) in enumerate(zip(models, complete, strict=True)):
        here = set(map(find_pattern, own))
        others = dict(example for pattern, example in examples.items() if pattern not in here)
        folder = scratch / f"model-{number}"
        write_folder(folder, model, own, family)
        experiments = list(list_experiments(own, others, seen))
        (folder / "bnbfix-experiments.json").write_text(json.dumps([rows for _, rows in experiments]))
        yield folder, {"shapes": own | others, "experiments": [what for what, _ in experiments]}
    full = models[0]["tensors"]  # does the class load in full precision?
    write_folder(scratch / "plain", models[0], full, family, quantized=False)
    group = [row for name, shape in full.items() for row in describe_tensor(name, shape)]
    (scratch / "plain" / "bnbfix-experiments.json").write_text(json.dumps([group]))
    yield scratch / "plain", {"plain": True}
    if axial := models[0]["axial"]:  # is the class built with the vision tower's rope as transformers 5.19 names it?
        config = change(models[0]["config"], vision_config__rope_parameters=axial)
        write_folder(scratch / "axial", {"config": config}, complete[0], family)
        (scratch / "axial" / "bnbfix-experiments.json").write_text("[]")
        yield scratch / "axial", {"axial": True}


def survey(work: Path, release: str, python: Path, classes: dict[str, list[dict[str, Any]]]) -> None:
    """Asks one release about classes, of which the models are given, in one vLLM process; keeps the answers."""
    with tempfile.TemporaryDirectory() as scratch:
        asked = []
        for name, models in classes.items():
            (Path(scratch) / name).mkdir()
            asked += [(name, *question) for question in list_questions(FAMILIES[name], models, Path(scratch) / name)]
        answers = run_worker("expect", [folder for _, folder, _ in asked], seconds=SECONDS, python=str(python))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in classes}
    for (name, _, question), answer in zip(asked, answers, strict=True):
        found[name].append(question | answer)
        print(f"{release} {name}:", (answer["error"] or "")[:200] or f"{len(answer['answers'])} answers", flush=True)
    for name, kept in found.items():
        path = work / "survey" / release / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))


def is_answered(kept: Path, family: Family, models: list[dict[str, Any]]) -> bool:
    """Return True if the kept answers of a release are to what is asked about a class now."""
    if not kept.exists():
        return False
    answers = [a for a in json.loads(kept.read_text()) if "experiments" in a]
    with tempfile.TemporaryDirectory() as scratch:
        asked = [q for _, q in list_questions(family, models, Path(scratch)) if "experiments" in q]
    both = ([sorted(map(json.dumps, x["experiments"])) for x in pair] for pair in zip(asked, answers, strict=False))
    return len(asked) == len(answers) and (any(a["error"] for a in answers) or all(now == then for now, then in both))


def write_index() -> None:
    """Lists every profile, with the releases that load its class."""
    profiles = sorted(path for path in FOLDER.glob("*.json") if path.name != INDEX)
    known = {path.stem: json.loads(path.read_text("utf-8"))["known"] for path in profiles}
    (FOLDER / INDEX).write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--venvs", type=Path, help="where environments are or go; default: below --work")
    parser.add_argument("--releases", help="comma-separated")
    parser.add_argument("--classes", help="comma-separated")
    parser.add_argument("--profiles", action="store_true", help="ask nothing, write profiles of what is there")
    a = parser.parse_args()
    releases = a.releases.split(",") if a.releases else list(venvs.PINS["releases"])
    classes = a.classes.split(",") if a.classes else list(FAMILIES)
    folder = a.venvs or a.work / "venvs"
    models = {
        name: find_shapes(a.work, name, FAMILIES[name], venvs.build(SHAPES_RELEASE, folder / SHAPES_RELEASE))
        for name in classes
    }
    for release in [] if a.profiles else releases:
        kept = a.work / "survey" / release
        missing = {n: m for n, m in models.items() if not is_answered(kept / f"{n}.json", FAMILIES[n], m)}
        if missing:
            survey(a.work, release, venvs.build(release, folder / release), missing)
    FOLDER.mkdir(exist_ok=True)
    for name in classes:
        answers = {
            release: json.loads(kept.read_text())
            for release in venvs.PINS["releases"]
            if (kept := a.work / "survey" / release / f"{name}.json").exists()
        }
        profile = build_profile(name, FAMILIES[name], models[name], answers)
        text = json.dumps(profile, separators=(",", ":"), sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {len(text):,} bytes")
    write_index()


if __name__ == "__main__":
    main()
