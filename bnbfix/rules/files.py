"""The files themselves: quant states, the index, duplicate tensors, and files that could run as code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from ..checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, weight_map
from ..checkpoint.quant_state import split_state_tensor
from ..models.inspection import Inspection
from ..models.roles import LINEAR_KINDS, TEXT, canonical, classify_tensor
from .changes import Changes, Request
from .rule import Case, Code, Hit, Severity, releases_where, rule

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
CODE_SUFFIXES = frozenset({".bat", ".dll", ".dylib", ".exe", ".ipynb", ".ps1", ".py", ".pyc", ".sh", ".so"})

PROCESSORS = frozenset({"processor_config.json", "preprocessor_config.json"})
_WHOLE_MODEL = re.compile(r"(?:model|consolidated)(?:-\d{5}-of-\d{5})?\.safetensors")


@rule(
    Code.QUANT_STATE,
    "invalid quant state",
    why="A quant state does not describe its weight: a quant-state tensor is missing or has another size, or the JSON "
    "is inconsistent. bitsandbytes would compute wrong numbers from it or read past a buffer, without an error.",
    fix="Nothing fixes it; quantize the model again, or fetch the file again.",
    release_independent=True,
    after_loading=True,
)
def check_quant_state(case: Case) -> Iterator[Hit]:
    for error in case.inspection.invalid:
        tensor = (error.where or "").split(": ", 1)[1:]
        yield Hit(Severity.FAILS, tuple(tensor), str(error), "the quant state is lost; quantize the model again")


@rule(
    Code.ORPHANED_STATE_TENSORS,
    "quant-state tensors without a quantized weight",
    why="They belong to a quantized weight that is not there, or that is there in full precision. Next to an "
    "unquantized weight they make vLLM bind a quant state to an unquantized parameter, and the load stops. The quant "
    "state of a weight that the model has and the file lacks shows that the weight is lost, perhaps with a shard.",
    fix="They are dropped, unless their weight is lost. A repair is not made only for this where vLLM ignores them.",
    release_independent=True,
)
def check_orphaned_state_tensors(case: Case) -> Iterator[Hit]:
    inspection = case.inspection
    weights = {name: split[0] for name in inspection.checkpoint.orphans if (split := split_state_tensor(name))}
    lost = set(_find_lost_weights(inspection))
    groups: dict[str, list[str]] = {"bound": [], "lost": [], "ignored": []}
    for name, weight in weights.items():
        if weight in inspection.damaged:
            continue  # the weight is there, and BNB201 reports it
        bound = ".quant_state." in name and weight in inspection.checkpoint.weights
        groups["lost" if weight in lost else "bound" if bound else "ignored"].append(name)
    if names := groups["bound"]:
        yield Hit(Severity.FAILS, tuple(names), "quant state of a weight that is stored in full precision")
    if names := groups["lost"]:
        what = "1 weight is" if len(lost) == 1 else f"{len(lost):,} weights are"
        reason = "a shard is missing, or the conversion lost them: download or copy the checkpoint again"
        yield Hit(Severity.FAILS, tuple(names), f"{what} missing, of which the quant states are there", reason)
    if names := groups["ignored"]:
        yield Hit(Severity.NOTE, tuple(names), "they belong to no quantized weight and are ignored")


def _find_lost_weights(inspection: Inspection) -> Iterator[str]:
    """Weights that the model has, and of which the file holds only the quant state."""
    model, weights = inspection.model, inspection.checkpoint.weights
    for name in inspection.checkpoint.orphans:
        split = split_state_tensor(name)
        if split is None or split[0] in weights or (".quant_state." not in name and split[1] != ".SCB"):
            continue
        role = classify_tensor(split[0])
        unused = role.part == "v_proj" and model.k_serves_as_v(role.layer)
        unused |= role.part in ("k_proj", "v_proj") and model.kv_shared(role.layer)
        beyond = role.layer is not None and 0 < len(model.layer_types) <= role.layer
        if role.kind in LINEAR_KINDS - {"audio_tower"} and not (unused or beyond):
            yield split[0]


@rule(
    Code.INDEX,
    "index and shards disagree",
    severity=Severity.NOTE,
    why="The index names other tensors, other shards for them, or another total size than the headers of the shards. "
    "vLLM reads every tensor of every shard that the index names, so a stale tensor left in a file is loaded.",
    fix="The index is written anew from the headers. A repair is not made only for this.",
    release_independent=True,
)
def check_index(case: Case) -> Iterator[Hit]:
    c = case.inspection.checkpoint
    if c.index is None:
        return
    named, tensors = weight_map(c.index), c.tensors
    moved = tuple(n for n, t in tensors.items() if n in named and named[n] != t.shard)
    if moved:
        yield Hit(Severity.NOTE, moved, f"not in the shard that {INDEX} names")
    unnamed = tuple(n for n in tensors if n not in named)
    if unnamed:
        yield Hit(Severity.NOTE, unnamed, f"not in {INDEX}, but vLLM loads every tensor of a shard")
    metadata = c.index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(t.nbytes for h in c.shards.values() for t in h.tensors.values())
    if said is not None and said != size:
        yield Hit(Severity.NOTE, (), f"{INDEX} says total_size {said}, the shards hold {size}")


@rule(
    Code.DUPLICATE,
    "one tensor in two shards",
    severity=Severity.WRONG,
    why="Two shards hold a tensor of the same name; which of them vLLM keeps depends on the order of the files.",
    fix="The one that the index names is kept.",
    release_independent=True,
    after_loading=True,
)
def check_duplicate(case: Case) -> Iterator[Hit]:
    for name, shards in case.inspection.checkpoint.duplicates.items():
        yield Hit(Severity.WRONG, (name,), f"is in {' and '.join(shards)}")


@rule(
    Code.PICKLES,
    "pickle files next to the weights",
    severity=Severity.NOTE,
    why="Loading a pickle (*.bin, *.pt, *.pth, *.ckpt, *.pkl) runs whatever code its author put into it. vLLM and "
    "transformers read safetensors where there are any, so these are a second, older copy of the weights, or what "
    "a training run left. bnbfix never opens them.",
    fix="A repair leaves them out.",
    release_independent=True,
)
def check_pickles(case: Case) -> Iterator[Hit]:
    names = tuple(f for f in case.inspection.checkpoint.source.files if is_pickle(f))
    if names:
        yield Hit(Severity.NOTE, names, "a pickle by its name, which could run code when it is loaded; not opened")


@rule(
    Code.CODE,
    "programs next to the weights",
    severity=Severity.NOTE,
    why="Python files, and auto_map in config.json, are run by vLLM and transformers under trust_remote_code. No "
    "class that bnbfix knows needs that.",
    fix="A repair copies them unchanged, without the right to be executed, and runs nothing.",
    release_independent=True,
)
def check_code(case: Case) -> Iterator[Hit]:
    checkpoint = case.inspection.checkpoint
    names = tuple(f for f in checkpoint.source.files if PurePosixPath(f).suffix.lower() in CODE_SUFFIXES)
    if names:
        yield Hit(Severity.NOTE, names, "a program by its name; not run")
    if "auto_map" in checkpoint.config:
        yield Hit(Severity.NOTE, (), "config.json: auto_map names code to run under trust_remote_code; not run")


@rule(
    Code.ADAPTER,
    "weights of a PEFT adapter in the model folder",
    why="Tensors have the names that PEFT gives them: those of an adapter (`base_model.model.`, `lora_A`), or of a "
    "model that was saved with its adapter (`base_layer`, `modules_to_save`, `original_module`). Without an index vLLM "
    "reads every *.safetensors of the folder, adapter_model.safetensors too: `There is no module or parameter named "
    f"'base_model'`. {releases_where(lambda r: not r.refuses_v)} ignores lora tensors inside the language model's "
    "layers, and serves the model without the adapter.",
    fix="Nothing in the files; merge the adapter, or move it out of the folder.",
    upstream=[8082, 41754],
)
def check_adapter(case: Case) -> Iterator[Hit]:
    names, checkpoint = case.inspection.adapter_names, case.inspection.checkpoint
    if not names:
        return
    tensors = checkpoint.tensors
    adapters = {tensors[name].shard for name in names}
    apart = adapters.isdisjoint(t.shard for name, t in tensors.items() if name not in set(names))
    reason = "merge the adapter and save the model itself (PEFT: merge_and_unload, save_pretrained)"
    if apart and len(adapters) < len(checkpoint.shards):
        reason += f", or move {' and '.join(sorted(adapters))} out of the folder"
    # From the release on that refuses an explicit v_proj, unknown names in the language model's layers are errors.
    inside = {n for n in names if ".lora_" in n and canonical(n).startswith(f"{TEXT}layers.")}
    ignored = set() if case.release.refuses_v else inside
    if fatal := tuple(n for n in names if n not in ignored):
        yield Hit(Severity.FAILS, fatal, "a tensor of a PEFT adapter, which the release has no place for", reason)
    if ignored:
        words = "a tensor of a PEFT adapter, which the release ignores: the model is served without it"
        yield Hit(Severity.NOTE, tuple(n for n in names if n in ignored), words, reason)


@rule(
    Code.UNUSED_WEIGHTS,
    "a second set of weights",
    severity=Severity.NOTE,
    why="The folder holds weights that the index does not name, such as model.safetensors next to the shards of "
    "another save. vLLM reads what the index names, transformers model.safetensors: the two answer differently.",
    fix="A repair leaves out what the index does not name. A repair is not made only for this.",
    release_independent=True,
)
def check_unused_weights(case: Case) -> Iterator[Hit]:
    if names := unused_weights(case.inspection.checkpoint):
        words = (
            f"not in {INDEX}, so vLLM does not read it; transformers reads {SINGLE} before the shards. If it is the "
        )
        yield Hit(Severity.NOTE, names, words + "newer one, delete the index and its shards")


def unused_weights(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Files of whole models that the index does not name."""
    if checkpoint.index is None:
        return ()
    return tuple(f for f in checkpoint.source.files if _WHOLE_MODEL.fullmatch(f) and f not in checkpoint.shards)


@rule(
    Code.PROCESSOR,
    "no processor files",
    severity=Severity.NOTE,
    why="Neither processor_config.json nor preprocessor_config.json is there. vLLM loads the weights of a multimodal "
    "model without them, and stops where it prepares the first image.",
    fix="Nothing in the weights; copy the files from the original model.",
    release_independent=True,
)
def check_processor(case: Case) -> Iterator[Hit]:
    if not case.inspection.model.family.text_only and not PROCESSORS & case.inspection.checkpoint.source.files.keys():
        words = "neither processor_config.json nor preprocessor_config.json is there; images need one of them"
        yield Hit(Severity.NOTE, (), words, "copy them from the original model")


def is_pickle(name: str) -> bool:
    """Return True if the name of a file says that it is a pickle, which runs code when it is loaded."""
    return PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES


def drop_orphans(request: Request, so_far: Changes) -> Changes:
    """Drops quant-state tensors that no quantized weight claims."""
    return Changes(drop=dict.fromkeys(request.inspection.checkpoint.orphans, Code.ORPHANED_STATE_TENSORS))
