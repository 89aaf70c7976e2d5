"""Experts of a mixture: how a release wants them, and how transformers does.

vLLM makes quantized parameters for experts and looks for per-expert weights (`experts.7.gate_proj.weight` with its
quant-state tensors); transformers keeps a layer's experts in two unquantized tensors, gate_up_proj
[experts, 2 * inner, hidden] and down_proj [experts, hidden, inner]. No skip entry reaches experts, so this is the one
place where bnbfix quantizes unasked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product

from ..checkpoint.checkpoint import Weight
from ..checkpoint.quant_state import DTYPES
from ..engines.engine import DEFAULT, Expectation, ReleaseRange
from ..engines.registry import engines, expect
from ..engines.targets import label_ranges
from ..errors import Unrepairable
from ..models.inspection import LinearWeight
from ..models.roles import classify_tensor
from .changes import Changes, ExpertChange, Request, Stack
from .rule import Case, Code, Hit, Severity, names_of, releases_where, rule

_LOADING = releases_where(lambda r: r.expert_prefix is not None)
_PREFIXES = "; ".join(
    f"`{prefix}` in {releases_where(lambda r, prefix=prefix: r.expert_prefix == prefix)}"  # type: ignore[misc]
    for prefix in dict.fromkeys(r.expert_prefix for r in engines()[DEFAULT].ranges if r.expert_prefix)
)
_EXPERTS = re.compile(r"\.(?:moe\.)?experts\.")
BLOCK = 64  # values; vLLM joins the blocks of a layer's experts, so one that is not full would shift those behind it


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
        loading = _ranges_that_load(case)
        others = f"; {label_ranges(loading)} can load one, and" if loading else ";"
        reason = f"no 4-bit form exists for this release{others} --bf16 loads wherever the class does"
        yield Hit(Severity.FAILS, (), words, reason)


def _ranges_that_load(case: Case) -> list[ReleaseRange]:
    """The ranges of releases that have a place for the model's experts in 4 bits."""
    rows, model = engines()[case.release.engine].ranges, case.inspection.model
    return [r for r in rows if (e := expect(model, r)) and e.expert_prefix]


@rule(
    Code.FUSED_EXPERTS,
    "experts in three-dimensional tensors",
    why="transformers keeps the experts of a layer in two unquantized three-dimensional tensors, and Experts4bit of "
    "bitsandbytes (its pull request 1965) in two stacks of quantized bytes. vLLM makes quantized parameters for them, "
    "fills those expert by expert, and no skip entry reaches them: shape errors.",
    fix="They are stored per expert, quantized to NF4 with quant states, under the prefix of the release. This loses "
    "precision as any 4-bit quantization does, and makes them about 3.5 times smaller. Those that are in NF4 already "
    "are split, and keep their values.",
)
def check_fused_experts(case: Case) -> Iterator[Hit]:
    if case.expectation is None or case.expert_prefix is None:
        return
    for splits, names in _group_experts(case, "fused_experts"):
        words, kept = "all experts in one tensor; the release takes them quantized, per expert", None
        if case.expectation.interleaved_experts or not splits:
            why = (
                "gate and up alternate in the tensor of both"
                if splits
                else "they are not whole matrices of full blocks"
            )
            kept = f"{why}; --bf16 keeps them in one tensor"
        yield Hit(Severity.FAILS, names, words, kept)


def _group_experts(case: Case, kind: str) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """(can they be split?, their names) of the tensors of experts in one form."""
    found: dict[bool, list[str]] = {}
    transposed = case.expectation is not None and _are_transposed(kind, (case.expectation,))
    for name, weight in case.inspection.checkpoint.weights.items():
        if classify_tensor(name).kind == kind:
            found.setdefault(_can_split(weight, transposed=transposed), []).append(name)
    yield from ((splits, tuple(names)) for splits, names in found.items())


def _are_transposed(kind: str, expectations: Sequence[Expectation]) -> bool:
    """Return True if tensors of experts in one form have the columns of each expert's matrices as rows."""
    return kind == "fused_experts" and any(e.transposed_experts for e in expectations)


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
    why="Each expert is a quantized linear module of its own in a list (`experts.gate_up_proj_4bit.7.weight`, "
    "`experts.down_projs.7.weight`), as training tools keep them in memory. Neither vLLM nor transformers knows these "
    "names: `Layer ... has no parameter ... for checkpoint weight`.",
    fix="They are stored per expert, under the prefix of the release; gate and up, which such a module has in one "
    "weight, are split. NF4 ones keep their values. Others are quantized to NF4, which loses precision.",
    release_independent=True,
)
def check_expert_linears(case: Case) -> Iterator[Hit]:
    model, reason = case.inspection.model, "they are not whole matrices of a mixture of experts; --bf16 may join them"
    for splits, names in _group_experts(case, "expert_linear"):
        whole = splits and model.moe
        kept = None if whole else reason
        if whole and not _ranges_that_load(case):
            kept = "no release takes experts of this class in 4 bits; --bf16 joins them"
        yield Hit(Severity.FAILS, names, "one of a list of linear modules, which only its tool reads", kept)


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
    interleaved = any(e.interleaved_experts for e in request.expectations)
    out = {}
    for name, weight in request.inspection.checkpoint.weights.items():
        role = classify_tensor(name)
        transposed = _are_transposed(role.kind, request.expectations)
        if role.kind == "fused_experts" and (interleaved or not _can_split(weight, transposed=transposed)):
            continue
        if role.kind == "expert" and role.prefix == prefix and weight.form == "nf4":
            continue
        if role.kind in ("fused_experts", "expert_linear", "expert"):
            out[name] = _change_experts(weight, prefix, transposed=transposed)
    return Changes(experts=out)


