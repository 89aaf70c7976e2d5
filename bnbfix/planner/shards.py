"""Carries changes into layouts: which tensors each output shard holds, and what each is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from math import prod

from ..checkpoint import quant_state as qs
from ..checkpoint import safetensors as st
from ..checkpoint.checkpoint import Checkpoint, Weight
from ..errors import Unrepairable
from ..models.roles import classify_tensor
from ..rules.changes import Changes, ExpertChange, Insert, Stack
from ..rules.experts import split_experts
from .layout import (
    Quantize,
    Rows,
    ShardPlan,
    Slice,
    Split,
    TensorPlan,
    lay_out_shard,
    plan_copy,
    plan_dequantize,
    plan_made,
)

_TORCH_DTYPES = {safetensors: torch for torch, safetensors in qs.DTYPES.items()}
Placed = tuple[str, TensorPlan]  # the shard of the source that a tensor belongs to, and its plan


def repaired_shards(checkpoint: Checkpoint, changes: Changes) -> Iterator[ShardPlan]:
    """The source's shards with every change carried out, each under its own name."""
    tensors: dict[str, list[TensorPlan]] = {shard: [] for shard in checkpoint.shards}
    for shard, planned in chain(_kept_tensors(checkpoint, changes), _added_tensors(checkpoint, changes)):
        tensors[shard].append(planned)
    for shard, header in checkpoint.shards.items():
        if tensors[shard]:
            yield lay_out_shard(shard, tensors[shard], header.metadata, None if checkpoint.renamed else header)


def recut_shards(checkpoint: Checkpoint, changes: Changes, max_shard_size: int) -> Iterator[ShardPlan]:
    """All tensors in the order of the source, cut anew into shards of at most `max_shard_size` bytes.

    A tensor larger than that gets a shard of its own.
    """
    groups: list[list[TensorPlan]] = [[]]
    room = max_shard_size
    for _, t in chain(_kept_tensors(checkpoint, changes), _added_tensors(checkpoint, changes)):
        if groups[-1] and t.info.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(t)
        room -= t.info.nbytes
    metadata = next(iter(checkpoint.shards.values())).metadata
    for i, tensors in enumerate(groups, 1):
        name = f"model-{i:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        yield lay_out_shard(name, tensors, metadata, None)


def _kept_tensors(checkpoint: Checkpoint, changes: Changes) -> Iterator[Placed]:
    """What takes the place of each tensor of the source that stays, in its order."""
    stacked = {part.name: name for name, stack in changes.stack.items() for part in stack.parts}
    gone = {*changes.drop, *changes.experts, *changes.quantize}
    for name in (*changes.dequantize, *changes.experts, *stacked):
        gone |= set(checkpoint.weights[name].state_tensor_names().values())
    done: set[str] = set()
    for shard, header in checkpoint.shards.items():
        for name in header.tensors:
            origin = checkpoint.tensors[name]
            if name in gone or origin.shard != shard:
                continue
            if (fused := stacked.get(name)) is not None:
                if fused not in done:
                    done.add(fused)
                    yield shard, _stack_experts(checkpoint, fused, changes.stack[fused])
            elif name in changes.dequantize:
                yield shard, _dequantized_tensor(checkpoint, name, checkpoint.weights[name])
            else:
                yield shard, plan_copy(origin, column=name in changes.retype)


def _added_tensors(checkpoint: Checkpoint, changes: Changes) -> Iterator[Placed]:
    for insert in changes.insert:
        yield from ((insert.donor.tensor.shard, t) for t in _inserted_tensors(checkpoint, insert))
    for name, change in changes.experts.items():
        yield from ((checkpoint.tensors[name].shard, t) for t in _expert_tensors(checkpoint, name, change))
    for name in changes.quantize:
        rows, columns = checkpoint.weights[name].shape
        op = _quantize_op(checkpoint, name, (rows, columns), checkpoint.weights[name])
        yield from ((checkpoint.tensors[name].shard, t) for t in plan_made(op))


