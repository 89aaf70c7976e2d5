"""The model classes that are surveyed: configs of two sizes or more for each, and what their layers may depend on.

Sizes differ between the configs of a class, so that a size found in a shape tells which key of config.json it is from.
A feature is [kind, path, ...] as bnbfix.engines.vllm.profiles evaluates it; paths are keys of config.json joined by
dots.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
import tiny_gemma4 as gemma4

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A class of models, by its configs and what its parameters may depend on."""

    configs: list[Config]
    features: dict[str, list[str]] = field(default_factory=dict)
    renames: list[tuple[str, str]] = field(default_factory=list)  # other names to try: (part of a name, what instead)
    processor: str | None = None  # of a processor_config.json that the class needs


def change(config: Config, **changes: Any) -> Config:
    """A copy with values set at paths, written with __ for the dots."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, key = path.split("__")
        at = config
        for parent in parents:
            at = at[parent]
        at[key] = value
    return config


def _gemma4(name: str, **changes: Any) -> list[Config]:
    """A tiny Gemma4 in two sizes."""
    spec = gemma4.FAMILIES[name]
    small = gemma4._config(spec, None, False)
    at = "text_config__" if spec.vision else ""
    pattern = small["text_config"]["layer_types"] if spec.vision else small["layer_types"]
    sizes: Config = {
        "vocab_size": 576,
        "vocab_size_per_layer_input": 576,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 9,
        "layer_types": (pattern * 2)[:8] + ["full_attention"],
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 96,
        "global_head_dim": 160,
    }
    text = small["text_config"] if spec.vision else small
    if text["num_global_key_value_heads"]:
        sizes["num_global_key_value_heads"] = 2
    if text["hidden_size_per_layer_input"]:
        sizes |= {"hidden_size_per_layer_input": 80, "num_kv_shared_layers": 3}
    if text.get("enable_moe_block"):
        sizes |= {"num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 128}
    large = change(small, **{at + key: value for key, value in sizes.items()}, **changes)
    return [small, large]


_VISION = {
    "vision_config__hidden_size": 128,
    "vision_config__intermediate_size": 224,
    "vision_config__num_hidden_layers": 5,
    "vision_config__num_attention_heads": 4,
    "vision_config__num_key_value_heads": 4,
    "vision_config__patch_size": 8,
    "vision_config__position_embedding_size": 144,
}
_AUDIO = {
    "audio_config__hidden_size": 128,
    "audio_config__num_hidden_layers": 7,
    "audio_config__num_attention_heads": 4,
    "audio_config__output_proj_dims": 112,
    "audio_config__conv_kernel_size": 7,
}


def _unlike() -> list[Config]:
    """Models that do not exist, in which features come apart that go together in those that do."""
    dense, small = (_gemma4(name)[0] for name in ("dense31b", "e4b"))
    return [
        change(dense, audio_config=small["audio_config"], text_config__attention_k_eq_v=False),
        change(small, audio_config=None, vision_config__use_clipped_linears=False, text_config__num_kv_shared_layers=0),
        change(dense, text_config__hidden_size_per_layer_input=48, vision_config__standardize=False),
    ]


_GEMMA4_TEXT = {
    "full": ["item", "layer_types", "full_attention"],
    "kv_shared": ["last", "num_kv_shared_layers", "num_hidden_layers"],
    "k_eq_v": ["true", "attention_k_eq_v"],
    "wide": ["true", "use_double_wide_mlp"],
    "moe": ["true", "enable_moe_block"],
    "per_layer": ["true", "hidden_size_per_layer_input"],
}
_GEMMA4 = {
    **{name: [kind, f"text_config.{path}", *rest] for name, (kind, path, *rest) in _GEMMA4_TEXT.items()},
    "kv_shared": ["last", "text_config.num_kv_shared_layers", "text_config.num_hidden_layers"],
    "vision": ["true", "vision_config"],
    "audio": ["true", "audio_config"],
    "standardize": ["true", "vision_config.standardize"],
    "clipped_vision": ["true", "vision_config.use_clipped_linears"],
    "clipped_audio": ["true", "audio_config.use_clipped_linears"],
}
_K_AS_V = [(r"self_attn\.k_proj", "self_attn.v_proj")]

FAMILIES: dict[str, Family] = {
    "Gemma4ForConditionalGeneration": Family(
        [
            *_gemma4("dense31b", **_VISION),
            *_gemma4("e4b", **_VISION, **_AUDIO),
            *_gemma4("e2b", **_VISION, **_AUDIO),
            *_gemma4("moe26b", **_VISION),
            *_unlike(),
        ],
        _GEMMA4,
        _K_AS_V,
        "Gemma4",
    ),
    "Gemma4ForCausalLM": Family(
        [
            *_gemma4("text"),
            *(
                c["text_config"] | {"architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16"}
                for c in [c for name in ("e4b", "e2b", "moe26b") for c in _gemma4(name)] + _unlike()
            ),
        ],
        _GEMMA4_TEXT,
        _K_AS_V,
    ),
    "Gemma4UnifiedForConditionalGeneration": Family(
        _gemma4(
            "unified12b",
            vision_config__hidden_size=192,
            vision_config__mm_embed_dim=160,
            vision_config__mm_posemb_size=144,
            vision_config__output_proj_dims=192,
            vision_config__patch_size=8,
            audio_config__audio_embed_dim=320,
        ),
        {k: v for k, v in _GEMMA4.items() if k in ("full", "k_eq_v", "vision", "audio")},
        _K_AS_V,
        "Gemma4Unified",
    ),
}
