"""What Gemma4 is made of: the family and layers that a config describes, and the role of every tensor name.

Names are compared in one canonical form, transformers' own: `model.language_model.layers.N...`,
`model.vision_tower...`. Older prefixes and text-only names are mapped to it. Sources: transformers
models/gemma4/modeling_gemma4.py, models/gemma4_unified; vLLM model_executor/models/gemma4*.py (`hf_to_vllm_mapper`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..checkpoint.checkpoint import CONFIG
from ..errors import InputError, NotApplicable

TEXT = "model.language_model."
FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_GLOBAL_HEAD_DIM = 512  # transformers' default where a config names none


@dataclass(frozen=True)
class Family:
    """A model class as vLLM and transformers know it."""

    name: str
    architecture: str
    model_types: tuple[str, ...]


FAMILIES = (
    Family("gemma4", "Gemma4ForConditionalGeneration", ("gemma4",)),
    Family("gemma4_text", "Gemma4ForCausalLM", ("gemma4_text",)),
    Family("gemma4_unified", "Gemma4UnifiedForConditionalGeneration", ("gemma4_unified",)),
)


@dataclass(frozen=True)
class Model:
    """What a config says, as far as loading depends on it. Layers count from 0."""

    family: Family
    layer_types: tuple[str, ...]
    k_eq_v: bool
    first_shared: int  # layers from here on take K and V from an earlier layer
    moe: bool
    audio: bool
    text_config: Mapping[str, Any]

    @property
    def text_only(self) -> bool:
        return self.family.name == "gemma4_text"

    def k_serves_as_v(self, layer: int) -> bool:
        """Has this layer no v_proj of its own?"""
        return self.k_eq_v and layer < self.first_shared and self.layer_types[layer] == FULL

    def kv_shared(self, layer: int) -> bool:
        """Does this layer take K and V from an earlier one?"""
        return self.first_shared <= layer < len(self.layer_types)

    def kv_donors(self, layer: int) -> list[int]:
        """Layers whose k and v have the shapes of this shared layer's, the one it really takes them from first."""
        kind = self.layer_types[layer]
        return [i for i in reversed(range(self.first_shared)) if self.layer_types[i] == kind]


