"""Experts of a mixture: split out of three-dimensional tensors, quantized to NF4, under the prefix a release wants.

vLLM from 0.25 on makes quantized parameters for experts and looks for them one by one (`experts.7.gate_proj.weight` and
quant-state tensors); transformers keeps a layer's experts in two plain tensors, gate_up_proj [experts, 2 * inner, hidden] and
down_proj [experts, hidden, inner]. No skip entry reaches experts, so this is the one place where bnbfix quantizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Checkpoint, Weight
from ..engines.vllm.releases import ReleaseRange
from ..errors import Unrepairable
from ..models.gemma4 import Model, place
from ..planner.layout import Quantize, Slice, TensorPlan, copy, quantize
from .rule import Code

_TORCH_DTYPES = {v: k for k, v in qs.DTYPES.items()}
_EXPERTS = re.compile(r"\.(?:moe\.)?experts\.")


@dataclass(frozen=True)
class ExpertChange:
    """What is done to one tensor of experts: it is quantized, or renamed, to stand under `prefix`."""

    action: str  # quantize or rename
    prefix: str
    code: Code
    detail: str


def splittable(weight: Weight) -> bool:
    """Is this a plain tensor of all experts of a layer, [experts, rows, columns], that can be split?"""
    if weight.quantized or len(weight.shape) != 3 or weight.tensor.info.dtype not in _TORCH_DTYPES:
        return False
    return 0 not in weight.shape and weight.shape[1] % len(_parts(weight.name)) == 0


def _check_matrix(weight: Weight) -> None:
    """Raises Unrepairable for an expert stored by itself that is no matrix of a dtype that can be quantized."""
    if len(weight.shape) != 2 or (weight.state is None and weight.tensor.info.dtype not in _TORCH_DTYPES):
        what = f"{weight.form} {list(weight.shape)[:8]}"
        raise Unrepairable(f"{weight.name} is {what}, which cannot be quantized as an expert")


def decide_experts(checkpoint: Checkpoint, model: Model, releases: Sequence[ReleaseRange]) -> dict[str, ExpertChange]:
    """What each tensor of experts needs, by name. Empty where the releases want different prefixes, or refuse.

    Raises Unrepairable for an expert that would have to be quantized and cannot be.
    """
    prefixes = {r.moe for r in releases}
    prefix = prefixes.pop()
    if not model.moe or prefixes or prefix is None:
        return {}
    out = {}
    for name, weight in checkpoint.weights.items():
        where = place(name)
        if where.role == "fused_experts" and splittable(weight):
            detail = f"split into {weight.shape[0]} experts and quantized to NF4, which loses precision"
            out[name] = ExpertChange("quantize", prefix, Code.FUSED_EXPERTS, detail)
        elif where.role == "expert" and weight.form == "fp4":
            _check_matrix(weight)
            out[name] = ExpertChange("quantize", prefix, Code.FP4_EXPERTS, "FP4 to NF4, which loses precision again")
        elif where.role == "expert" and not weight.quantized:
            _check_matrix(weight)
            detail = "quantized to NF4, which loses precision"
            out[name] = ExpertChange("quantize", prefix, Code.UNQUANTIZED_IN_QUANTIZED, detail)
        elif where.role == "expert" and where.prefix != prefix:
            out[name] = ExpertChange("rename", prefix, Code.EXPERT_PREFIX, f"to {renamed(name, prefix)}")
    return out


def quantized_whole(checkpoint: Checkpoint, name: str) -> Iterable[TensorPlan]:
    """The tensors that take the place of a plain matrix: the same weight in NF4."""
    weight = checkpoint.weights[name]
    rows, columns = weight.shape
    double = bool(checkpoint.quantization.get("bnb_4bit_use_double_quant"))
    whole = Slice(weight.tensor, 0, weight.tensor.info.nbytes)
    yield from quantize(Quantize(name, (rows, columns), _TORCH_DTYPES[weight.tensor.info.dtype], whole, double))


def renamed(name: str, prefix: str) -> str:
    """An expert's tensor name under another prefix."""
    return _EXPERTS.sub(f".{prefix}.", name, count=1)


def expert_tensors(checkpoint: Checkpoint, name: str, mend: ExpertChange) -> Iterable[TensorPlan]:
    """The output tensors that take the place of one tensor of experts."""
    weight = checkpoint.weights[name]
    if mend.action == "rename":
        yield copy(weight.tensor, renamed(name, mend.prefix), column=True)
        for suffix, state_tensor in weight.state_tensors.items():
            yield copy(state_tensor, qs.state_tensor_name(renamed(name, mend.prefix), suffix))
        return
    double = bool(checkpoint.quantization.get("bnb_4bit_use_double_quant"))
    if weight.state is not None:
        rows, columns = weight.state.shape
        yield from quantize(Quantize(renamed(name, mend.prefix), (rows, columns), weight.state.dtype, weight, double))
        return
    dtype = _TORCH_DTYPES[weight.tensor.info.dtype]
    for expert, shape, part in matrices(weight):
        target = renamed(name, mend.prefix) if expert is None else _one(name, mend.prefix, expert)
        yield from quantize(Quantize(target, shape, dtype, part, double))


def matrices(weight: Weight) -> Iterable[tuple[tuple[int, str] | None, tuple[int, int], Slice]]:
    """The matrices in a plain tensor of experts: ((expert, projection), shape, where its bytes lie), in order.

    A tensor that is one expert's already comes whole, with None.
    """
    info = weight.tensor.info
    if len(info.shape) == 2:
        yield None, (info.shape[0], info.shape[1]), Slice(weight.tensor, 0, info.nbytes)
        return
    count, rows, columns = info.shape
    parts = _parts(weight.name)
    rows //= len(parts)
    size = info.nbytes // (count * len(parts))
    for expert in range(count):
        for i, part in enumerate(parts):
            begin = (expert * len(parts) + i) * size
            yield (expert, part), (rows, columns), Slice(weight.tensor, begin, size)


def _parts(name: str) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)


def _one(name: str, prefix: str, which: tuple[int, str]) -> str:
    stem = renamed(name, prefix).rsplit(".", 1)[0]
    return f"{stem}.{which[0]}.{which[1]}.weight"
