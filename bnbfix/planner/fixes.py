"""Decides what a repair changes: a checkpoint and the releases it shall load in, in; edits, out. Pure.

One rule of thumb stands behind every decision: precision is never lost. Where a quantized and an ordinary tensor meet in
one parameter the quantized one is dequantized. Experts alone, which no release leaves plain, are quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Checkpoint, Weight
from ..engines.vllm.parameters import Member, by_layer, is_quantizable, module_of, parameters, projections
from ..engines.vllm.releases import ReleaseRange
from ..models import gemma4
from ..models.gemma4 import Model, has_axial_rope, legacy_head_config
from ..rules.experts import ExpertChange, decide_experts
from ..rules.rule import Code
from ..rules.skip_list import matching_entries, shortest_prefixes, transformers_skips, vllm_skips
from ..rules.weights import hf_linears, is_explicit_v, missing_shared


@dataclass(frozen=True)
class Insert:
    """A weight that is added: an exact copy of `donor`, quant-state tensors included, or its dequantized values."""

    name: str
    donor: Weight
    dequantize: bool
    code: Code


@dataclass(frozen=True)
class ConfigEdit:
    """One change of config.json: a value set at a path of keys, or the key removed."""

    path: tuple[str, ...]
    value: Any
    code: Code | None  # None: the user asked
    remove: bool = False


@dataclass(frozen=True)
class Changes:
    """All decisions. The code with each says which finding asked for it."""

    dequantize: Mapping[str, Code | None]  # weight names; None: the user asked
    drop: Mapping[str, Code]  # tensor names, beside the quant-state tensors of dequantized weights
    insert: tuple[Insert, ...]
    retype: Mapping[str, Code]  # quantized weights whose header entry becomes U8 [N, 1]
    experts: Mapping[str, ExpertChange]  # tensors of experts
    quantize: Mapping[str, Code]  # plain weights that become NF4 (partially quantized groups, where the user asked)
    stack: Mapping[str, tuple[Weight, ...]]  # experts stored one by one that become one plain tensor
    config: tuple[ConfigEdit, ...]


def decide(
    checkpoint: Checkpoint, model: Model, releases: Sequence[ReleaseRange], partial_groups: str = "dequantize"
) -> Changes:
    """The edits after which no release of the target finds anything that an edit can mend.

    `partial_groups` says what becomes of a fused group that is partially quantized: its quantized members are dequantized, or its
    plain ones quantized.
    """
    members = projections(checkpoint)
    dequantize: dict[str, Code | None] = {}
    drop: dict[str, Code] = dict.fromkeys(checkpoint.orphans, Code.ORPHANED_STATE_TENSORS)
    if any(r.k_eq_v == "refuses_v" for r in releases):
        explicit = [m for m in members if is_explicit_v(m, model)]
        members = [m for m in members if m not in explicit]
        for m in explicit:
            drop |= dict.fromkeys((m.weight.name, *m.weight.state_tensor_names().values()), Code.EXPLICIT_V)
    for m in _never_quantized(members, model, releases):
        dequantize[m.weight.name] = (
            Code.QUANTIZED_LM_HEAD if m.place.role == "lm_head" else Code.QUANTIZED_IN_UNQUANTIZED
        )
    for m in _unsafe_pixels(members, releases):
        dequantize.setdefault(m.weight.name, Code.QUANTIZED_PIXEL_PROJECTION)
    needs_v = any(r.k_eq_v == "needs_v" for r in releases)
    if needs_v and any(r.k_eq_v == "refuses_v" for r in releases):
        for m in _k_eq_v(members, model):
            if m.quantized:
                dequantize.setdefault(m.weight.name, Code.K_EQ_V_WITHOUT_V)
    quantize: dict[str, Code] = {}
    if partial_groups == "quantize":
        plain = _plain_among_quantized(
            members, model, releases, dequantize, _grown(checkpoint, members, model, releases)
        )
        quantize = dict.fromkeys(plain, Code.PARTIALLY_QUANTIZED)
    _make_groups_agree(members, model, releases, dequantize, set(quantize))
    insert: list[Insert] = []
    if needs_v:
        insert += _insert_v(members, model, dequantize)
    if any(r.kv_shared == "needs_kv" for r in releases):
        insert += insert_shared(checkpoint, members, model, dequantize)
    experts = decide_experts(checkpoint, model, releases)
    retype = _retype(checkpoint, {*dequantize, *experts, *drop})
    after = [(m, m.weight.name in quantize or stays_quantized(m, dequantize)) for m in members]
    after += [(Member(i.donor, gemma4.place(i.name)), not i.dequantize and i.donor.quantized) for i in insert]
    config = tuple(_config(checkpoint, model, releases, after))
    return Changes(dequantize, drop, tuple(insert), retype, experts, quantize, {}, config)


def _never_quantized(members: Sequence[Member], model: Model, releases: Sequence[ReleaseRange]) -> Iterable[Member]:
    for release in releases:
        for p in parameters(members, model, release, ()):
            if not p.quantizable and p.role != "expert":
                yield from (m for m in p.members if m.quantized)


def _unsafe_pixels(members: Sequence[Member], releases: Sequence[ReleaseRange]) -> Iterable[Member]:
    if any(r.pixel_projection == "needs_transformers_5_13" for r in releases):
        yield from (m for m in members if m.place.role == "pixel_projection" and m.quantized)


def _k_eq_v(members: Sequence[Member], model: Model) -> Iterable[Member]:
    for m in members:
        layer = m.place.layer
        if m.place.role == "attention" and m.place.part != "o_proj" and layer is not None:
            if model.k_serves_as_v(layer):
                yield m


def _make_groups_agree(
    members: Sequence[Member],
    model: Model,
    releases: Sequence[ReleaseRange],
    dequantize: dict[str, Code | None],
    becoming: Set[str],
) -> None:
    """Dequantizes the quantized members of every fused group that holds a plain one, until none is left."""
    changed = True
    while changed:
        changed = False
        for release in releases:
            for p in parameters(members, model, release, ()):
                quantized = [m for m in p.members if m.quantized and m.weight.name not in dequantize]
                plain = [m for m in p.members if m not in quantized and m.weight.name not in becoming]
                if quantized and plain and p.role != "expert":
                    own = next((dequantize[m.weight.name] for m in p.members if m.weight.name in dequantize), None)
                    dequantize |= dict.fromkeys((m.weight.name for m in quantized), own or Code.PARTIALLY_QUANTIZED)
                    changed = True


def _grown(
    checkpoint: Checkpoint, members: Sequence[Member], model: Model, releases: Sequence[ReleaseRange]
) -> set[int]:
    """Layers whose attention gets a k or v that is a copy: of what is quantized first there is nothing to copy yet."""
    out: set[int] = set()
    if any(r.kv_shared == "needs_kv" for r in releases):
        out |= {layer for layer, part in missing_shared(checkpoint, model, members).values() if part != "k_norm"}
    if any(r.k_eq_v == "needs_v" for r in releases):
        at = by_layer(members)
        for (layer, part), k in at.items():
            if part == "k_proj" and not k.quantized and model.k_serves_as_v(layer) and (layer, "v_proj") not in at:
                out.add(layer)
    return out


def _plain_among_quantized(
    members: Sequence[Member],
    model: Model,
    releases: Sequence[ReleaseRange],
    dequantize: Mapping[str, Code | None],
    grown: Set[int],
) -> Iterable[str]:
    """The plain members of groups that are partially quantized, and stay quantized as far as is decided."""
    for release in releases:
        for p in parameters(members, model, release, ()):
            if p.role == "attention" and p.layer in grown:
                continue
            plain = [m.weight for m in p.members if not m.quantized]
            if not all(w.tensor.info.dtype in qs.DTYPES.values() for w in plain):
                continue  # bitsandbytes quantizes no other dtype
            if (
                p.partially_quantized
                and p.quantizable
                and not any(m.weight.name in dequantize or m.weight.int8 for m in p.members)
            ):
                yield from (w.name for w in plain)


def stays_quantized(m: Member, dequantize: Mapping[str, Code | None]) -> bool:
    return m.quantized and m.weight.name not in dequantize


def _insert_v(members: Sequence[Member], model: Model, dequantize: Mapping[str, Code | None]) -> Iterable[Insert]:
    at = by_layer(members)
    for (layer, part), k in sorted(at.items()):
        if part == "k_proj" and model.k_serves_as_v(layer) and (layer, "v_proj") not in at:
            if stays_quantized(k, dequantize):
                name = k.weight.name.replace("k_proj", "v_proj")
                yield Insert(name, k.weight, False, Code.K_EQ_V_WITHOUT_V)


def insert_shared(
    checkpoint: Checkpoint, members: Sequence[Member], model: Model, dequantize: dict[str, Code | None]
) -> Iterable[Insert]:
    """k, v and k_norm of kv-shared layers, in the form of the layer's q. Their values are never used."""
    at = by_layer(members)
    missing = missing_shared(checkpoint, model, members)
    donors: dict[str, list[Weight]] = {}
    for name, (layer, part) in missing.items():
        others = (_same_in(checkpoint, name, layer, other) for other in model.kv_donors(layer))
        donors[name] = [w for w in others if w is not None]
        if part != "k_norm" and donors[name] and not any(w.quantized for w in donors[name]):
            # No quantized donor anywhere: what the group has becomes plain.
            for m in (at.get((layer, other)) for other in ("q_proj", "k_proj", "v_proj")):
                if m is not None and m.quantized:
                    dequantize.setdefault(m.weight.name, Code.SHARED_WITHOUT_KV)
    for name, (layer, part) in missing.items():
        if not (found := donors[name]):
            continue  # nothing to copy; the fresh scan after the repair says what is still missing
        quantized = next((w for w in found if w.quantized), None)
        if part != "k_norm" and quantized is not None and stays_quantized(at[layer, "q_proj"], dequantize):
            yield Insert(name, quantized, False, Code.SHARED_WITHOUT_KV)
        else:
            yield Insert(name, found[0], part != "k_norm" and found[0].quantized, Code.SHARED_WITHOUT_KV)


