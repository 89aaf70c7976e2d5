"""The rules: one function for each code, from a checkpoint and a release to what does not fit. Nothing is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..checkpoint.checkpoint import INDEX, Checkpoint, weight_map
from ..checkpoint.quant_state import split_state_tensor
from ..engines.vllm.parameters import Member, Parameter, by_layer, damaged_weights, parameters, shape_mismatches
from ..engines.vllm.releases import Installed, ReleaseRange, ranges, unfit_plugin
from ..models import gemma4
from ..models.gemma4 import Model, has_axial_rope, legacy_head_config
from .files import is_code, is_pickle
from .rule import Code, Severity
from .skip_list import matching_entries, transformers_skips, vllm_skips


@dataclass(frozen=True)
class Case:
    """A checkpoint and one range of releases, with the parameters that the release makes for it."""

    checkpoint: Checkpoint
    model: Model
    release: ReleaseRange
    members: tuple[Member, ...]
    params: tuple[Parameter, ...]
    installed: Installed | None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        model: Model,
        members: tuple[Member, ...],
        release: ReleaseRange,
        installed: Installed | None = None,
    ) -> Case:
        """The case of one range; `members` are `projections(checkpoint)`, the same for every range."""
        params = tuple(parameters(members, model, release, checkpoint.skip_modules))
        return cls(checkpoint, model, release, members, params, installed)


@dataclass(frozen=True)
class Hit:
    """One rule's answer: which tensors, how bad, in which words; `reason` says why nothing fixes it."""

    severity: Severity
    tensors: tuple[str, ...]
    message: str
    reason: str | None = None


Rule = Callable[[Case], Iterator[Hit]]
RULES: dict[Code, Rule] = {}
OF_FILES: set[Code] = set()  # rules that ask the checkpoint alone: their answer is the same for every release


def rule(code: Code, *, of_files: bool = False) -> Callable[[Rule], Rule]:
    """Registers the function that looks for a code; `of_files`: it does not look at the release."""

    def register(function: Rule) -> Rule:
        RULES[code] = function
        if of_files:
            OF_FILES.add(code)
        return function

    return register


def _names(members: list[Member]) -> tuple[str, ...]:
    return tuple(m.weight.name for m in members)


@rule(Code.QUANTIZED_IN_UNQUANTIZED)
def quantized_in_unquantized(case: Case) -> Iterator[Hit]:
    hits = [
        m
        for p in case.params
        if not p.quantizable and p.role != "lm_head" and not (p.role == "expert" and case.release.moe is None)
        for m in p.members
        if m.quantized
    ]
    if hits:
        yield Hit(Severity.FAILS, _names(hits), "quantized in the file, an ordinary parameter in vLLM")


@rule(Code.UNQUANTIZED_IN_QUANTIZED)
def unquantized_in_quantized(case: Case) -> Iterator[Hit]:
    hits = [m for p in case.params if p.quantized and not any(m.quantized for m in p.members) for m in p.members]
    if hits:
        yield _unskipped(case, hits, "full precision in the file, a quantized parameter in vLLM")


@rule(Code.PARTIALLY_QUANTIZED)
def partially_quantized_group(case: Case) -> Iterator[Hit]:
    hits = [m for p in case.params if p.quantized and p.partially_quantized for m in p.members]
    if hits:
        yield _unskipped(case, hits, "one fused module in vLLM, partially quantized in the file")


def _unskipped(case: Case, hits: list[Member], message: str) -> Hit:
    # LLM.int8 has no requantization on the way in: its parameter takes int8 rows or stops.
    silent = case.release.unquantized_in_quantized == "requantized" and not any(m.weight.int8 for m in case.members)
    if silent:
        return Hit(Severity.WRONG, _names(hits), message + ": quantized to NF4 while loading, silently")
    return Hit(Severity.FAILS, _names(hits), message)


@rule(Code.K_EQ_V_WITHOUT_V)
def k_eq_v_without_v(case: Case) -> Iterator[Hit]:
    if case.release.k_eq_v != "needs_v":
        return
    hits = []
    for p in case.params:
        if p.role == "attention" and p.layer is not None and p.quantized and case.model.k_serves_as_v(p.layer):
            k, v = p.member("k_proj"), p.member("v_proj")
            if k is not None and k.quantized and v is None and not p.partially_quantized:
                hits.append(k)
    if hits:
        yield Hit(Severity.FAILS, _names(hits), "serves as V too, which has no quant state of its own")


