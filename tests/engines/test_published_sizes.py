"""What profiles expect of published models, by their config.json: sizes that no small checkpoint tells apart."""

from __future__ import annotations

from typing import Any

import pytest

from bnbfix.engines.targets import find_range
from bnbfix.engines.vllm.recorded import RecordedExpectation, expect
from bnbfix.models.detect import read_model

MISTRAL_7B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
MISTRAL_7B |= {"num_key_value_heads": 8, "vocab_size": 32064}
QWEN25_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN25_7B |= {"num_key_value_heads": 4, "vocab_size": 152064}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {"architectures": ["Qwen2ForCausalLM"], **QWEN25_7B},
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
    },
    "Gemma-3-27B": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
        },
    },
    "Gemma-3-4B": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14},
    },
    "Qwen2.5-VL-7B": {  # without a text_config
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **QWEN25_7B,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
        },
    },
    "Qwen3-VL-8B": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "Qwen3-Coder-480B-A35B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 6144,
        "intermediate_size": 8192,
        "moe_intermediate_size": 2560,
        "num_hidden_layers": 62,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 160,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
    },
    "llava-v1.6-mistral-7b": {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "text_config": MISTRAL_7B,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
    },
}
SIZES = [
    ("Llama-3.2-3B", "model.layers.27.self_attn.k_proj.weight", (1024, 3072)),
    ("Qwen2.5-7B", "model.layers.0.self_attn.v_proj.bias", (512,)),
    ("Phi-4-mini", "model.layers.31.self_attn.qkv_proj.weight", (5120, 3072)),
    ("Gemma-3-27B", "language_model.model.layers.61.self_attn.q_proj.weight", (4096, 5376)),
    ("Gemma-3-27B", "vision_tower.vision_model.embeddings.position_embedding.weight", (4096, 1152)),
    ("Gemma-3-4B", "language_model.model.layers.0.self_attn.o_proj.weight", (2560, 2048)),
    ("Gemma-3-4B", "language_model.model.embed_tokens.weight", (262208, 2560)),
    ("Qwen2.5-VL-7B", "model.layers.27.self_attn.k_proj.weight", (512, 3584)),
    ("Qwen2.5-VL-7B", "visual.merger.mlp.0.weight", (5120, 5120)),
    ("Qwen2.5-VL-7B", "visual.merger.mlp.2.bias", (3584,)),
    ("Qwen3-VL-8B", "model.visual.merger.linear_fc2.weight", (4096, 4608)),
    ("Qwen3-VL-8B", "model.visual.patch_embed.proj.weight", (1152, 3, 2, 16, 16)),
    ("Qwen3-Coder-480B-A35B", "model.layers.61.mlp.experts.159.down_proj.weight", (6144, 2560)),
    ("llava-v1.6-mistral-7b", "vision_tower.vision_model.embeddings.position_embedding.weight", (577, 1024)),
]


def expectation(name: str) -> RecordedExpectation:
    release = find_range("0.32.0")
    assert release is not None
    found = expect(read_model(CONFIGS[name]), release)
    assert isinstance(found, RecordedExpectation)
    return found


@pytest.mark.parametrize(("model", "tensor", "shape"), SIZES)
def test_shape_in_a_published_model(model: str, tensor: str, shape: tuple[int, ...]) -> None:
    place = expectation(model).place(tensor)
    assert place is not None
    assert not place.refused
    assert place.shape == shape


def test_experts_are_counted_by_the_key_of_published_configs() -> None:
    place = expectation("Qwen3-Coder-480B-A35B").place("model.layers.61.mlp.experts.160.down_proj.weight")
    assert place is not None
    assert place.refused


def test_layers_after_the_one_whose_output_is_used_are_not_waited_for() -> None:
    found, layers = expectation("llava-v1.6-mistral-7b"), "vision_tower.vision_model.encoder.layers."
    awaited = {name.removeprefix(layers).split(".")[0] for name in found.parameters if name.startswith(layers)}
    assert awaited == {str(i) for i in range(23)}
    assert found.ignores(layers + "23.mlp.fc1.weight")
