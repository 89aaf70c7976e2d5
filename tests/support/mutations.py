"""Checkpoints with one tensor lost, renamed, added or reshaped: in their headers, without a byte written."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

from bnbfix.checkpoint.checkpoint import Checkpoint, Tensor, Weight, rename_weights
from bnbfix.checkpoint.safetensors import TensorInfo

Mutation = tuple[str, Checkpoint]  # what was done in words


def _replace_weights(checkpoint: Checkpoint, weights: dict[str, Weight]) -> Checkpoint:
    """The checkpoint with these weights; headers hold them and their quant-state tensors, in order."""
    shards = {}
    for shard, header in checkpoint.shards.items():
        tensors = [t for w in weights.values() for t in (w.tensor, *w.state_tensors.values()) if t.shard == shard]
        orphans = [t for t in checkpoint.orphans.values() if t.shard == shard]
        shards[shard] = header._replace(tensors={t.info.name: t.info for t in [*tensors, *orphans]})
    return replace(checkpoint, weights=weights, shards=shards)


def delete_weight(checkpoint: Checkpoint, choose: random.Random) -> Mutation:
    """Loses one weight, with its quant-state tensors."""
    name = choose.choice(list(checkpoint.weights))
    return f"delete {name}", _replace_weights(checkpoint, {n: w for n, w in checkpoint.weights.items() if n != name})


def rename_weight(checkpoint: Checkpoint, choose: random.Random) -> Mutation:
    """Gives one weight a name that looks much like its own."""
    name = choose.choice(list(checkpoint.weights))
    spellings: list[Callable[[str], str]] = [
        lambda n: re.sub(r"\.(\d+)\.", lambda m: f".{int(m[1]) + 50}.", n, count=1),
        lambda n: n.replace("_proj", "_projection").replace("norm", "layer_norm"),
        lambda n: f"model.{n}",
        lambda n: n.removesuffix(".weight") + ".kernel",
        lambda n: n.replace(".", ".inner.", 1),
    ]
    new = next((s for s in (f(name) for f in choose.sample(spellings, len(spellings))) if s != name), name + "_2")
    return f"rename {name} to {new}", rename_weights(checkpoint, {name: new})


def add_tensor(checkpoint: Checkpoint, choose: random.Random) -> Mutation:
    """Adds a small tensor next to another one."""
    neighbor = choose.choice(list(checkpoint.weights.values()))
    module = neighbor.name.rpartition(".")[0]
    endings = ["bias", "lora_A.weight", "rotary_emb.inv_freq", "scale", "extra.weight", "extra.bias", "inner.scale"]
    top = choose.choice(["", module.split(".")[0], ".".join(module.split(".")[:2]), module])
    name = ".".join(filter(None, (top, choose.choice(endings))))
    if name in checkpoint.tensors:
        name += "_2"
    header = checkpoint.shards[neighbor.tensor.shard]
    end = max(info.end for info in header.tensors.values())
    info = TensorInfo(name, "BF16", (8,), end, end + 16)
    tensor = Tensor(neighbor.tensor.shard, info, header.data_start + end)
    return f"add {name}", _replace_weights(checkpoint, {**checkpoint.weights, name: Weight(name, tensor, {}, None)})


def reshape_weight(checkpoint: Checkpoint, choose: random.Random) -> Mutation:
    """Makes one dimension of an unquantized weight smaller or larger."""
    unquantized = [w for w in checkpoint.weights.values() if not w.quantized and w.shape]
    weight = choose.choice(unquantized)
    at = choose.randrange(len(weight.shape))
    shape = tuple(n + (choose.choice([-1, 1, 8]) if i == at else 0) for i, n in enumerate(weight.shape))
    info = weight.tensor.info._replace(shape=shape)
    changed = weight._replace(tensor=weight.tensor._replace(info=info))
    words = f"reshape {weight.name} from {list(weight.shape)} to {list(shape)}"
    return words, _replace_weights(checkpoint, {**checkpoint.weights, weight.name: changed})


MUTATIONS = (delete_weight, rename_weight, add_tensor, reshape_weight)