@rule(Code.EXPLICIT_V)
def explicit_v(case: Case) -> Iterator[Hit]:
    hits = [m for m in case.members if is_explicit_v(m, case.model)]
    if hits and case.release.k_eq_v == "refuses_v":
        yield Hit(Severity.FAILS, _names(hits), "v_proj where K serves as V; the release knows no such module")


def is_explicit_v(m: Member, model: Model) -> bool:
    """Is this a v_proj in a layer where K serves as V?"""
    return m.place.part == "v_proj" and m.place.layer is not None and model.k_serves_as_v(m.place.layer)


@rule(Code.SHARED_WITHOUT_KV)
def shared_without_kv(case: Case) -> Iterator[Hit]:
    missing = missing_shared(case.checkpoint, case.model, case.members)
    if missing and case.release.kv_shared == "needs_kv":
        yield Hit(Severity.FAILS, tuple(missing), "not in the file; the release makes the parameter all the same")


def missing_shared(checkpoint: Checkpoint, model: Model, members: Sequence[Member]) -> dict[str, tuple[int, str]]:
    """k_proj, v_proj and k_norm that kv-shared layers lack: (layer, part) by the name the tensor would have."""
    have = {gemma4.canonical(name) for name in checkpoint.weights}
    q = {layer: m for (layer, part), m in by_layer(members).items() if part == "q_proj"}
    out: dict[str, tuple[int, str]] = {}
    for layer in sorted(q):
        if not model.kv_shared(layer):
            continue
        for part in ("k_proj", "v_proj", "k_norm"):
            name = q[layer].weight.name.replace("q_proj", part)
            if gemma4.canonical(name) not in have:
                out[name] = (layer, part)
    return out


@rule(Code.QUANTIZED_PIXEL_PROJECTION)
def quantized_pixels(case: Case) -> Iterator[Hit]:
    hits = [m for p in case.params if p.role == "pixel_projection" and p.quantized for m in p.members if m.quantized]
    if hits and case.release.pixel_projection == "needs_transformers_5_13":
        yield Hit(Severity.DEGRADED, _names(hits), "quantized; corrupts images beside transformers older than 5.13")


@rule(Code.QUANTIZED_LM_HEAD)
def quantized_lm_head(case: Case) -> Iterator[Hit]:
    hits = [m for m in case.members if m.place.role == "lm_head" and m.quantized]
    if hits:
        yield Hit(Severity.FAILS, _names(hits), "quantized; no release quantizes lm_head")


@rule(Code.QUANTIZED_BUT_SKIPPED)
def quantized_but_skipped(case: Case) -> Iterator[Hit]:
    hits = [(m, p.skipped_by) for p in case.params if p.quantizable and p.skipped_by for m in p.members if m.quantized]
    if hits:
        entries = sorted({e for _, by in hits for e in by})
        yield Hit(Severity.FAILS, _names([m for m, _ in hits]), f"quantized, but skipped by {', '.join(entries)}")


@rule(Code.WEIGHT_NOT_A_COLUMN, of_files=True)
def quantized_shape(case: Case) -> Iterator[Hit]:
    hits = [w for w in case.checkpoint.weights.values() if w.state and w.tensor.info.dtype == "U8"]
    names = tuple(w.name for w in hits if w.tensor.info.shape != (w.tensor.info.nbytes, 1))
    if names:
        yield Hit(Severity.FAILS, names, "quantized, but not as a column [N, 1]")


@rule(Code.QUANT_STORAGE, of_files=True)
def quantized_storage(case: Case) -> Iterator[Hit]:
    said = case.checkpoint.quantization.get("bnb_4bit_quant_storage") or "uint8"
    quantized = [w for w in case.checkpoint.weights.values() if w.state]
    stored = {w.name: w.tensor.info.dtype for w in quantized if w.tensor.info.dtype != "U8"}
    if stored or (said != "uint8" and quantized):
        what = ", ".join(sorted(set(stored.values()))) if stored else f"{said}, says config.json"
        yield Hit(Severity.FAILS, tuple(stored), f"quantized bytes stored as {what}; vLLM takes uint8 alone")


@rule(Code.QUANT_STATE, of_files=True)
def quant_state(case: Case) -> Iterator[Hit]:
    for error in case.checkpoint.damaged:
        where = (error.where or "").split(": ", 1)
        yield Hit(Severity.FAILS, tuple(where[1:]), str(error), "the quant state is lost; quantize the model again")
    for m, words in shape_mismatches(case.members, case.model):
        told = f"{m.weight.tensor.shard}: {m.weight.name}: {words}"
        reason = "config.json or the quant state lies; quantize the model again"
        yield Hit(Severity.FAILS, (m.weight.name,), told, reason)


