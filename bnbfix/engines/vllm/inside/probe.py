"""Builds a model's skeleton and lists its linear modules, and what each skip entry skips."""

from __future__ import annotations

import json
import os
from typing import Any

from .engine import build_skeleton


def describe_modules(model: Any) -> list[dict[str, Any]]:
    """Every projection of a vLLM model: {name, quantized}; experts under the name of their module."""
    import torch

    out = []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        kind = type(method).__name__
        known = method is not None and any(x in kind for x in ("Linear", "MoE", "Embedding", "Experts"))
        if known or isinstance(module, torch.nn.Linear):  # the towers are torch's own up to 0.22
            out.append({"name": name, "quantized": "BitsAndBytes" in kind})
    return out


def describe_skips(folder: str, names: list[str]) -> dict[str, list[str]]:
    """For each skip entry of the folder's config the modules that the release's own function skips for it."""
    try:
        from vllm.model_executor.layers.quantization.bitsandbytes import is_layer_skipped_bnb
    except ImportError:
        from vllm_bnb_plugin.quantization.utils import is_layer_skipped_bnb
    with open(os.path.join(folder, "config.json")) as f:
        entries = (json.load(f).get("quantization_config") or {}).get("llm_int8_skip_modules") or []
    return {entry: [name for name in names if is_layer_skipped_bnb(name, [entry])] for entry in entries}


def run(folder: str) -> dict[str, Any]:
    """{modules, skips} of the skeleton."""
    _, model = build_skeleton(folder)
    modules = describe_modules(model)
    return {"modules": modules, "skips": describe_skips(folder, [m["name"] for m in modules])}
