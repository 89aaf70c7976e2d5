"""Which model a checkpoint is: its family, and whether bnbfix has anything to say about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.checkpoint import CONFIG, Checkpoint
from ..errors import NotApplicable
from . import gemma4
from .family import Family, Model

DRY_LOAD = "--dry-load"  # what can be asked about a model that no rule knows


def read_model(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes.

    Raises NotApplicable for a family that bnbfix does not know, InputError for a value that makes no sense.
    """
    return gemma4.read_config(_detect_family(config), config)


def _detect_family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in gemma4.FAMILIES:
        if named == family.architecture or (named is None and model_type in family.model_types):
            return family
    what = named or model_type
    words = f"is {what!r:.100}, not a Gemma4 model" if what else "config names no architecture"
    raise NotApplicable(words, where=CONFIG, command=DRY_LOAD)


def check_applicable(checkpoint: Checkpoint) -> Model:
    """The model, if this is a bitsandbytes checkpoint of a known family; raises NotApplicable with what it is."""
    model = read_model(checkpoint.config)
    what, method = model.family.architecture, checkpoint.quantization.get("quant_method")
    quantized = sum(w.quantized for w in checkpoint.weights.values())
    unquantized = not checkpoint.quantization and not quantized and not checkpoint.damaged
    if method is None and unquantized and not _describe_mlx(checkpoint):
        raise NotApplicable(
            f"is an unquantized {what}; there is nothing to check", where=checkpoint.source.name, command=DRY_LOAD
        )
    if method not in ("bitsandbytes", None):
        raise NotApplicable(f"is a {what} quantized with {method}, not bitsandbytes", where=checkpoint.source.name)
    if method is None and (mlx := _describe_mlx(checkpoint)):
        raise NotApplicable(f"is a {what} quantized by MLX ({mlx}), not by bitsandbytes", where=checkpoint.source.name)
    if method is None:
        raise NotApplicable(
            f"is a {what} with {quantized} quantized weights, but config.json has no bitsandbytes quantization_config",
            where=checkpoint.source.name,
            hint="Take config.json from the model that was quantized.",
        )
    return model


def _describe_mlx(checkpoint: Checkpoint) -> str | None:
    """How MLX quantized a checkpoint, by the key that it writes into config.json; None where it did not."""
    said = checkpoint.config.get("quantization") or checkpoint.quantization
    if isinstance(said, dict) and type(said.get("bits")) is int and type(said.get("group_size")) is int:
        return f"{said['bits']} bits in groups of {said['group_size']}"
    return None