@rule(Code.ORPHANED_STATE_TENSORS, of_files=True)
def orphans(case: Case) -> Iterator[Hit]:
    bound: list[str] = []
    lost: list[str] = []
    damaged = damaged_weights(case.checkpoint)
    for name in case.checkpoint.orphans:
        if (split := split_state_tensor(name)) is not None and split[0] in damaged:
            continue  # the weight is there, and BNB201 tells of it
        weight = name.split(".quant_state.")[0]
        (bound if ".quant_state." in name and weight in case.checkpoint.weights else lost).append(name)
    if bound:
        yield Hit(Severity.FAILS, tuple(bound), "quant state of a weight that is stored in full precision")
    if lost:
        yield Hit(Severity.NOTE, tuple(lost), "statistics that belong to no quantized weight; they are ignored")


@rule(Code.INDEX, of_files=True)
def index(case: Case) -> Iterator[Hit]:
    c = case.checkpoint
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


@rule(Code.DUPLICATE, of_files=True)
def duplicate(case: Case) -> Iterator[Hit]:
    for name, shards in case.checkpoint.duplicates.items():
        yield Hit(Severity.WRONG, (name,), f"lies in {' and '.join(shards)}")


@rule(Code.PICKLES, of_files=True)
def pickles(case: Case) -> Iterator[Hit]:
    names = tuple(f for f in case.checkpoint.source.files if is_pickle(f))
    if names:
        yield Hit(Severity.NOTE, names, "a pickle by its name, which could run code as it is loaded; not opened")


@rule(Code.CODE, of_files=True)
def code(case: Case) -> Iterator[Hit]:
    names = tuple(f for f in case.checkpoint.source.files if is_code(f))
    if names:
        yield Hit(Severity.NOTE, names, "a program by its name; not run")
    if "auto_map" in case.checkpoint.config:
        yield Hit(Severity.NOTE, (), "config.json: auto_map names code to run under trust_remote_code; not run")


@rule(Code.SKIP_ENTRY)
def skip_entry(case: Case) -> Iterator[Hit]:
    plain = [m for p in case.params if p.quantized for m in p.members if not m.quantized]
    modules = {p.module for p in case.params}
    unknown = tuple(
        entry
        for entry in case.checkpoint.skip_modules
        if not any(vllm_skips(entry, module) for module in modules)
        and any(transformers_skips(entry, gemma4.hf_module(case.model, m.place.module)) for m in plain)
    )
    if unknown:
        yield Hit(Severity.NOTE, unknown, "skip entry in transformers' spelling alone; vLLM does not honor it")


@rule(Code.PER_LAYER_CONFIG)
def per_layer_config(case: Case) -> Iterator[Hit]:
    text = case.model.text_config
    if case.release.per_layer_config == "read":
        return
    if has_axial_rope(case.checkpoint.config):
        words = "config.json: vision_config's rope_type \"axial\" is unknown to the release's transformers"
        yield Hit(Severity.FAILS, (), words)
    if text.get("per_layer_config") is None:
        return
    old = legacy_head_config(case.model)
    if case.release.per_layer_config == "ignored":
        defaults = {"global_head_dim": gemma4.DEFAULT_GLOBAL_HEAD_DIM, "num_global_key_value_heads": None}
        if old is not None and all(old.get(k, d) == d for k, d in defaults.items()):
            return
    message = "config.json: text_config.per_layer_config is not read by the release's transformers"
    yield Hit(Severity.FAILS, (), message, None if old is not None else "it says more than the older keys can")


@rule(Code.UNKNOWN_CLASS)
def unknown_class(case: Case) -> Iterator[Hit]:
    if case.model.family.name not in case.release.families:
        name = case.model.family.architecture
        yield Hit(Severity.FAILS, (), f"{name} is unknown to the release", f"{name} exists from vLLM 0.23.0 on")


@rule(Code.PLUGIN)
def plugin(case: Case) -> Iterator[Hit]:
    here = case.installed
    if case.release.plugin == "required" and (here is None or here.plugin is None):
        severity = Severity.NOTE if here is None else Severity.FAILS
        reason = "not in the checkpoint: pip install vllm-bnb-plugin; beside vLLM 0.28, 'vllm-bnb-plugin<0.0.3'"
        yield Hit(severity, (), "needs vllm-bnb-plugin", reason)
    if case.release.plugin == "required" and here is not None and (limit := unfit_plugin(here)) is not None:
        words = f"vllm-bnb-plugin {here.plugin} is installed, which does not work with vLLM {here.version}"
        yield Hit(Severity.FAILS, (), words, f"not in the checkpoint: pip install 'vllm-bnb-plugin<{limit}'")
    if case.release.plugin == "refused" and here is not None and here.plugin is not None:
        reason = "not in the checkpoint: pip uninstall vllm-bnb-plugin"
        yield Hit(Severity.FAILS, (), "vllm-bnb-plugin is installed, which this release cannot bear", reason)


