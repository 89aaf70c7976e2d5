"""What a family says about its models: layers, roles of tensors. Each family fills this in in a file of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """A model class as vLLM and transformers know it."""

    name: str
    architecture: str
    model_types: tuple[str, ...]
    text_only: bool = False


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is in its model: the kind of module, the layer it is in, and the last part of a linear's name."""

    name: str  # canonical: as transformers spells it for the multimodal class
    kind: str
    layer: int | None = None
    part: str | None = None
    prefix: str | None = None  # of a per-expert weight

    @property
    def module(self) -> str:
        """The canonical name of its module."""
        return self.name.removesuffix(".weight")


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

    def read(self, path: str) -> Any:
        """The value at a path of config.json's keys, joined by dots; None where there is none."""
        if path.endswith("layer_types") and self.layer_types:
            return list(self.layer_types)
        at: Any = self.text_config if self.family.text_only else self.config
        for key in path.split("."):
            at = at.get(key) if isinstance(at, Mapping) else None
        return at

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


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_any_config(architecture: str, config: Mapping[str, Any]) -> Model:
    """The model of a class that shares no K or V between layers or projections, which is most of them."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    counts = (inner.get(key) for key in _EXPERT_COUNTS)
    model_type = config.get("model_type")
    plain = isinstance(model_type, str) and re.fullmatch(r"\w{1,64}", model_type, re.ASCII)
    name = str(model_type) if plain else architecture
    return Model(
        family=Family(name, architecture, (name,), text_only=inner is config),
        layer_types=(),
        k_eq_v=False,
        first_shared=0,
        moe=any(type(n) is int and n > 1 for n in counts),
        text_config=inner,
        config=config,
    )
