"""Gemma4: its classes, and the layers that a config describes.

Sources: transformers models/gemma4/modeling_gemma4.py, models/gemma4_unified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.checkpoint import CONFIG
from ..errors import InputError
from .family import FULL, SLIDING, Family, Model

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
