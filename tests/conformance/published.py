"""Sizes of published models, as their config.json has them: formulas of sizes must hold for them as well.

The configs in families.py are small, so that vLLM answers quickly; a number that is two keys' in all of them is one
key's in a published model. transformers alone is asked about these, on the meta device. Layers are fewer where each
has many experts.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _text(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any) -> Config:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv} | more


def _vision(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> Config:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads} | more


def _gemma4(*sizes: int, **more: Any) -> Config:
    layers = sizes[3]
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6 + 1)
    more["layer_types"] = [*kinds[: layers - 1], "full_attention"]
    return _text(*sizes, head_dim=256, global_head_dim=512, **more)


def _gemma3n(hidden: int, intermediate: int, layers: int, shared: int) -> Config:
    text = _text(262400, hidden, intermediate, layers, 8, 2, head_dim=256, num_kv_shared_layers=shared)
    text |= {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * (layers // 5), "laurel_rank": 64}
    text |= {"vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256}
    audio = {"hidden_size": 1536, "vocab_size": 128, "conf_num_attention_heads": 8, "conf_num_hidden_layers": 12}
    audio |= {"sscp_conv_channel_size": [128, 32], "conf_conv_kernel_size": 5}
    sparse = {"activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10)}
    return {
        "text_config": text | sparse,
        "vision_config": {"hidden_size": 2048, "vocab_size": 128},
        "audio_config": audio,
    }


_LLAMA_1B = _text(128256, 2048, 8192, 16, 32, 8, head_dim=64)
_LLAMA_3B = _text(128256, 3072, 8192, 28, 24, 8, head_dim=128)
_MISTRAL_7B = _text(32768, 4096, 14336, 32, 32, 8, head_dim=128)
_MISTRAL_24B = _text(131072, 5120, 32768, 40, 32, 8, head_dim=128)
_QWEN25_7B = _text(152064, 3584, 18944, 28, 28, 4)
_QWEN25_14B = _text(152064, 5120, 13824, 48, 40, 8)
_QWEN3_8B = _text(151936, 4096, 12288, 36, 32, 8, head_dim=128)
_QWEN3_4B = _text(151936, 2560, 9728, 36, 32, 8, head_dim=128)
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_MROPE_3 = _MROPE | {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
_QWEN3_VISION = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304}
_QWEN3_VISION |= {"out_hidden_size": 4096, "num_position_embeddings": 2304}
_GEMMA3_1B = _text(262144, 1152, 6912, 26, 4, 1, head_dim=256)
_GEMMA3_27B = _text(262208, 5376, 21504, 62, 32, 16, head_dim=128)
_CLIP = _vision(1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768)
_SIGLIP = _vision(1152, 4304, 27, 16, image_size=896, patch_size=14)
_LLAMA4 = _text(202048, 5120, 8192, 6, 40, 8, head_dim=128, intermediate_size_mlp=16384)
_LLAMA4_VISION = _vision(1408, 5632, 34, 16, image_size=336, patch_size=14, vision_output_dim=4096)
_LLAMA4_VISION |= {"projector_input_dim": 4096, "projector_output_dim": 4096}
_GEMMA4_VISION = _vision(1152, 4304, 27, 16, num_key_value_heads=16, head_dim=72, position_embedding_size=10240)
_GEMMA4_SMALL_VISION = _vision(768, 3072, 16, 12, num_key_value_heads=12, head_dim=64, position_embedding_size=10240)
_GEMMA4_AUDIO = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "output_proj_dims": 1536}
_GEMMA4_31B = _gemma4(262144, 5376, 21504, 60, 32, 16, num_global_key_value_heads=4)
_GEMMA4_12B = _gemma4(262144, 3840, 15360, 48, 16, 8, num_global_key_value_heads=1)
_GEMMA4_26B = _gemma4(
    262144, 2816, 2112, 9, 16, 8, num_global_key_value_heads=2, num_experts=128, moe_intermediate_size=704
)
_GEMMA4_E4B = _gemma4(262144, 2560, 10240, 42, 8, 2, vocab_size_per_layer_input=262144)

SIZES: dict[str, list[Config]] = {
    "LlamaForCausalLM": [_LLAMA_1B, _LLAMA_3B, _MISTRAL_24B],  # in the last, heads times head_dim is not hidden_size
    "MistralForCausalLM": [_MISTRAL_7B, _MISTRAL_24B],
    "Qwen2ForCausalLM": [_QWEN25_7B, _QWEN25_14B],
    "Qwen3ForCausalLM": [_QWEN3_8B, _QWEN3_4B],
    "Gemma3ForCausalLM": [_GEMMA3_1B, _GEMMA3_27B],
    "Phi3ForCausalLM": [
        _text(200064, 3072, 8192, 32, 24, 8),  # Phi-4-mini
        _text(32064, 5120, 17920, 40, 40, 10),  # Phi-3-medium
    ],
    "GraniteForCausalLM": [_text(49155, 4096, 12800, 40, 32, 8), _text(49155, 2048, 8192, 40, 32, 8)],
    "Gemma2ForCausalLM": [
        _text(256000, 3584, 14336, 42, 16, 8, head_dim=256),  # 9B
        _text(256000, 4608, 36864, 46, 32, 16, head_dim=128),  # 27B
    ],
    "Glm4ForCausalLM": [_text(151552, 4096, 13696, 40, 32, 2, head_dim=128)],
    "Qwen3MoeForCausalLM": [
        _text(151936, 2048, 6144, 6, 32, 4, head_dim=128, num_experts=128, moe_intermediate_size=768)
    ],
    "Gemma3nForConditionalGeneration": [
        _gemma3n(2048, 16384, 35, 15),  # E4B
        _gemma3n(2048, 8192, 30, 10),  # E2B
        {"text_config": {"altup_num_inputs": 3}},  # 4 in all that are published
    ],
    "GptOssForCausalLM": [
        _text(201088, 2880, 2880, 4, 64, 8, head_dim=64, num_local_experts=32, num_experts_per_tok=4),  # 20b
        _text(201088, 2880, 2880, 2, 64, 8, head_dim=64, num_local_experts=128, num_experts_per_tok=4),  # 120b
    ],
    "Gemma3ForConditionalGeneration": [
        {"text_config": _GEMMA3_27B, "vision_config": _SIGLIP},
        {"vision_config": {"image_size": 384}},  # not a multiple of the patch size
    ],
    "Qwen2_5_VLForConditionalGeneration": [
        {
            "text_config": _QWEN25_7B | {"rope_parameters": _MROPE},
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "num_heads": 16,
                "intermediate_size": 3420,
                "out_hidden_size": 3584,
            },
        },
        {"vision_config": {"patch_size": 16}},  # all that are published have 14
    ],
    "Qwen2VLForConditionalGeneration": [
        {
            "text_config": _QWEN25_7B | {"rope_parameters": _MROPE},
            "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
        },
        {"vision_config": {"patch_size": 16}},  # all that are published have 14
    ],
    "Qwen3VLForConditionalGeneration": [
        {
            "text_config": _QWEN3_8B | {"rope_parameters": _MROPE_3},
            "vision_config": _QWEN3_VISION | {"deepstack_visual_indexes": [8, 16, 24]},
        },
        {"vision_config": {"patch_size": 14}},  # all that are published have 16
    ],
    "Qwen3_5ForConditionalGeneration": [
        {
            "text_config": _text(248320, 4096, 12288, 32, 16, 4, head_dim=256)
            | {
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
            },
            "vision_config": _QWEN3_VISION,
        },
        {"vision_config": {"patch_size": 14}},  # all that are published have 16
    ],
    "Idefics3ForConditionalGeneration": [  # Idefics3-8B
        {"text_config": _text(128259, 4096, 14336, 32, 32, 8), "vision_config": _SIGLIP | {"image_size": 364}}
    ],
    "SmolVLMForConditionalGeneration": [  # SmolVLM2-2.2B
        {
            "text_config": _text(49280, 2048, 8192, 24, 32, 32),
            "vision_config": _SIGLIP | {"image_size": 384},
            "scale_factor": 3,
        }
    ],
    "InternVLForConditionalGeneration": [  # InternVL3-8B
        {
            "text_config": _QWEN25_7B,
            "vision_config": _vision(1024, 4096, 24, 16, image_size=[448, 448], patch_size=[14, 14]),
        }
    ],
    "Mistral3ForConditionalGeneration": [
        {"text_config": _MISTRAL_24B, "vision_config": _vision(1024, 4096, 24, 16, head_dim=64, patch_size=14)}
    ],
    "LlavaNextForConditionalGeneration": [{"text_config": _MISTRAL_7B, "vision_config": _CLIP}],
    "Llama4ForConditionalGeneration": [
        {"text_config": _LLAMA4 | {"num_local_experts": 16}, "vision_config": _LLAMA4_VISION},  # Scout
        {"text_config": _LLAMA4 | {"num_local_experts": 32, "interleave_moe_layer_step": 2}},  # as in Maverick
        {"vision_config": {"projector_input_dim": 160, "projector_output_dim": 224, "vision_output_dim": 224}},
    ],
    "Gemma4ForConditionalGeneration": [
        {"text_config": _GEMMA4_31B, "vision_config": _GEMMA4_VISION},
        {"text_config": _GEMMA4_E4B, "vision_config": _GEMMA4_SMALL_VISION, "audio_config": _GEMMA4_AUDIO},
        {
            "text_config": _GEMMA4_26B,
            "vision_config": {"head_dim": 48},  # heads times head_dim is hidden_size in all that are published
            "audio_config": {"subsampling_conv_channels": [48, 24]},
        },
    ],
    "Gemma4ForCausalLM": [_GEMMA4_31B, _GEMMA4_E4B, _GEMMA4_26B],
    "Gemma4UnifiedForConditionalGeneration": [{"text_config": _GEMMA4_12B}],
}
