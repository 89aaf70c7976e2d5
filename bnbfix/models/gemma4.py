"""Gemma4: the layers that a config describes, and the role of every tensor name.

Names are compared in one canonical form, transformers' own: `model.language_model.layers.N...`,
`model.vision_tower...`. Older prefixes and text-only names are mapped to it. Sources: transformers
models/gemma4/modeling_gemma4.py, models/gemma4_unified; vLLM model_executor/models/gemma4*.py (`hf_to_vllm_mapper`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..checkpoint.checkpoint import CONFIG
from ..errors import InputError
from .family import FULL, SLIDING, Family, Model, TensorRole

TEXT = "model.language_model."
LM_HEAD = ("lm_head.weight", "language_model.lm_head.weight")
EMBEDDINGS = tuple(f"{prefix}embed_tokens.weight" for prefix in (TEXT, "language_model.model.", "model."))
FAMILIES = (
    Family("gemma4", "Gemma4ForConditionalGeneration", ("gemma4",)),
    Family("gemma4_text", "Gemma4ForCausalLM", ("gemma4_text",), text_only=True),
    Family("gemma4_unified", "Gemma4UnifiedForConditionalGeneration", ("gemma4_unified",)),
)


def read_config(family: Family, config: Mapping[str, Any]) -> Model:
    """The model that a config.json of a family describes; raises InputError when a value it needs makes no sense."""
    text = config.get("text_config", config if family.text_only else None)
    if not isinstance(text, dict):
        raise InputError("text_config is missing", where=CONFIG)
    layers = _read_count(text, "num_hidden_layers", None)
    shared = _read_count(text, "num_kv_shared_layers", 0)
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
        text_config=text,
        config=config,
    )


def _read_count(text: Mapping[str, Any], key: str, default: int | None) -> int:
    value = text.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value <= 10_000:
        raise InputError(f"{key} is {value!r:.100}, not a count", where=CONFIG)
    return value


# The kind of a tensor decides which parameter it lands in. The first pattern that matches wins.
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"  # as Python writes it: no other spelling names the same module
_EXPERT = r"(?:gate|up|down)_proj"
_LAYER = rf"{re.escape(TEXT)}layers\.(?P<layer>{_NUMBER})\."
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("attention", rf"{_LAYER}self_attn\.(?P<part>[qkvo]_proj)\.weight"),
        ("mlp", rf"{_LAYER}mlp\.(?P<part>(?:gate|up|down)_proj)\.weight"),
        ("per_layer", rf"{_LAYER}per_layer_(?:input_gate|projection)\.weight"),
        ("per_layer", rf"{re.escape(TEXT)}per_layer_model_projection\.weight"),
        ("router", rf"{_LAYER}router\.proj\.weight"),
        ("fused_experts", rf"{_LAYER}(?:moe\.)?experts\.(?P<part>gate_up_proj|down_proj)"),
        ("expert", rf"{_LAYER}(?P<prefix>moe\.experts|experts)\.{_NUMBER}\.(?P<part>{_EXPERT})\.weight"),
        ("pixel_projection", r"model\.vision_tower\.patch_embedder\.input_proj\.weight"),
        ("vision_tower", r"model\.vision_tower\..*\.weight"),
        ("audio_tower", r"model\.audio_tower\..*\.weight"),
        ("embedder", r"model\.embed_(?:vision|audio)\.embedding_projection\.weight"),
        ("patch_dense", r"model\.vision_embedder\.patch_dense\.weight"),
        ("lm_head", r"lm_head\.weight"),
        ("fused_experts", rf".*\.layers\.(?P<layer>{_NUMBER})\..*\.experts\.(?P<part>gate_up_proj|down_proj)"),
        (
            "expert",
            rf".*\.layers\.(?P<layer>{_NUMBER})\..*\.(?P<prefix>experts)\.{_NUMBER}\.(?P<part>{_EXPERT})\.weight",
        ),
        ("linear", r"(?!.*(?:norm|embed|_ln\d|\.ln_)\w*\.weight$).+\.weight"),
    )
)
LINEAR_KINDS = frozenset(
    {"attention", "mlp", "per_layer", "router", "pixel_projection", "vision_tower", "audio_tower", "embedder"}
    | {"patch_dense", "lm_head", "expert", "linear"}
)


def canonical(name: str) -> str:
    """A tensor name as transformers spells it for the multimodal class."""
    for old, new in (("language_model.model.", TEXT), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(old):
            return new + name[len(old) :]
    if name.startswith(("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")):
        return "model." + name
    return re.sub(r"^model\.(?=layers\.|embed_tokens|norm\.|per_layer_)", TEXT, name)


@cache
def classify_tensor(name: str) -> TensorRole:
    """The role of a tensor, from its name alone. Whatever is not a linear weight is `other`."""
    name = canonical(name)
    for kind, pattern in KINDS:
        if m := pattern.fullmatch(name):
            groups = m.groupdict()
            layer = int(groups["layer"]) if groups.get("layer") else None
            return TensorRole(name, kind, layer, groups.get("part"), groups.get("prefix"))
    return TensorRole(name, "other")