def _inserted_tensors(checkpoint: Checkpoint, insert: Insert) -> Iterator[TensorPlan]:
    donor = insert.donor
    if insert.dequantize:
        yield _dequantized_tensor(checkpoint, insert.name, donor)
        return
    yield plan_copy(donor.tensor, insert.name, column=donor.state is not None)
    for suffix, t in donor.state_tensors.items():
        yield plan_copy(t, qs.state_tensor_name(insert.name, suffix))


def _expert_tensors(checkpoint: Checkpoint, name: str, change: ExpertChange) -> Iterable[TensorPlan]:
    """The tensors that take the place of one tensor of experts."""
    weight = checkpoint.weights[name]
    matrices = split_experts(weight, change.prefix, transposed=change.transposed)
    if change.action == "rename":
        target = matrices[0][0]
        yield plan_copy(weight.tensor, target, column=True)
        for suffix, t in weight.state_tensors.items():
            yield plan_copy(t, qs.state_tensor_name(target, suffix))
        return
    for i, (target, shape) in enumerate(matrices):
        if change.action == "split":
            yield from plan_made(Split(target, shape, _matrix(weight, i, shape)))
        else:
            yield from plan_made(_quantize_op(checkpoint, target, shape, weight, i, transposed=change.transposed))


def _matrix(weight: Weight, number: int, shape: tuple[int, int]) -> Rows:
    """One of the matrices of a quantized weight, which all have the same shape."""
    return Rows(weight, number * prod(shape), prod(shape))


def _quantize_op(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, int],
    weight: Weight,
    number: int = 0,
    *,
    transposed: bool = False,
) -> Quantize:
    """One of the matrices of a weight, quantized."""
    double = bool(checkpoint.quantization.get("bnb_4bit_use_double_quant"))
    if weight.state is not None:
        return Quantize(name, shape, weight.state.dtype, _matrix(weight, number, shape), double)
    dtype = weight.tensor.info.dtype
    size = st.tensor_nbytes(dtype, shape)
    values = Slice(weight.tensor, number * size, size)
    if transposed:  # next to each other in the tensor's matrices are columns of gate and up
        rows, width = shape[0], weight.shape[-1]
        matrix, part = divmod(number, width // rows)
        size = st.tensor_nbytes(dtype, weight.shape[-2:])
        values = Slice(weight.tensor, matrix * size, size, (part * rows, (part + 1) * rows))
    return Quantize(name, shape, _TORCH_DTYPES[dtype], values, double)


def _dequantized_tensor(checkpoint: Checkpoint, name: str, weight: Weight) -> TensorPlan:
    return plan_dequantize(name, (weight,), _value_dtype(checkpoint, weight), weight.shape)


def _value_dtype(checkpoint: Checkpoint, weight: Weight) -> str:
    """The safetensors dtype of a weight's values: what its quant state names; of an LLM.int8 weight, the model's."""
    if weight.state is not None:
        return weight.state.safetensors_dtype
    if not weight.int8:
        return weight.tensor.info.dtype
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return qs.DTYPES.get(said, "BF16") if isinstance(said, str) else "BF16"


def _stack_experts(checkpoint: Checkpoint, name: str, stack: Stack) -> TensorPlan:
    """Per-expert tensors as the one that transformers keeps: [experts, rows, columns], or [experts, rows] of biases.

    Raises Unrepairable when they differ in dtype or shape.
    """
    parts = stack.parts
    dtype, shape, role = _value_dtype(checkpoint, parts[0]), parts[0].shape, classify_tensor(parts[0].name)
    for w in parts:
        other = _value_dtype(checkpoint, w)
        if len(shape) != (1 if role.kind == "expert_bias" else 2) or (other, w.shape) != (dtype, shape):
            raise Unrepairable(
                f"{w.name} is {other} {list(w.shape)}, {parts[0].name} {dtype} {list(shape)}; "
                f"only {stack.kind} of one dtype and shape become one tensor"
            )
    each = 1 if name.removesuffix("_bias").endswith(str(role.part)) else 2  # gate and up
    one = (each * shape[0], *shape[1:])
    shape, together = (one[::-1], each) if stack.transposed else (one, 0)
    return plan_dequantize(name, parts, dtype, (len(parts) // each, *shape), together)
