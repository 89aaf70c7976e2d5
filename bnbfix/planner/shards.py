"""Carries decisions into layouts: which tensors each output shard holds, and what each is made from."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Checkpoint, Tensor, Weight
from ..errors import Unrepairable
from ..rules.experts import expert_tensors, quantized_whole
from .fixes import Changes, Insert
from .layout import ShardPlan, TensorPlan, copy, dequantize, lay_out_shard


def repaired_shards(checkpoint: Checkpoint, mend: Changes) -> Iterable[ShardPlan]:
    """The source's shards with every decision carried out, each under its own name."""
    gone = {*mend.drop, *mend.experts, *mend.quantize}
    for name in (*mend.dequantize, *mend.experts):
        gone |= set(checkpoint.weights[name].state_tensor_names().values())
    chosen = checkpoint.tensors
    added: dict[str, list[TensorPlan]] = {}
    for insert in mend.insert:
        added.setdefault(insert.donor.tensor.shard, []).extend(_inserted(insert))
    for name, expert in mend.experts.items():
        added.setdefault(chosen[name].shard, []).extend(expert_tensors(checkpoint, name, expert))
    for name in mend.quantize:
        added.setdefault(chosen[name].shard, []).extend(quantized_whole(checkpoint, name))
    for shard, header in checkpoint.shards.items():
        tensors = []
        for info in header.tensors.values():
            if info.name not in gone and chosen[info.name].shard == shard:
                tensors.append(_kept(checkpoint, mend, chosen[info.name]))
        tensors += added.get(shard, [])
        if tensors:
            yield lay_out_shard(shard, tensors, header.metadata, header)


def _kept(checkpoint: Checkpoint, mend: Changes, origin: Tensor) -> TensorPlan:
    name = origin.info.name
    if name in mend.dequantize:
        return dequantized(name, checkpoint.weights[name])
    return copy(origin, column=name in mend.retype)


def dequantized(name: str, weight: Weight) -> TensorPlan:
    """A 4-bit weight in full precision, under a name."""
    assert weight.state is not None  # `decide` dequantizes 4-bit weights, and the plan refuses 8-bit ones
    return dequantize(name, (weight,), weight.state.safetensors_dtype, weight.state.shape)


def _inserted(insert: Insert) -> Iterable[TensorPlan]:
    donor = insert.donor
    if insert.dequantize:
        yield dequantized(insert.name, donor)
        return
    yield copy(donor.tensor, insert.name, column=donor.state is not None)
    for suffix, t in donor.state_tensors.items():
        yield copy(t, qs.state_tensor_name(insert.name, suffix))


def dequantized_shards(checkpoint: Checkpoint, mend: Changes, max_shard_size: int) -> Iterable[ShardPlan]:
    """Everything in full precision, in the order of the source, cut into shards of at most `max_shard_size` bytes.

    A tensor larger than that gets a shard of its own.
    """
    groups: list[list[TensorPlan]] = [[]]
    room = max_shard_size
    for t in _dequantized_tensors(checkpoint, mend):
        if groups[-1] and t.info.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(t)
        room -= t.info.nbytes
    metadata = next(iter(checkpoint.shards.values())).metadata
    for i, tensors in enumerate(groups, 1):
        name = f"model-{i:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        yield lay_out_shard(name, tensors, metadata, None)


def _dequantized_tensors(checkpoint: Checkpoint, mend: Changes) -> Iterable[TensorPlan]:
    stacked = {part.name: name for name, parts in mend.stack.items() for part in parts}
    gone = set(mend.drop)
    for w in checkpoint.weights.values():
        gone |= set(w.state_tensor_names().values())
    done: set[str] = set()
    for shard, header in checkpoint.shards.items():
        for info in header.tensors.values():
            if info.name in gone or checkpoint.tensors[info.name].shard != shard:
                continue
            if (whole := stacked.get(info.name)) is not None:
                if whole not in done:
                    done.add(whole)
                    yield stack(checkpoint, whole, mend.stack[whole])
            elif info.name in mend.dequantize:
                yield full_precision(checkpoint, info.name, checkpoint.weights[info.name])
            else:
                yield copy(checkpoint.tensors[info.name])
    for insert in mend.insert:
        if insert.dequantize:
            yield full_precision(checkpoint, insert.name, insert.donor)
        else:
            yield copy(insert.donor.tensor, insert.name)


def full_precision(checkpoint: Checkpoint, name: str, weight: Weight) -> TensorPlan:
    """A quantized weight in full precision."""
    return dequantize(name, (weight,), safetensors_dtype(checkpoint, weight), weight.shape)


def safetensors_dtype(checkpoint: Checkpoint, weight: Weight) -> str:
    """What a weight is in full precision: in the dtype its quant state names, an LLM.int8 one in the model's."""
    if weight.state is not None:
        return weight.state.safetensors_dtype
    return model_dtype(checkpoint) if weight.int8 else weight.tensor.info.dtype


def model_dtype(checkpoint: Checkpoint) -> str:
    """The safetensors name of the dtype that config.json gives the model; bfloat16 where it says nothing usable."""
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return qs.DTYPES.get(said, "BF16") if isinstance(said, str) else "BF16"


def stack(checkpoint: Checkpoint, name: str, parts: tuple[Weight, ...]) -> TensorPlan:
    """Experts stored one by one as the one tensor that transformers keeps, [experts, rows, columns].

    Raises Unrepairable when they are not alike.
    """
    dtype, shape = safetensors_dtype(checkpoint, parts[0]), parts[0].shape
    for w in parts:
        other = safetensors_dtype(checkpoint, w)
        if len(shape) != 2 or (other, w.shape) != (dtype, shape):
            raise Unrepairable(
                f"{w.name} is {other} {list(w.shape)}, {parts[0].name} {dtype} {list(shape)}; "
                "only matrices that are alike become one tensor"
            )
    pairs = 2 if name.endswith("gate_up_proj") else 1
    return dequantize(name, parts, dtype, (len(parts) // pairs, pairs * shape[0], shape[1]))