def _same_in(checkpoint: Checkpoint, name: str, layer: int, other: int) -> Weight | None:
    return checkpoint.weights.get(name.replace(f"layers.{layer}.", f"layers.{other}."))


def _retype(checkpoint: Checkpoint, rewritten: Set[str]) -> dict[str, Code]:
    out = {}
    for w in checkpoint.weights.values():
        if w.state is not None and w.name not in rewritten:
            if w.tensor.info.dtype != "U8":
                out[w.name] = Code.QUANT_STORAGE
            elif w.tensor.info.shape != (w.tensor.info.nbytes, 1):
                out[w.name] = Code.WEIGHT_NOT_A_COLUMN
    return out


def _config(
    checkpoint: Checkpoint, model: Model, releases: Sequence[ReleaseRange], after: Sequence[tuple[Member, bool]]
) -> Iterable[ConfigEdit]:
    quantization = checkpoint.quantization
    skip = skip_list(checkpoint.skip_modules, model, releases, after)
    if skip != checkpoint.skip_modules:
        yield ConfigEdit(("quantization_config", "llm_int8_skip_modules"), list(skip), Code.SKIP_ENTRY)
    if (quantization.get("bnb_4bit_quant_storage") or "uint8") != "uint8" and not quantization.get("load_in_8bit"):
        yield ConfigEdit(("quantization_config", "bnb_4bit_quant_storage"), "uint8", Code.QUANT_STORAGE)
    yield from legacy_config_edits(checkpoint, model, releases)


