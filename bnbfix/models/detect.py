"""Which model a checkpoint is: its family, and whether bnbfix has anything to say about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint.checkpoint import CONFIG, Checkpoint
from ..errors import NotApplicable
from . import gemma4
from .family import Family, Model

DRY_LOAD = "--dry-load"  # what can be asked about a model that no rule knows
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_model(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes.

    Raises NotApplicable for a part of a model, or without a class; InputError for a value that makes no sense.
    """
    family = _detect_gemma4(config)
    if family is not None:
        return gemma4.read_config(family, config)
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return _read_other_config(architectures[0], config)
    words = f"is {model_type!r:.100}, without a class in architectures" if model_type else "names no architecture"
    raise NotApplicable(words, where=CONFIG, command=DRY_LOAD)


def _detect_gemma4(config: Mapping[str, Any]) -> Family | None:
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in gemma4.FAMILIES:
        if named == family.architecture or (named is None and model_type in family.model_types):
            return family
    what = str(named or model_type)
    if m := re.fullmatch(r"(Gemma4(?:Unified)?)(|Text|Vision|Audio)Model", what):
        part, whole = f"the {m[2].lower()} part" if m[2] else "the inner model", f"{m[1]}ForConditionalGeneration"
        hint = f"Save the whole model: load it as {whole} and call its save_pretrained."
        raise NotApplicable(f"is {what}, {part} of a {whole}, saved without the rest", where=CONFIG, hint=hint)
    if re.match(r"Gemma4\w*(Assistant|DSpark|MTP|Eagle)|gemma4\w*_assistant", what):
        hint = "Scan the model that it drafts for; vLLM is given both: --speculative-config."
        raise NotApplicable(f"is {what:.100}, a drafter for speculative decoding", where=CONFIG, hint=hint)
    return None


def _read_other_config(architecture: str, config: Mapping[str, Any]) -> Model:
    """The model of a class in which K never serves as V."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    counts = (inner.get(key) for key in _EXPERT_COUNTS)
    kinds, first_shared = _read_sharing(inner)
    model_type = config.get("model_type")
    plain = isinstance(model_type, str) and re.fullmatch(r"\w{1,64}", model_type, re.ASCII)
    name = str(model_type) if plain else architecture
    return Model(
        family=Family(name, architecture, (name,), text_only=inner is config),
        layer_types=tuple(kinds),
        k_eq_v=False,
        first_shared=first_shared,
        moe=any(type(n) is int and n > 1 for n in counts),
        text_config=inner,
        config=config,
    )


def _read_sharing(inner: Mapping[str, Any]) -> tuple[list[str], int]:
    """The kinds of a model's layers, and the first that takes K and V from an earlier one; nothing where none does."""
    kinds, shared = inner.get("layer_types"), inner.get("num_kv_shared_layers")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        return [], 0
    if type(shared) is not int or not 0 < shared < len(kinds) or len(kinds) != inner.get("num_hidden_layers"):
        return [], 0
    return kinds, len(kinds) - shared


def check_applicable(checkpoint: Checkpoint) -> Model:
    """The model, if this is a bitsandbytes checkpoint; raises NotApplicable with what it is."""
    model = read_model(checkpoint.config)
    what, where = model.family.architecture[:100], checkpoint.source.name
    method = checkpoint.quantization.get("quant_method")
    if method not in ("bitsandbytes", None):
        raise NotApplicable(f"is a {what} quantized with {method}, not bitsandbytes", where=where)
    if method is None and (mlx := _describe_mlx(checkpoint)):
        hint = "mlx-lm serves it; for vLLM, quantize the original model with bitsandbytes."
        raise NotApplicable(f"is a {what} quantized by MLX ({mlx}), not by bitsandbytes", where=where, hint=hint)
    if method is None and not _has_quant_states(checkpoint):
        if checkpoint.damaged:
            raise NotApplicable(
                f"is a {what} with quantized bytes, but without quant states of bitsandbytes", where=where
            )
        raise NotApplicable(f"is an unquantized {what}; there is nothing to check", where=where, command=DRY_LOAD)
    return model


def _has_quant_states(checkpoint: Checkpoint) -> bool:
    """Return True if bitsandbytes quantized a weight, whatever config.json says; its quant state may be invalid."""
    if any(w.quantized for w in checkpoint.weights.values()):
        return True
    return bool(checkpoint.damaged) and any(".quant_state." in name for name in checkpoint.orphans)


def _describe_mlx(checkpoint: Checkpoint) -> str | None:
    """How MLX quantized a checkpoint, by the key that it writes into config.json; None where it did not."""
    said = checkpoint.config.get("quantization") or checkpoint.quantization
    if isinstance(said, dict) and type(said.get("bits")) is int and type(said.get("group_size")) is int:
        return f"{said['bits']} bits in groups of {said['group_size']}"
    return None
