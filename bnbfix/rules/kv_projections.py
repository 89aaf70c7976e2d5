"""K and V that are shared: K serving as V in a layer, and layers that take K and V from an earlier one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoint.checkpoint import Weight
from ..engines.engine import ReleaseRange
from ..models.family import Model
from ..models.inspection import Inspection, LinearWeight
from ..models.roles import canonical
from .changes import Changes, Insert, Request
from .rule import Case, Code, Hit, Severity, names_of, releases_where, rule


def _describe_v_fix(model: Model, releases: Sequence[ReleaseRange]) -> str:
    if any(r.refuses_v for r in releases):
        return "q and k of these layers are dequantized and skipped, since some release of the target refuses a v_proj."
    return "v_proj.weight and its quant-state tensors are added, exact copies of k_proj's."


@rule(
    Code.K_EQ_V_WITHOUT_V,
    "K serves as V, but V has no quant state",
    why="In the full-attention layers of attention_k_eq_v models the file has no v_proj; vLLM loads K into both "
    f"places. {releases_where(lambda r: r.needs_v)} copies the quantized weight but not its quant state: the model "
    "loads, and the first forward pass dies with `split_with_sizes expects split_sizes to sum exactly`.",
    fix="v_proj.weight and its quant-state tensors are added, exact copies of k_proj's; for targets that also include "
    "releases that refuse them, q and k of these layers are dequantized and skipped.",
    upstream=[40437],
    fix_for=_describe_v_fix,
    after_loading=True,
)
def check_k_eq_v_without_v(case: Case) -> Iterator[Hit]:
    if not case.release.needs_v:
        return
    hits = []
    for p in case.params:
        if p.kind == "attention" and p.quantized and case.inspection.model.k_serves_as_v(p.layer):
            k, v = p.member("k_proj"), p.member("v_proj")
            if k is not None and k.quantized and v is None and not p.partially_quantized:
                hits.append(k)
    if hits:
        yield Hit(Severity.FAILS, names_of(hits), "shared as V, but v_proj has no quant state")


@rule(
    Code.EXPLICIT_V,
    "v_proj in a layer where K serves as V",
    why=f"{releases_where(lambda r: r.refuses_v)} has no v_proj in the full-attention layers of attention_k_eq_v "
    "models: `There is no module or parameter named 'layers.N.self_attn.v_proj'`. transformers never reads it either.",
    fix="The v_proj tensors of these layers are dropped.",
)
def check_explicit_v(case: Case) -> Iterator[Hit]:
    hits = [m for m in case.inspection.linears if _is_explicit_v(m, case.inspection.model)]
    if hits and case.release.refuses_v:
        yield Hit(Severity.FAILS, names_of(hits), "v_proj where K serves as V; the release has no such module")


@rule(
    Code.SHARED_WITHOUT_KV,
    "kv-shared layers without k, v and k_norm",
    why="transformers 5.5.2 and newer do not save k_proj, v_proj and k_norm of layers that share K and V with an "
    f"earlier one (E2B, E4B). {releases_where(lambda r: r.needs_shared_kv)} still makes the parameters and stops "
    "with `Following weights were not initialized`. Their values are never used.",
    fix="They are added as exact copies of those of the layer whose K and V are shared; later releases drop them.",
    upstream=[44788],
)
def check_shared_without_kv(case: Case) -> Iterator[Hit]:
    missing = _missing_shared(case.inspection)
    if missing and case.release.needs_shared_kv:
        yield Hit(Severity.FAILS, tuple(missing), "not in the file; the release makes the parameter all the same")


def _is_explicit_v(linear: LinearWeight, model: Model) -> bool:
    return linear.role.part == "v_proj" and model.k_serves_as_v(linear.role.layer)


def _missing_shared(inspection: Inspection) -> dict[str, tuple[int, str]]:
    """k_proj, v_proj and k_norm that kv-shared layers lack: (layer, part) by the name that the tensor would have."""
    out: dict[str, tuple[int, str]] = {}
    for (layer, part), q in sorted(inspection.by_layer.items()):
        if part == "q_proj" and inspection.model.kv_shared(layer):
            for missing in ("k_proj", "v_proj", "k_norm"):
                name = _neighbor_name(q.name, missing)
                if canonical(name) not in inspection.canonical_names:
                    out[name] = layer, missing
    return out


def _neighbor_name(name: str, part: str) -> str:
    """The name of another tensor of the same attention module: `...self_attn.q_proj.weight` -> `....k_norm.weight`."""
    module, _, parameter = name.rpartition(".")
    return f"{module.rpartition('.')[0]}.{part}.{parameter}"


def drop_explicit_v(request: Request, so_far: Changes) -> Changes:
    """Drops an explicit v_proj where a release of the target refuses it."""
    drop: dict[str, Code] = {}
    if any(r.refuses_v for r in request.releases):
        for linear in request.inspection.linears:
            if _is_explicit_v(linear, request.inspection.model):
                names = (linear.name, *linear.weight.state_tensor_names().values())
                drop |= dict.fromkeys(names, Code.EXPLICIT_V)
    return Changes(drop=drop)


def dequantize_k_eq_v(request: Request, so_far: Changes) -> Changes:
    """Dequantizes q and k where some releases of the target need a V and others refuse it."""
    if not (any(r.needs_v for r in request.releases) and any(r.refuses_v for r in request.releases)):
        return Changes()
    found = [
        linear
        for linear in request.linears(so_far)
        if linear.role.kind == "attention"
        and linear.role.part != "o_proj"
        and request.inspection.model.k_serves_as_v(linear.role.layer)
        and linear.quantized
    ]
    return Changes(dequantize=dict.fromkeys(names_of(found), Code.K_EQ_V_WITHOUT_V))


def dequantize_groups_without_donor(request: Request, so_far: Changes) -> Changes:
    """Where partially quantized groups are to be quantized: not those that get a copy of an unquantized k or v."""
    if request.partial_groups != "quantize":
        return Changes()
    inspection, layers = request.inspection, set[int]()
    if any(r.needs_shared_kv for r in request.releases):
        layers |= {layer for layer, part in _missing_shared(inspection).values() if part != "k_norm"}
    if any(r.needs_v for r in request.releases):
        layers |= {layer for layer, k in _k_without_v(request, so_far) if not k.quantized}
    found = [
        m
        for p in request.parameters(so_far)
        if p.kind == "attention" and p.layer in layers and p.quantizable and p.partially_quantized
        for m in p.members
        if m.quantized
    ]
    return Changes(dequantize=dict.fromkeys(names_of(found), Code.PARTIALLY_QUANTIZED))


def insert_v(request: Request, so_far: Changes) -> Changes:
    """Adds V as an exact copy of K where a release needs it."""
    if not any(r.needs_v for r in request.releases):
        return Changes()
    found = [k for _, k in _k_without_v(request, so_far) if so_far.keeps_quantized(k)]
    return Changes(
        insert=tuple(Insert(_neighbor_name(k.name, "v_proj"), k.weight, False, Code.K_EQ_V_WITHOUT_V) for k in found)
    )


def _k_without_v(request: Request, so_far: Changes) -> Iterator[tuple[int, LinearWeight]]:
    by_layer = request.inspection.by_layer
    for (layer, part), k in sorted(by_layer.items()):
        if part == "k_proj" and request.inspection.model.k_serves_as_v(layer):
            v = by_layer.get((layer, "v_proj"))
            if v is None or v.name in so_far.drop:
                yield layer, k


def insert_shared(request: Request, so_far: Changes) -> Changes:
    """Adds k, v and k_norm of kv-shared layers, in the form of the layer's q. Their values are never used."""
    if not any(r.needs_shared_kv for r in request.releases):
        return Changes()
    inspection = request.inspection
    missing = _missing_shared(inspection)
    donors: dict[str, list[Weight]] = {}
    dequantize: dict[str, Code | None] = {}
    for name, (layer, part) in missing.items():
        others = (name.replace(f"layers.{layer}.", f"layers.{i}.") for i in inspection.model.kv_donors(layer))
        donors[name] = [w for w in map(inspection.checkpoint.weights.get, others) if w is not None]
        if part != "k_norm" and donors[name] and not any(w.quantized for w in donors[name]):
            # There is no quantized donor: what the group has is dequantized.
            for linear in (inspection.by_layer.get((layer, p)) for p in ("q_proj", "k_proj", "v_proj")):
                if linear is not None and linear.quantized:
                    dequantize[linear.name] = Code.SHARED_WITHOUT_KV
    after = so_far | Changes(dequantize=dequantize)
    insert = []
    for name, (layer, part) in missing.items():
        if not (found := donors[name]):
            continue  # nothing to copy; the scan of the planned output says what is still missing
        quantized = next((w for w in found if w.quantized), None)
        if part != "k_norm" and quantized is not None and after.keeps_quantized(inspection.by_layer[layer, "q_proj"]):
            insert.append(Insert(name, quantized, False, Code.SHARED_WITHOUT_KV))
        else:
            as_values = part != "k_norm" and found[0].quantized
            insert.append(Insert(name, found[0], as_values, Code.SHARED_WITHOUT_KV))
    return Changes(dequantize=dequantize, insert=tuple(insert))
