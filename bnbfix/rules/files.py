"""The files themselves: quant states, the index, duplicate tensors, and files that could run as code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from ..checkpoint.checkpoint import INDEX, weight_map
from ..checkpoint.quant_state import split_state_tensor
from .changes import Changes, Request
from .rule import Case, Code, Hit, Severity, rule

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
CODE_SUFFIXES = frozenset({".bat", ".dll", ".dylib", ".exe", ".ipynb", ".ps1", ".py", ".pyc", ".sh", ".so"})


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
    "unquantized weight they make vLLM bind a quant state to an unquantized parameter, and the load stops.",
    fix="They are dropped. A repair is not made only for this where vLLM ignores them.",
    release_independent=True,
)
def check_orphaned_state_tensors(case: Case) -> Iterator[Hit]:
    checkpoint = case.inspection.checkpoint
    bound: list[str] = []
    lost: list[str] = []
    for name in checkpoint.orphans:
        if (split := split_state_tensor(name)) is not None and split[0] in case.inspection.damaged:
            continue  # the weight is there, and BNB201 reports it
        weight = name.split(".quant_state.")[0]
        (bound if ".quant_state." in name and weight in checkpoint.weights else lost).append(name)
    if bound:
        yield Hit(Severity.FAILS, tuple(bound), "quant state of a weight that is stored in full precision")
    if lost:
        yield Hit(Severity.NOTE, tuple(lost), "they belong to no quantized weight and are ignored")


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
    "Gemma4 needs that.",
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
    why="Tensors are named as PEFT names an adapter's (`base_model.model...`). Without an index vLLM reads every "
    "*.safetensors of the folder, adapter_model.safetensors too: `There is no module or parameter named 'base_model'`.",
    fix="Nothing in the files; merge the adapter, or move it out of the folder.",
    release_independent=True,
)
def check_adapter(case: Case) -> Iterator[Hit]:
    tensors = case.inspection.checkpoint.tensors
    names = tuple(name for name in tensors if name.startswith("base_model."))
    if names:
        adapters = {tensors[name].shard for name in names}
        apart = adapters.isdisjoint(t.shard for name, t in tensors.items() if name not in names)
        reason = "merge the adapter and save the model itself (PEFT: merge_and_unload, save_pretrained)"
        if apart and len(adapters) < len(case.inspection.checkpoint.shards):
            reason += f", or move {' and '.join(sorted(adapters))} out of the folder"
        yield Hit(Severity.FAILS, names, "a tensor of a PEFT adapter; no release knows base_model", reason)


def is_pickle(name: str) -> bool:
    """Return True if the name of a file says that it is a pickle, which runs code when it is loaded."""
    return PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES


def drop_orphans(request: Request, so_far: Changes) -> Changes:
    """Drops quant-state tensors that no quantized weight claims."""
    return Changes(drop=dict.fromkeys(request.inspection.checkpoint.orphans, Code.ORPHANED_STATE_TENSORS))
