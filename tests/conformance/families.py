"""The model classes that are surveyed: configs of two sizes or more for each, and what their layers may depend on.

Sizes differ between the configs of a class, so that a size found in a shape tells which key of config.json it is from.
A feature is [kind, path, ...] as bnbfix.engines.vllm.profiles evaluates it; paths are keys of config.json joined by
dots.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
import tiny_gemma4 as gemma4
from published import SIZES

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A class of models, by its configs and what its parameters may depend on."""

    configs: list[Config]
    features: dict[str, list[str]] = field(default_factory=dict)
    sizes: list[Config] = field(default_factory=list)  # more of them, to tell sizes apart: asked of transformers only
    renames: list[tuple[str, str]] = field(default_factory=list)  # other names to try: (part of a name, what instead)
    processor: str | None = None  # of a processor_config.json that the class needs
    preprocessor: Config | None = None  # preprocessor_config.json, without which some releases build no such model
    transposed_experts: bool = False  # [experts, hidden, inner] in the tensor of all experts
    interleaved_experts: bool = False  # of which gate and up alternate
    expert_lists: bool = False  # published with a list of linear modules for each projection, biases and all
    numbered_experts: bool = False  # of which transformers makes a list of linear modules where it quantizes
    dialects: list[tuple[str, str]] = field(default_factory=list)  # beginnings of the same names: here, and elsewhere
    unbound: list[str] = field(default_factory=list)  # parameters that get no quant state, as dry loads say
    dtype_read: list[str] = field(default_factory=list)  # parameters in whose dtype vLLM makes a number
    inner_names: list[tuple[str, str]] = field(default_factory=list)  # parts of names: as a tool writes them, and here


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
        "layer_types": [*(pattern * 2)[:8], "full_attention"],
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
    "tied": ["true", "tie_word_embeddings"],
    "full": ["item", "layer_types", "full_attention"],
    "kv_shared": ["last", "num_kv_shared_layers", "num_hidden_layers"],
    "k_eq_v": ["true", "attention_k_eq_v"],
    "wide": ["true", "use_double_wide_mlp"],
    "moe": ["true", "enable_moe_block"],
    "per_layer": ["true", "hidden_size_per_layer_input"],
}
_GEMMA4 = {
    **{name: [kind, f"text_config.{path}", *rest] for name, (kind, path, *rest) in _GEMMA4_TEXT.items()},
    "tied": ["true", "tie_word_embeddings"],
    "kv_shared": ["last", "text_config.num_kv_shared_layers", "text_config.num_hidden_layers"],
    "vision": ["true", "vision_config"],
    "audio": ["true", "audio_config"],
    "standardize": ["true", "vision_config.standardize"],
    "clipped_vision": ["true", "vision_config.use_clipped_linears"],
    "clipped_audio": ["true", "audio_config.use_clipped_linears"],
}
_K_AS_V = [(r"self_attn\.k_proj", "self_attn.v_proj")]

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LARGE = SMALL | {
    "vocab_size": 576,
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
DERIVED = {key: value for key, value in SMALL.items() if key != "head_dim"}  # classes without a head_dim
DERIVED_LARGE = {k: v for k, v in LARGE.items() if k in DERIVED} | {"hidden_size": 256, "num_attention_heads": 4}
DERIVED_LARGE["num_key_value_heads"] = 1
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
SIGLIP_LARGE = SIGLIP | {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 5,
    "image_size": 112,
    "patch_size": 28,
}
QWEN_VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 128, "intermediate_size": 160}
QWEN_VISION_LARGE = {"depth": 5, "hidden_size": 96, "num_heads": 3, "out_hidden_size": 192, "intermediate_size": 224}
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
MROPE_LARGE = MROPE | {"mrope_section": [8, 12, 12]}
QWEN_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
}
VISION_MODEL = [("vision_tower.", "vision_tower.vision_model.")]  # transformers 5, and 4
FIRST_LINEAR = {"first_linear": ["number", "0"]}  # of a projector that is a list of modules
UNTIED = {"tie_word_embeddings": False}
TIED = {"tied": ["true", "tie_word_embeddings"]}
TIED_MULTIMODAL = TIED | {"tied_text": ["true", "text_config.tie_word_embeddings"]}


