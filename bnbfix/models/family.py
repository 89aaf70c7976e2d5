"""What is said of a model class, a model and a tensor."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

FULL, SLIDING = "full_attention", "sliding_attention"


def read_path(config: Mapping[str, Any], path: str) -> Any:
    """The value at a path of config.json's keys and numbers of list items, joined by dots; None where there is none."""
    at: Any = config
    for key in path.split("."):
        if isinstance(at, list) and key.isdigit():
            at = at[int(key)] if int(key) < len(at) else None
        else:
            at = at.get(key) if isinstance(at, Mapping) else None
    return at


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


class Family(NamedTuple):
    """A model class as vLLM and transformers know it."""

    name: str
    architecture: str
    model_types: tuple[str, ...]
    text_only: bool = False


class TensorRole(NamedTuple):
    """What a tensor is in its model: the kind of module, the layer it is in, and the last part of a linear's name."""

    name: str  # canonical: as transformers spells it for the multimodal class
    kind: str
    layer: int | None = None
    part: str | None = None
    prefix: str | None = None  # of a per-expert weight
    number: int | None = None  # of an expert with a tensor of its own


@dataclass(frozen=True)
class Model:
    """What a config says, as far as loading depends on it. Layers count from 0."""

    family: Family
    layer_types: tuple[str, ...]
    k_eq_v: bool
    first_shared: int  # layers from here on take K and V from an earlier layer
    moe: bool
    text_config: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> Hashable:
        """Equal for configs that ask for the same parameters."""
        text = self.config.get("text_config")
        inner = {"text_config": _without_quantization(text)} if isinstance(text, dict) else {}
        try:
            return json.dumps(_without_quantization(self.config) | inner, sort_keys=True)
        except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists in lists
            return object()

    def read(self, path: str) -> Any:
        """The value at a path of config.json's keys, joined by dots; None where there is none."""
        if path.endswith("layer_types") and self.layer_types:
            return list(self.layer_types)
        return read_path(self.text_config if self.family.text_only else self.config, path)

    def k_serves_as_v(self, layer: int | None) -> bool:
        """Return True if this layer has no v_proj of its own."""
        return layer is not None and self.k_eq_v and layer < self.first_shared and self.layer_types[layer] == FULL

    def kv_shared(self, layer: int | None) -> bool:
        """Return True if this layer takes K and V from an earlier one."""
        return layer is not None and self.first_shared <= layer < len(self.layer_types)

    def kv_donors(self, layer: int) -> list[int]:
        """Layers whose k and v have the shapes of this shared layer's; first the one it really takes them from."""
        kind = self.layer_types[layer]
        return [i for i in reversed(range(self.first_shared)) if self.layer_types[i] == kind]