def _change_experts(weight: Weight, prefix: str, *, transposed: bool) -> ExpertChange:
    """What brings one tensor of experts into the form of those under a prefix."""
    if not _can_split(weight, transposed=transposed):
        what = f"{weight.form} {list(weight.shape)[:8]}"
        raise Unrepairable(f"{weight.name} is {what}, which cannot be quantized as an expert")
    forms = {"fused_experts": Code.FUSED_EXPERTS, "expert_linear": Code.EXPERT_LINEARS}
    code, state = forms.get(classify_tensor(weight.name).kind), weight.state
    matrices = split_experts(weight, prefix, transposed=transposed)
    first, (rows, columns) = matrices[0]
    split = f"split into {len(matrices)} matrices, " if len(matrices) > 1 else ""
    if state is None:
        words = f"{split}quantized to NF4, which loses precision"
        return ExpertChange("quantize", prefix, code or Code.UNQUANTIZED_IN_QUANTIZED, words, transposed)
    if state.quant_type != "nf4":
        words = f"{split}FP4 to NF4, which loses precision again"
        return ExpertChange("quantize", prefix, code or Code.FP4_EXPERTS, words)
    if not split:
        return ExpertChange("rename", prefix, code or Code.EXPERT_PREFIX, f"to {first}")
    assert code is not None  # of several matrices in one tensor
    if rows * columns % state.blocksize:  # a block reaches from one into the next
        return ExpertChange("quantize", prefix, code, f"{split}quantized anew, which loses precision again")
    return ExpertChange("split", prefix, code, f"{split}same values")


def _can_split(weight: Weight, *, transposed: bool) -> bool:
    """Return True for a tensor of experts, in 4 bits or unquantized, that consists of matrices of whole blocks."""
    if weight.state is not None and transposed:
        return False  # its blocks are of columns
    role, shape = classify_tensor(weight.name), weight.shape
    if weight.state is None and weight.tensor.info.dtype not in DTYPES.values():
        return False
    if len(shape) != (3 if role.kind == "fused_experts" else 2) or 0 in shape:
        return False
    rows, columns = shape[:-3:-1] if transposed else shape[-2:]
    rows, left = divmod(rows, len(_matrices(role.part)))
    return not left and rows * columns % BLOCK == 0


def _matrices(part: str | None) -> tuple[str, ...]:
    """The projections in a tensor of experts, in the order of its rows."""
    return ("gate_proj", "up_proj") if part == "gate_up_proj" else (str(part),)


def split_experts(weight: Weight, prefix: str, *, transposed: bool) -> list[tuple[str, tuple[int, int]]]:
    """The matrices of which a tensor of experts consists, one after the other: the name under a prefix, and the shape.

    All have the same shape.
    """
    role, (rows, columns) = classify_tensor(weight.name), weight.shape[:-3:-1] if transposed else weight.shape[-2:]
    numbers = range(weight.shape[0]) if role.kind == "fused_experts" else (role.number,)
    stem, parts = _EXPERTS.split(weight.name, 1)[0], _matrices(role.part)
    shape = (rows // len(parts), columns)
    return [(f"{stem}.{prefix}.{number}.{part}.weight", shape) for number in numbers for part in parts]


def join_experts(request: Request, so_far: Changes) -> Changes:
    """Joins per-expert weights, in the order in which transformers' tensor of all of them has their bytes.

    Raises Unrepairable where one is missing, or in the file twice: the others would take wrong places.
    """
    found: dict[str, dict[tuple[int, str], Weight]] = {}
    architecture = request.inspection.model.family.architecture
    transposed = any(e.transposed_experts for e in request.expectations)
    for name, weight in request.inspection.checkpoint.weights.items():
        role = classify_tensor(name)
        if role.number is None or role.part is None:
            continue
        fused = f"{_EXPERTS.split(name, 1)[0]}.experts.{'down_proj' if role.part == 'down_proj' else 'gate_up_proj'}"
        fused += "_bias" if role.kind == "expert_bias" else ""
        if not any(e.canonical(fused) for e in request.expectations):
            if role.kind == "expert":
                continue  # transformers writes this class's experts one by one
            raise Unrepairable(f"{name} cannot be joined: a {architecture} has no tensor of all experts")
        if role.part in ("gate_proj", "up_proj") and any(e.interleaved_experts for e in request.expectations):
            raise Unrepairable(f"{name} cannot be joined: gate and up alternate in a {architecture}")
        same = found.setdefault(fused, {}).setdefault((role.number, role.part), weight)
        if same is not weight:
            raise Unrepairable(f"{same.name} and {name} are the same expert")
    counts: dict[str, int] = {}  # of the experts of a layer
    for fused, weights in found.items():
        module = fused.rpartition(".")[0]
        counts[module] = max(counts.get(module, 0), *(number + 1 for number, _ in weights))
    stack = {}
    for fused, weights in found.items():
        parts = tuple(_order_experts(fused, weights, counts[fused.rpartition(".")[0]]))
        stack[fused] = Stack(parts, transposed and not fused.endswith("_bias"))
    return Changes(stack=stack)


def _order_experts(fused: str, weights: dict[tuple[int, str], Weight], count: int) -> Iterator[Weight]:
    """Every matrix of every expert; raises Unrepairable at a gap, or where one expert is whole and another is not."""
    parts = {part for _, part in weights}
    wanted = ("gate_up_proj",) if "gate_up_proj" in parts else _matrices(fused.rpartition(".")[2].removesuffix("_bias"))
    for number, part in product(range(count), wanted):
        if (number, part) not in weights:
            raise Unrepairable(f"{fused} cannot be joined: expert {number} has no {part}, but others have one")
        yield weights[number, part]
    if strange := parts - set(wanted):
        raise Unrepairable(f"{fused} cannot be joined: some experts have {min(strange)}, others {wanted[0]}")