def _text(
    architecture: str, model_type: str, *variants: Config, sizes: tuple[Config, Config] = (SMALL, LARGE), **both: Any
) -> Family:
    """A text-only class in two sizes, and in variants of the small one."""
    named = {"architectures": [architecture], "model_type": model_type}
    small = [named | sizes[0] | UNTIED | both | v for v in ({}, {"tie_word_embeddings": True}, *variants)]
    large = named | sizes[1] | UNTIED | both
    return Family([*small, large], TIED)


def _multimodal(
    architecture: str,
    model_type: str,
    text: tuple[Config, Config],
    vision: tuple[Config, Config],
    features: dict[str, list[str]] | None = None,
    *,
    sizes: tuple[Config, Config] = (SMALL, LARGE),
    dialects: list[tuple[str, str]] | None = None,
    preprocessor: Config | None = None,
    **both: Any,
) -> Family:
    """A multimodal class in two sizes, and small with embeddings that are tied by either key."""
    named = {"architectures": [architecture], "model_type": model_type} | both | UNTIED
    texts = (sizes[0] | UNTIED | text[0], sizes[1] | UNTIED | text[1])
    small, large = (named | {"text_config": t, "vision_config": v} for t, v in zip(texts, vision, strict=True))
    configs = [small, change(small, tie_word_embeddings=True), change(small, text_config__tie_word_embeddings=True)]
    return Family(
        [*configs, large], TIED_MULTIMODAL | (features or {}), dialects=dialects or [], preprocessor=preprocessor
    )


def _gemma3n_text(sizes: Config, layers: int, shared: int) -> Config:
    """Text of Gemma 3n; it has altup_num_inputs 4 in every model."""
    large = sizes is LARGE
    return sizes | {
        "model_type": "gemma3n_text",
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "activation_sparsity_pattern": [0.95] + [0.0] * (layers - 1),
        "vocab_size_per_layer_input": 544 if large else 480,
        "hidden_size_per_layer_input": 80 if large else 48,
        "laurel_rank": 40 if large else 24,
        "sliding_window": 64,
        "tie_word_embeddings": True,
    }