@rule(Code.TRANSFORMERS_REQUANTIZES, of_files=True)
def transformers_requantizes(case: Case) -> Iterator[Hit]:
    entries = case.checkpoint.skip_modules
    hits = [
        m
        for m in hf_linears(case.members, case.model)
        if not m.quantized
        and m.place.role != "lm_head"
        and not matching_entries(entries, gemma4.hf_module(case.model, m.place.module), transformers_skips)
    ]
    if hits:
        yield Hit(Severity.NOTE, _names(hits), "transformers would quantize this weight again; no entry names it")


def hf_linears(members: Sequence[Member], model: Model) -> list[Member]:
    """The projections that transformers has a linear module for: not k and v of shared layers, nor v where K serves."""
    return [
        m
        for m in members
        if m.place.role in gemma4.LINEAR_ROLES - {"expert"}
        and not (m.place.part in ("k_proj", "v_proj") and m.place.layer is not None and model.kv_shared(m.place.layer))
        and not is_explicit_v(m, model)
    ]


@rule(Code.MOE_REFUSED)
def moe_refused(case: Case) -> Iterator[Hit]:
    if case.model.moe and case.release.moe is None:
        yield Hit(
            Severity.FAILS,
            (),
            "a mixture of experts, which the release refuses under bitsandbytes",
            "no 4-bit form exists for this release; vLLM "
            f"{', '.join(r.name for r in ranges() if r.moe)} can load one, and --bf16 works everywhere",
        )


@rule(Code.FUSED_EXPERTS)
def fused_experts(case: Case) -> Iterator[Hit]:
    names = tuple(n for n in case.checkpoint.weights if gemma4.place(n).role == "fused_experts")
    if names and case.release.moe is not None:
        quantized = any(case.checkpoint.weights[n].quantized for n in names)
        reason = (
            "they are quantized, and cannot be split without dequantizing; --bf16 dequantizes them"
            if quantized
            else None
        )
        yield Hit(Severity.FAILS, names, "experts in one tensor; the release takes them quantized, one by one", reason)


@rule(Code.EXPERT_PREFIX)
def expert_prefix(case: Case) -> Iterator[Hit]:
    hits = [m for m in case.members if m.place.role == "expert" and m.place.prefix != case.release.moe]
    if hits and case.release.moe is not None:
        yield Hit(Severity.FAILS, _names(hits), f"the release looks for {case.release.moe}.N")


@rule(Code.FP4_EXPERTS)
def fp4_experts(case: Case) -> Iterator[Hit]:
    hits = [m for m in case.members if m.place.role == "expert" and m.weight.form == "fp4"]
    if hits and case.release.moe is not None:
        yield Hit(Severity.WRONG, _names(hits), "FP4, decoded by vLLM with the NF4 table")


@rule(Code.MIXED_EXPERTS)
def uneven_experts(case: Case) -> Iterator[Hit]:
    layers: dict[int | None, dict[str, list[Member]]] = {}
    for m in case.members if case.release.moe is not None else ():
        if m.place.role == "expert" and (s := m.weight.state) is not None:
            layers.setdefault(m.place.layer, {}).setdefault(f"{s.dtype} in blocks of {s.blocksize}", []).append(m)
    reason = "they would have to be quantized again; --bf16 dequantizes those of one dtype"
    for kinds in (k for k in layers.values() if len(k) > 1):
        words = f"quantized as {' and '.join(kinds)}; one is taken for all of a layer"
        yield Hit(Severity.FAILS, _names([m for ms in kinds.values() for m in ms]), words, reason)


@rule(Code.INT8)
def int8(case: Case) -> Iterator[Hit]:
    names = tuple(m.weight.name for m in case.members if m.weight.int8)
    if not names:
        return
    reason = "what would need a weight dequantized needs the whole model dequantized: --bf16"
    if case.model.moe:
        yield Hit(Severity.FAILS, names, "LLM.int8 in a mixture of experts, which vLLM refuses", reason)
    else:
        yield Hit(Severity.NOTE, names, "LLM.int8, of which a repair fixes the skip list and V alone", reason)
