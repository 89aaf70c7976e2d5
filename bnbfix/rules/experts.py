"""Experts of a mixture: how a release wants them, and how transformers does.

vLLM makes quantized parameters for experts and looks for per-expert weights (`experts.7.gate_proj.weight` with its
quant-state tensors); transformers keeps a layer's experts in two unquantized tensors, gate_up_proj
[experts, 2 * inner, hidden] and down_proj [experts, hidden, inner]. No skip entry reaches experts, so this is the one
place where bnbfix quantizes unasked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from ..checkpoint.checkpoint import Weight
from ..checkpoint.quant_state import DTYPES
from ..engines.vllm.recorded import expect
from ..engines.vllm.releases import format_ranges, ranges
from ..errors import Unrepairable
from ..models.inspection import LinearWeight
from ..models.roles import classify_tensor
from .changes import Changes, ExpertChange, Request
from .rule import Case, Code, Hit, Severity, names_of, releases_where, rule

_LOADING = releases_where(lambda r: r.expert_prefix is not None)
_PREFIXES = "; ".join(
    f"`{prefix}` in {releases_where(lambda r, prefix=prefix: r.expert_prefix == prefix)}"  # type: ignore[misc]
    for prefix in dict.fromkeys(r.expert_prefix for r in ranges() if r.expert_prefix)
)
_EXPERTS = re.compile(r"\.(?:moe\.)?experts\.")
_LINEARS = re.compile(r"\.experts\.(?:gate_up|gate|up|down)_projs\.\d+\.")


@rule(
    Code.MOE_REFUSED,
    "mixture of experts under bitsandbytes",
    why=f"{releases_where(lambda r: r.expert_prefix is None)} does not load Gemma4's experts under bitsandbytes: "
    "`MoE Model ... does not support BitsAndBytes quantization yet`, or, where experts are reported under names that "
    "the bitsandbytes loader does not know, `Following weights were not initialized`.",
    fix=f"No 4-bit form exists for these releases; {_LOADING} can load one. Those of other classes differ.",
)
def check_moe_refused(case: Case) -> Iterator[Hit]:
    if case.inspection.model.moe and case.expert_prefix is None:
        words = "a mixture of experts, which the release refuses under bitsandbytes"
        loading = format_ranges(r for r in ranges() if (e := expect(case.inspection.model, r)) and e.expert_prefix)
        others = f"; vLLM {loading} can load one, and" if loading else ";"
        reason = f"no 4-bit form exists for this release{others} --bf16 works everywhere"
        yield Hit(Severity.FAILS, (), words, reason)


@rule(
    Code.FUSED_EXPERTS,
    "experts in three-dimensional tensors",
    why="transformers keeps the experts of a layer in two unquantized three-dimensional tensors. vLLM makes quantized "
    "parameters for them and no skip entry reaches them: shape errors.",
    fix="They are stored per expert, quantized to NF4 with quant states, under the prefix of the release. This loses "
    "precision as any 4-bit quantization does, and makes them about 3.5 times smaller.",
)
def check_fused_experts(case: Case) -> Iterator[Hit]:
    weights = case.inspection.checkpoint.weights
    names = tuple(n for n in weights if classify_tensor(n).kind == "fused_experts")
    if names and case.expert_prefix is not None:
        quantized = any(weights[n].quantized for n in names)
        reason = "they are quantized, and cannot be split without dequantizing; --bf16 does that" if quantized else None
        if case.expectation is not None and case.expectation.transposed_experts:
            reason = "bnbfix does not split experts that are stored transposed; --bf16 leaves them as they are"
        words = "all experts in one tensor; the release takes them quantized, per expert"
        yield Hit(Severity.FAILS, names, words, reason)


@rule(
    Code.EXPERT_PREFIX,
    "experts under another prefix",
    why=f"The experts are stored per expert, under a prefix that this release does not look for: {_PREFIXES}.",
    fix="They are renamed. No prefix serves all releases.",
)
def check_expert_prefix(case: Case) -> Iterator[Hit]:
    hits = [m for m in _experts(case) if m.role.prefix != case.expert_prefix]
    if hits:
        yield Hit(Severity.FAILS, names_of(hits), f"the release looks for {case.expert_prefix}.N")


@rule(
    Code.FP4_EXPERTS,
    "FP4 experts",
    severity=Severity.WRONG,
    why='vLLM\'s bitsandbytes loader fuses the quant states of experts with a hard-coded `quant_type="nf4"`. FP4 '
    "experts load, and are decoded with the wrong table.",
    fix="They are dequantized and quantized to NF4.",
    after_loading=True,
)
def check_fp4_experts(case: Case) -> Iterator[Hit]:
    hits = [m for m in _experts(case) if m.weight.form == "fp4"]
    if hits:
        yield Hit(Severity.WRONG, names_of(hits), "FP4, decoded by vLLM with the NF4 table")


@rule(
    Code.MIXED_EXPERTS,
    "experts quantized differently",
    why="vLLM's bitsandbytes loader makes one quant state for all experts of a layer, with the blocksize and dtype of "
    "the first. A bare AssertionError stops it where the matrices of one expert differ; where whole experts do, "
    "they load, and those unlike the first are decoded wrongly.",
    fix="None in 4 bits: the values would have to be quantized again. `repair --bf16` dequantizes those of one dtype.",
    after_loading=True,
)
def check_mixed_experts(case: Case) -> Iterator[Hit]:
    layers: dict[int | None, dict[str, list[LinearWeight]]] = {}
    for m in _experts(case):
        if (s := m.weight.state) is not None:
            layers.setdefault(m.role.layer, {}).setdefault(f"{s.dtype} in blocks of {s.blocksize}", []).append(m)
    reason = "they would have to be quantized again; --bf16 dequantizes those of one dtype"
    for forms in (forms for forms in layers.values() if len(forms) > 1):
        words = f"quantized as {' and '.join(forms)}; one is taken for all of a layer"
        yield Hit(Severity.FAILS, names_of(m for ms in forms.values() for m in ms), words, reason)


@rule(
    Code.EXPERT_LINEARS,
    "experts as a tool keeps them in memory",
    why="Each expert is a quantized linear module of its own in a list (`experts.gate_up_projs.7.weight`), as training "
    "tools keep them in memory. Neither vLLM nor transformers knows these names: `Layer ... has no parameter ... for "
    "checkpoint weight`.",
    fix="Nothing in the files; save the model as the tool merges it, in 16 bits. A repair then quantizes its experts.",
    release_independent=True,
)
def check_expert_linears(case: Case) -> Iterator[Hit]:
    names = tuple(n for n in case.inspection.checkpoint.weights if "_projs." in n and _LINEARS.search(n))
    if names:
        reason = (
            "save the model in 16 bits with the tool that made it (unsloth: save_pretrained_merged), and repair that"
        )
        yield Hit(Severity.FAILS, names, "one of a list of linear modules, a form that only its tool reads", reason)


def _experts(case: Case) -> list[LinearWeight]:
    """Per-expert weights, where the release loads any."""
    if case.expert_prefix is None:
        return []
    return [m for m in case.inspection.linears if m.role.kind == "expert"]


def split_and_quantize_experts(request: Request, so_far: Changes) -> Changes:
    """Brings experts into the form that the target takes. Nothing where its releases want different prefixes, or none.

    Raises Unrepairable for an expert that would have to be quantized and cannot be.
    """
    prefixes = {e.expert_prefix for e in request.expectations}
    prefix = prefixes.pop()
    if not request.inspection.model.moe or prefixes or prefix is None:
        return Changes()
    transposed = any(e.transposed_experts for e in request.expectations)
    out = {}
    for name, weight in request.inspection.checkpoint.weights.items():
        role = classify_tensor(name)
        if role.kind == "fused_experts" and not transposed and _is_splittable(weight):
            detail = f"split into {weight.shape[0]} experts and quantized to NF4, which loses precision"
            out[name] = ExpertChange("quantize", prefix, Code.FUSED_EXPERTS, detail)
        elif role.kind == "expert" and weight.form == "fp4":
            _check_matrix(weight)
            out[name] = ExpertChange("quantize", prefix, Code.FP4_EXPERTS, "FP4 to NF4, which loses precision again")
        elif role.kind == "expert" and not weight.quantized:
            _check_matrix(weight)
            detail = "quantized to NF4, which loses precision"
            out[name] = ExpertChange("quantize", prefix, Code.UNQUANTIZED_IN_QUANTIZED, detail)
        elif role.kind == "expert" and role.prefix != prefix:
            out[name] = ExpertChange("rename", prefix, Code.EXPERT_PREFIX, f"to {rename_expert(name, prefix)}")
    return Changes(experts=out)


def _is_splittable(weight: Weight) -> bool:
    """Return True for an unquantized tensor [experts, rows, columns] that can be split into per-expert matrices."""
    if weight.quantized or len(weight.shape) != 3 or weight.tensor.info.dtype not in DTYPES.values():
        return False
    return 0 not in weight.shape and weight.shape[1] % len(fused_parts(weight.name)) == 0


def _check_matrix(weight: Weight) -> None:
    if len(weight.shape) != 2 or (weight.state is None and weight.tensor.info.dtype not in DTYPES.values()):
        what = f"{weight.form} {list(weight.shape)[:8]}"
        raise Unrepairable(f"{weight.name} is {what}, which cannot be quantized as an expert")


def fused_parts(name: str) -> tuple[str, ...]:
    """The projections in a tensor of all experts, in the order of its rows."""
    return ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)


def rename_expert(name: str, prefix: str) -> str:
    """An expert's tensor name under another prefix."""
    return _EXPERTS.sub(f".{prefix}.", name, count=1)