def read_model(config: Mapping[str, Any]) -> Model:
    """The Gemma4 model that a config.json describes.

    Raises NotApplicable when it describes another model, InputError when a value it needs is missing or of another
    kind.
    """
    family = _family(config)
    text = config if family.name == "gemma4_text" else config.get("text_config")
    if not isinstance(text, dict):
        raise InputError("text_config is missing", where=CONFIG)
    layers = _integer(text, "num_hidden_layers", None)
    shared = _integer(text, "num_kv_shared_layers", 0)
    types = text.get("layer_types")
    if types is None:  # transformers' default: every sixth layer attends to everything
        types = [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not all(t in (FULL, SLIDING) for t in types):
        raise InputError(f"layer_types must name {FULL} or {SLIDING} for each of {layers} layers", where=CONFIG)
    types = [*types[:-1], FULL] if types else []  # transformers forces the last one, whatever the config says
    if shared > layers:
        raise InputError(f"num_kv_shared_layers is {shared}, of {layers} layers", where=CONFIG)
    return Model(
        family=family,
        layer_types=tuple(types),
        k_eq_v=bool(text.get("attention_k_eq_v")),
        first_shared=layers - shared,
        moe=bool(text.get("enable_moe_block")),
        audio=bool(config.get("audio_config")),
        text_config=text,
    )


def _family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if named == family.architecture or (named is None and model_type in family.model_types):
            return family
    what = named or model_type
    words = f"is {what!r:.100}, not a Gemma4 model" if what else "config names no architecture"
    raise NotApplicable(words, where=CONFIG)


def _integer(text: Mapping[str, Any], key: str, default: int | None) -> int:
    value = text.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value <= 10_000:
        raise InputError(f"{key} is {value!r:.100}, not a count", where=CONFIG)
    return value


def has_axial_rope(config: Mapping[str, Any]) -> bool:
    """Does the vision tower's rope carry the name that transformers 5.19 gave it? Older ones call it "default"."""
    vision = config.get("vision_config")
    rope = vision.get("rope_parameters") if isinstance(vision, dict) else None
    return isinstance(rope, dict) and rope.get("rope_type") == "axial"


def legacy_head_config(model: Model) -> dict[str, int] | None:
    """global_head_dim and num_global_key_value_heads that say the same as per_layer_config.

    None when it says more than these two keys can: a layer of another kind, or full-attention layers that differ.
    """
    per_layer = model.text_config.get("per_layer_config")
    full = {str(i) for i, kind in enumerate(model.layer_types) if kind == FULL}
    if not isinstance(per_layer, dict) or set(per_layer) not in (full, set()):
        return None
    first, *others = per_layer.values() or ({},)
    if not isinstance(first, dict) or any(v != first for v in others):
        return None
    # A layer without a head_dim of its own has that of the others; the older keys have another default.
    old = {"head_dim": model.text_config.get("head_dim")} | first
    keys = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    out = {keys[k]: v for k, v in old.items() if k in keys and type(v) is int}
    return out if len(out) == len(old) else None


# Roles: what decides which kind of parameter a tensor lands in. The first pattern that matches wins.
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"  # as Python writes it: no other spelling names the same module
_LAYER = rf"{re.escape(TEXT)}layers\.(?P<layer>{_NUMBER})\."
ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("attention", rf"{_LAYER}self_attn\.(?P<part>[qkvo]_proj)\.weight"),
        ("mlp", rf"{_LAYER}mlp\.(?P<part>(?:gate|up|down)_proj)\.weight"),
        ("per_layer", rf"{_LAYER}per_layer_(?:input_gate|projection)\.weight"),
        ("per_layer", rf"{re.escape(TEXT)}per_layer_model_projection\.weight"),
        ("router", rf"{_LAYER}router\.proj\.weight"),
        ("fused_experts", rf"{_LAYER}(?:moe\.)?experts\.(?P<part>gate_up_proj|down_proj)"),
        ("expert", rf"{_LAYER}(?P<prefix>moe\.experts|experts)\.{_NUMBER}\.(?P<part>(?:gate|up|down)_proj)\.weight"),
        ("other", rf"{_LAYER}"),
        ("pixel_projection", r"model\.vision_tower\.patch_embedder\.input_proj\.weight"),
        ("vision_tower", r"model\.vision_tower\..*\.weight"),
        ("audio_tower", r"model\.audio_tower\..*\.weight"),
        ("embedder", r"model\.embed_(?:vision|audio)\.embedding_projection\.weight"),
        ("patch_dense", r"model\.vision_embedder\.patch_dense\.weight"),
        ("lm_head", r"lm_head\.weight"),
    )
)
LINEAR_ROLES = frozenset(
    {"attention", "mlp", "per_layer", "router", "pixel_projection", "vision_tower", "audio_tower", "embedder"}
    | {"patch_dense", "lm_head", "expert"}
)
FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: its role, its layer in the language model, and the last part of a projection's name."""

    name: str  # canonical
    role: str
    layer: int | None = None
    part: str | None = None
    prefix: str | None = None  # of an expert stored one by one

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


def canonical(name: str) -> str:
    """A tensor name as transformers spells it."""
    for old, new in (("language_model.model.", TEXT), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(old):
            return new + name[len(old) :]
    if name.startswith(("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")):
        return "model." + name
    return re.sub(r"^model\.(?=layers\.|embed_tokens|norm\.|per_layer_)", TEXT, name)


@cache
def place(name: str) -> Place:
    """The role of a tensor, from its name alone. Whatever is no projection is `other`."""
    name = canonical(name)
    for role, pattern in ROLES:
        if (m := pattern.fullmatch(name)) or (role == "other" and (m := pattern.match(name))):
            groups = m.groupdict()
            layer = int(groups["layer"]) if groups.get("layer") else None
            return Place(name, role, layer, groups.get("part"), groups.get("prefix"))
    return Place(name, "other")


def hf_module(model: Model, module: str) -> str:
    """The name that transformers gives a canonical module; text-only models leave out "language_model."."""
    return module.replace(TEXT, "model.", 1) if model.text_only else module


def vllm_module(model: Model, where: Place, *, fused: bool) -> str:
    """The name that vLLM gives the module of a weight, inside its fused module if `fused`."""
    name = where.module
    if fused and where.part in FUSED:
        name = name.removesuffix(where.part) + FUSED[where.part]
    if model.text_only:
        return name.replace(TEXT, "model.", 1)
    if name.startswith(TEXT):
        return "language_model.model." + name[len(TEXT) :]
    return "language_model." + name if name == "lm_head" else name.removeprefix("model.")