# With the class named, as in published ones: vLLM 0.19 goes by it.
_NAMED_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_NAMED_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN35_ROPE = MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 0.25}
_QWEN35 = {
    "model_type": "qwen3_5_text",
    "partial_rotary_factor": 0.25,
    "rope_parameters": _QWEN35_ROPE | {"mrope_section": [2, 1, 1]},
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_conv_kernel_dim": 4,
}
_GEMMA3N_AUDIO = {
    "hidden_size": 64,
    "vocab_size": 18,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 3,
    "sscp_conv_channel_size": [40, 20],
}
_GEMMA3N_AUDIO_LARGE = {
    "hidden_size": 160,
    "vocab_size": 30,
    "conf_num_attention_heads": 5,
    "conf_num_hidden_layers": 5,
    "conf_conv_kernel_size": 7,
    "sscp_conv_channel_size": [56, 28],
}
_BIAS = {"attention_bias": ["true", "attention_bias"], "mlp_bias": ["true", "mlp_bias"]}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_OTHERS: dict[str, Family] = {
    "LlamaForCausalLM": replace(
        _text("LlamaForCausalLM", "llama", {"attention_bias": True}, {"mlp_bias": True}), features=TIED | _BIAS
    ),
    "MistralForCausalLM": _text("MistralForCausalLM", "mistral"),
    "Qwen2ForCausalLM": _text("Qwen2ForCausalLM", "qwen2", sizes=(DERIVED, DERIVED_LARGE)),
    "Qwen3ForCausalLM": replace(
        _text("Qwen3ForCausalLM", "qwen3", {"attention_bias": True}),
        features=TIED | {"attention_bias": ["true", "attention_bias"]},
    ),
    "Gemma3ForCausalLM": _text("Gemma3ForCausalLM", "gemma3_text", sliding_window=64),
    "Phi3ForCausalLM": _text("Phi3ForCausalLM", "phi3"),
    "GraniteForCausalLM": _text("GraniteForCausalLM", "granite"),
    "Gemma2ForCausalLM": replace(  # vLLM builds it with tied embeddings only
        (_gemma2 := _text("Gemma2ForCausalLM", "gemma2", sliding_window=64)),
        configs=[config | {"tie_word_embeddings": True} for config in (_gemma2.configs[0], _gemma2.configs[-1])],
    ),
    "Glm4ForCausalLM": _text("Glm4ForCausalLM", "glm4", attention_bias=True),
    "Qwen3MoeForCausalLM": Family(
        [
            {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | UNTIED | size | _MOE | more
            for size, more in (
                (SMALL, {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []}),
                (
                    SMALL,
                    {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [], "tie_word_embeddings": True},
                ),
                (
                    LARGE,
                    {"num_experts": 5, "decoder_sparse_step": 1, "mlp_only_layers": [1], "moe_intermediate_size": 96},
                ),
            )
        ],
        TIED | {"sparse": ["every", "decoder_sparse_step"], "dense": ["in", "mlp_only_layers"]},
    ),
    "Gemma3ForConditionalGeneration": _multimodal(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        ({"model_type": "gemma3_text", "sliding_window": 64}, {"model_type": "gemma3_text", "sliding_window": 64}),
        (SIGLIP | {"vision_use_head": False}, SIGLIP_LARGE | {"vision_use_head": False}),
        dialects=VISION_MODEL,
        mm_tokens_per_image=16,
        image_token_index=10,
        boi_token_index=11,
        eoi_token_index=12,
    ),
    "Qwen2_5_VLForConditionalGeneration": _multimodal(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        ({"rope_parameters": MROPE}, {"rope_parameters": MROPE_LARGE}),
        (
            QWEN_VISION | {"fullatt_block_indexes": [1]},
            QWEN_VISION_LARGE | {"fullatt_block_indexes": [1], "out_hidden_size": 256},
        ),
        FIRST_LINEAR,
        sizes=(DERIVED, DERIVED_LARGE),
        preprocessor=QWEN_PREPROCESSOR,
    ),
    "Qwen2VLForConditionalGeneration": _multimodal(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        ({"rope_parameters": MROPE}, {"rope_parameters": MROPE_LARGE}),
        (
            {"depth": 3, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
            {"depth": 5, "embed_dim": 96, "hidden_size": 256, "num_heads": 3, "mlp_ratio": 4},
        ),
        FIRST_LINEAR,
        sizes=(DERIVED, DERIVED_LARGE),
        preprocessor=QWEN_PREPROCESSOR,
    ),
    "Qwen3VLForConditionalGeneration": _multimodal(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        (
            {"rope_parameters": MROPE | {"mrope_interleaved": True}},
            {"rope_parameters": MROPE_LARGE | {"mrope_interleaved": True}},
        ),
        (
            QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
            QWEN_VISION_LARGE | {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 144},
        ),
    ),
    "Qwen3_5ForConditionalGeneration": _multimodal(
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        (
            _QWEN35 | {"layer_types": ["linear_attention", "full_attention"] * 2},
            _QWEN35
            | {
                "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
                "rope_parameters": _QWEN35_ROPE | {"mrope_section": [4, 2, 2]},
                "linear_key_head_dim": 64,
                "linear_value_head_dim": 96,
                "linear_num_key_heads": 5,
                "linear_num_value_heads": 10,
                "linear_conv_kernel_dim": 8,
            },
        ),
        (QWEN_VISION | {"num_position_embeddings": 64}, QWEN_VISION_LARGE | {"num_position_embeddings": 144}),
        {"full": ["item", "text_config.layer_types", "full_attention"]},
    ),
    **{
        f"{name}ForConditionalGeneration": _multimodal(
            f"{name}ForConditionalGeneration",
            name.lower(),
            ({"model_type": "llama"}, {"model_type": "llama"}),
            (SIGLIP, SIGLIP_LARGE),
            scale_factor=2,
            image_token_id=10,
        )
        for name in ("Idefics3", "SmolVLM")
    },
    "InternVLForConditionalGeneration": _multimodal(
        "InternVLForConditionalGeneration",
        "internvl",
        (_NAMED_QWEN2, _NAMED_QWEN2),
        (
            SIGLIP | {"image_size": [56, 56], "patch_size": [14, 14]},
            SIGLIP_LARGE | {"image_size": [112, 112], "patch_size": [28, 28]},
        ),
        sizes=(DERIVED, DERIVED_LARGE),
        image_token_id=10,
    ),
    "Mistral3ForConditionalGeneration": _multimodal(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        ({"model_type": "mistral"}, {"model_type": "mistral"}),
        (SIGLIP | {"model_type": "pixtral", "head_dim": 32}, SIGLIP_LARGE | {"model_type": "pixtral", "head_dim": 48}),
        image_token_index=10,
    ),
    "LlavaNextForConditionalGeneration": _multimodal(
        "LlavaNextForConditionalGeneration",
        "llava_next",
        (_NAMED_MISTRAL, _NAMED_MISTRAL),
        (
            SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 64},
            SIGLIP_LARGE | {"model_type": "clip_vision_model", "projection_dim": 96},
        ),
        features={"unused": ["after", "vision_feature_layer", "vision_config.num_hidden_layers"]},
        dialects=VISION_MODEL,
        image_token_index=10,
    ),
    "Llama4ForConditionalGeneration": replace(
        _multimodal(
            "Llama4ForConditionalGeneration",
            "llama4",
            (
                {
                    "intermediate_size_mlp": 320,
                    "num_local_experts": 4,
                    "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 1,
                    "attention_chunk_size": 64,
                },
                {
                    "intermediate_size_mlp": 384,
                    "num_local_experts": 5,
                    "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 2,
                    "attention_chunk_size": 64,
                },
            ),
            (
                SIGLIP
                | {
                    "intermediate_size": 256,
                    "vision_output_dim": 64,
                    "projector_input_dim": 64,
                    "projector_output_dim": 64,
                    "pixel_shuffle_ratio": 0.5,
                },
                SIGLIP_LARGE
                | {
                    "intermediate_size": 384,
                    "vision_output_dim": 96,
                    "projector_input_dim": 96,
                    "projector_output_dim": 96,
                    "pixel_shuffle_ratio": 0.5,
                },
            ),
            {"moe": ["every", "text_config.interleave_moe_layer_step"]},
        ),
        transposed_experts=True,
        numbered_experts=True,
    ),
    "Gemma3nForConditionalGeneration": Family(
        [
            {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "tie_word_embeddings": True}
            | {"text_config": text, "vision_config": vision, "audio_config": audio}
            for text, vision, audio in (
                (_gemma3n_text(SMALL, 6, 2), {"hidden_size": 2048, "vocab_size": 16}, _GEMMA3N_AUDIO),
                (_gemma3n_text(LARGE, 8, 4), {"hidden_size": 1024, "vocab_size": 24}, _GEMMA3N_AUDIO_LARGE),
            )
        ],
        TIED | {"kv_shared": ["last", "text_config.num_kv_shared_layers", "text_config.num_hidden_layers"]},
        unbound=[  # gemma3n.py moves them into its self_decoder as it loads them
            "language_model.model.self_decoder.altup_projections.*.weight",
            "language_model.model.self_decoder.per_layer_model_projection.weight",
        ],
        dtype_read=["language_model.model.layers.*.altup.modality_router.weight"],  # gemma3n.py, router_input_scale
    ),
    "GptOssForCausalLM": Family(  # no variant with tied embeddings: vLLM's class never ties them
        [
            {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"} | UNTIED | size | more
            for size, more in (
                (SMALL, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
                (LARGE, {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 80}),
            )
        ],
        TIED,
        transposed_experts=True,
        interleaved_experts=True,
        expert_lists=True,
        inner_names=[("mlp.router.linear.", "mlp.router.")],
    ),
}

_FAMILIES: dict[str, Family] = _OTHERS | {
    "Gemma4ForConditionalGeneration": Family(
        [
            *_gemma4("dense31b", **_VISION),
            *_gemma4("e4b", **_VISION, **_AUDIO),
            *_gemma4("e2b", **_VISION, **_AUDIO),
            *_gemma4("moe26b", **_VISION),
            *_unlike(),
        ],
        _GEMMA4,
        renames=_K_AS_V,
        processor="Gemma4",
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
        renames=_K_AS_V,
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
        {k: v for k, v in _GEMMA4.items() if k in ("full", "k_eq_v", "tied", "vision", "audio")},
        renames=_K_AS_V,
        processor="Gemma4Unified",
    ),
}


def _set_sizes(config: Config, sizes: Config) -> Config:
    """A copy with other sizes, in the parts that it has."""
    out = config | {k: v for k, v in sizes.items() if not k.endswith("_config")}
    return out | {k: _set_sizes(config[k], v) for k, v in sizes.items() if k.endswith("_config") and config.get(k)}


FAMILIES = {
    name: replace(f, sizes=[_set_sizes(config, sizes) for sizes in SIZES.get(name, []) for config in f.configs])
    for name, f in _FAMILIES.items()
}