def name_expert(fused: str, prefix: str, expert: int, projection: str) -> str:
    """The name of one expert's weight out of a tensor of all experts."""
    return f"{rename_expert(fused, prefix).rsplit('.', 1)[0]}.{expert}.{projection}.weight"


def join_experts(request: Request, so_far: Changes) -> Changes:
    """Joins per-expert weights, in the order in which transformers' tensor of all of them has their bytes.

    Raises Unrepairable where one is missing, or in the file twice: the others would take wrong places.
    """
    found: dict[str, dict[tuple[int, int], Weight]] = {}
    for name, weight in request.inspection.checkpoint.weights.items():
        if classify_tensor(name).kind != "expert":
            continue
        stem, index, part, _ = _EXPERTS.sub(".experts.", name, count=1).rsplit(".", 3)
        fused = f"{stem}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
        if not any(e.canonical(fused) for e in request.expectations):
            continue  # transformers writes this class's experts one by one
        same = found.setdefault(fused, {}).setdefault((int(index), int(part == "up_proj")), weight)
        if same is not weight:
            raise Unrepairable(f"{same.name} and {name} are the same expert")
    for fused, weights in found.items():
        numbers, parts = range(max(number for number, _ in weights) + 1), fused_parts(fused)
        for number, half in product(numbers, range(len(parts))):
            if (number, half) not in weights:
                gap = f"expert {number} has no {parts[half]}, but others have one"
                raise Unrepairable(f"{fused} cannot be joined: {gap}")
    return Changes(stack={fused: tuple(weights[k] for k in sorted(weights)) for fused, weights in found.items()})