def legacy_config_edits(checkpoint: Checkpoint, model: Model, releases: Sequence[ReleaseRange]) -> Iterable[ConfigEdit]:
    """The older form of what transformers 5.19 writes in a newer, where a release of the target does not read that."""
    if all(r.per_layer_config == "read" for r in releases):
        return
    if has_axial_rope(checkpoint.config):
        yield ConfigEdit(("vision_config", "rope_parameters", "rope_type"), "default", Code.PER_LAYER_CONFIG)
    if (old := legacy_head_config(model)) is not None:
        at = () if model.text_only else ("text_config",)
        for key, value in old.items():
            yield ConfigEdit((*at, key), value, Code.PER_LAYER_CONFIG)
        yield ConfigEdit((*at, "per_layer_config"), None, Code.PER_LAYER_CONFIG, remove=True)


def skip_list(
    entries: Sequence[str], model: Model, releases: Sequence[ReleaseRange], members: Sequence[tuple[Member, bool]]
) -> tuple[str, ...]:
    """llm_int8_skip_modules that vLLM and transformers both obey, for members and whether each is quantized.

    Entries stay where they are, but for those that name a quantized module; what is missing is added at the end, vLLM's
    spelling before transformers'.
    """
    linears = {m.place for m in hf_linears([m for m, _ in members], model)}
    hf = {gemma4.hf_module(model, m.place.module): quantized for m, quantized in members if m.place in linears}
    spellings = [(hf, transformers_skips)]
    for release in reversed(releases):
        ours: dict[str, bool] = {}
        for m, quantized in members:
            module = module_of(m.place, model, release)
            if module is not None and is_quantizable(m.place, model, release) and m.place.role != "expert":
                ours[module] = quantized
        spellings.insert(0, (ours, vllm_skips))

    def matches_quantized(entry: str) -> bool:
        return any(matches(entry, m) for modules, matches in spellings for m, quantized in modules.items() if quantized)

    out = [e for e in entries if not matches_quantized(e)]
    for modules, matches in spellings:
        so_far = tuple(out)
        plain = [m for m, quantized in modules.items() if not quantized and not matching_entries(so_far, m, matches)]
        plain = [m for m in plain if m != "lm_head" or out]
        out += shortest_prefixes(plain, matches, matches_quantized)
    if out and not entries and "lm_head" not in out:
        out.append("lm_head")  # without a list transformers leaves lm_head alone; with one it has to be named
    return tuple(dict.fromkeys(out))
