#!/usr/bin/env python3
"""Makes tiny random Gemma4 checkpoints with the real module structure, quantized by bitsandbytes; works offline.

    python examples/tiny_gemma4.py OUT dense31b-all e4b-skip ...

Names, shapes and configs are those that transformers' `save_pretrained` writes for Gemma4, at tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

STANDARD_PREFIX = "model.language_model."  # of language tensors; older files have "language_model.model."
VOCAB = 512

SPECIAL_TOKENS = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
MEDIA_TOKENS = {
    "image": "<|image|>",
    "boi": "<|image>",
    "eoi": "<image|>",
    "audio": "<|audio|>",
    "boa": "<|audio>",
    "eoa": "<audio|>",
    "video": "<|video|>",
}
TOKENS = [*SPECIAL_TOKENS.values(), *MEDIA_TOKENS.values(), "<|turn>", "<turn|>"]

COMMON: Config = {"dtype": "bfloat16", "initializer_range": 0.02, "rms_norm_eps": 1e-06}
ATTENTION = {"attention_bias": False, "attention_dropout": 0.0, "hidden_activation": "gelu_pytorch_tanh"}
TEXT: Config = (
    COMMON
    | ATTENTION
    | {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": None,
        "head_dim": 32,
        "global_head_dim": 64,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
        "max_position_embeddings": 4096,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
)
K_EQ_V: Config = TEXT | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
NO_EXPERTS: Config = dict.fromkeys(["num_experts", "top_k_experts", "moe_intermediate_size"])
NO_EXPERTS |= {"enable_moe_block": False}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 4, "moe_intermediate_size": 64}
SMALL: Config = (
    TEXT
    | NO_EXPERTS
    | {
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
)
NESTED: Config = COMMON | {  # what every config has is written out for those inside another
    "_name_or_path": "",
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
VISION: Config = (
    NESTED
    | ATTENTION
    | {
        "model_type": "gemma4_vision",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 128,
        "default_output_length": 70,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": True,
        "use_clipped_linears": False,
    }
)
VISION_SMALL: Config = VISION | {"standardize": False, "use_clipped_linears": True}
VISION_UNIFIED: Config = NESTED | {
    "model_type": "gemma4_unified_vision",
    "hidden_size": 128,
    "mm_embed_dim": 128,
    "mm_posemb_size": 128,
    "output_proj_dims": 128,
    "num_soft_tokens": 70,
    "default_output_length": 70,
    "patch_size": 16,
    "pooling_kernel_size": 3,
}
AUDIO: Config = NESTED | {
    "model_type": "gemma4_audio",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 8],
    "output_proj_dims": 96,
    "conv_kernel_size": 5,
    "hidden_act": "silu",
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_invalid_logits_value": -1e9,
    "attention_logit_cap": 50.0,
    "gradient_clipping": 1e10,
    "residual_weight": 0.5,
    "use_clipped_linears": True,
}
AUDIO_UNIFIED: Config = NESTED | {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640}

SKIP = [
    "lm_head",
    "model.vision_tower",
    "model.audio_tower",
    "model.embed_vision",
    "model.embed_audio",
    "model.vision_embedder",
    "router.proj",
]
MIXED = [f"{STANDARD_PREFIX}layers.1.self_attn", f"{STANDARD_PREFIX}layers.3.mlp"]
ALL: Config = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_threshold": 6.0,
}
SKIPPED: Config = ALL | {"llm_int8_skip_modules": SKIP}
QUANTS: dict[str, Config | None] = {  # the quantization_config, which quantization follows
    "bf16": None,
    "all": ALL,
    "skip": SKIPPED,
    "mixed": ALL | {"llm_int8_skip_modules": SKIP + MIXED},
    "partial": ALL | {"llm_int8_skip_modules": [*SKIP, MIXED[0] + ".q_proj", MIXED[1] + ".gate_proj"]},
    "fp4": SKIPPED | {"bnb_4bit_quant_type": "fp4"},
    "single": SKIPPED | {"bnb_4bit_use_double_quant": False},
    "storage-bf16": SKIPPED | {"bnb_4bit_quant_storage": "bfloat16"},
    "int8": SKIPPED
    | {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    },
}

# Tables of tensors: "name dimension ...,"; {a|b} means both, letters are sizes worked out for each layer.
NORMS = "{input|post_attention|pre_feedforward|post_feedforward}_layernorm.weight h,"
LAYER = (
    NORMS
    + """layer_scalar 1, self_attn.q_proj.weight q h, self_attn.o_proj.weight h q,
    self_attn.q_norm.weight d, mlp.{gate|up}_proj.weight i h, mlp.down_proj.weight h i,"""
)
LAYER_K = "self_attn.k_proj.weight k h, self_attn.k_norm.weight d,"
LAYER_V = "self_attn.v_proj.weight k h,"
LAYER_EXPERTS = """router.proj.weight e h, router.scale h, router.per_expert_scale e,
    experts.gate_up_proj e 2m h, experts.down_proj e h m, pre_feedforward_layernorm_2.weight h,
    post_feedforward_layernorm_{1|2}.weight h,"""
LAYER_INPUT = """per_layer_input_gate.weight p h, per_layer_projection.weight h p,
    post_per_layer_input_norm.weight h,"""
MODEL = "embed_tokens.weight v h, norm.weight h,"
MODEL_INPUT = """embed_tokens_per_layer.weight v lp, per_layer_model_projection.weight lp h,
    per_layer_projection_norm.weight p,"""
TOWERS: dict[str, dict[str, str]] = {  # by model_type; a * stands for the layer number
    "gemma4_vision": {
        "model.embed_vision.": "embedding_projection.weight 128 64,",
        "model.vision_tower.patch_embedder.": "input_proj.weight 64 48, position_embedding_table 2 128 64,",
        "model.vision_tower.encoder.layers.*.": NORMS.replace("h,", "64,")
        + """
            self_attn.{q|k}_norm.weight 32, self_attn.{q|k|v|o}_proj.linear.weight 64 64,
            mlp.{gate|up}_proj.linear.weight 128 64, mlp.down_proj.linear.weight 64 128,""",
    },
    "gemma4_audio": {
        "model.embed_audio.": "embedding_projection.weight 128 96,",
        "model.audio_tower.": "output_proj.weight 96 64, output_proj.bias 96,",
        "model.audio_tower.subsample_conv_projection.": """input_proj_linear.weight 64 256,
            layer0.conv.weight 128 1 3 3, layer0.norm.weight 128, layer1.conv.weight 8 128 3 3,
            layer1.norm.weight 8,""",
        "model.audio_tower.layers.*.": """
            norm_{pre_attn|post_attn|out}.weight 64, self_attn.relative_k_proj.weight 64 64,
            self_attn.{q_proj|k_proj|v_proj|post}.linear.weight 64 64, self_attn.per_dim_scale 32,
            lconv1d.{pre_layer|conv}_norm.weight 64, lconv1d.linear_start.linear.weight 128 64,
            lconv1d.linear_end.linear.weight 64 64, lconv1d.depthwise_conv1d.weight 64 1 5,
            feed_forward{1|2}.{pre|post}_layer_norm.weight 64,
            feed_forward{1|2}.ffw_layer_1.linear.weight 256 64,
            feed_forward{1|2}.ffw_layer_2.linear.weight 64 256,""",
    },
    "gemma4_unified_vision": {
        "model.embed_vision.": "embedding_projection.weight 128 128,",
        "model.vision_embedder.": """patch_ln1.{weight|bias} 6912, patch_dense.weight 128 6912,
            patch_dense.bias 128, {patch_ln2|pos_norm}.{weight|bias} 128, pos_embedding 128 2 128,""",
    },
    "gemma4_unified_audio": {"model.embed_audio.": "embedding_projection.weight 128 640,"},
}
# Values: mean and spread by the first pattern found; else matrices get 1/sqrt(fan in), vectors are around 1.
VALUES = [
    (r"put_min$", -6.0, 0.0),
    (r"put_max$", 6.0, 0.0),
    (r"layer_scalar$", 0.8, 0.0),
    (r"[qk]_norm\.weight$", 0.3, 0.06),
    (r"position_embedding|pos_embedding", 0.0, 0.3),
    (r"embed_tokens|per_dim_scale$|std_bias$|\.bias$", 0.0, 0.1),
]

CHAT_TEMPLATE = """<bos>{% for message in messages %} <|turn> {{ message.role }}
{%- if message.content is string %} {{ message.content }}{% else %}{% for part in message.content %}
{{- " " ~ (part.text or "<|" ~ part.type ~ "|>") }}{% endfor %}{% endif %} <turn|>{% endfor %}
{%- if add_generation_prompt %} <|turn> model{% endif %}"""
CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [gemma4, bitsandbytes]
---
# Tiny Gemma4: {family}, {quant}

Random weights in the structure of a Gemma4 checkpoint, for tests. They are untrained.
"""


@dataclass(frozen=True)
class Family:
    """One kind of Gemma4: its configs, and whether files keep the k/v that kv-shared layers never use."""

    text: Config
    vision: Config | None = None
    audio: Config | None = None
    keeps_shared_kv: bool = False
    name: str = "Gemma4"


UNIFIED_TEXT = K_EQ_V | {"model_type": "gemma4_unified_text"}
FAMILIES = {
    "dense31b": Family(K_EQ_V | NO_EXPERTS, VISION),
    "e4b": Family(SMALL, VISION_SMALL, AUDIO, keeps_shared_kv=True),  # as in Google's files
    "e4b-noshared": Family(SMALL, VISION_SMALL, AUDIO),  # as transformers 5.8 and newer save it
    "e2b": Family(SMALL | {"use_double_wide_mlp": True}, VISION_SMALL, AUDIO, keeps_shared_kv=True),
    "moe26b": Family(K_EQ_V | EXPERTS, VISION),
    "unified12b": Family(UNIFIED_TEXT, VISION_UNIFIED, AUDIO_UNIFIED, name="Gemma4Unified"),
    "text": Family(K_EQ_V | NO_EXPERTS),
}


def _expand(name: str) -> list[str]:
    if not (braces := re.search(r"\{(.*?)\}", name)):
        return [name]
    start, end = braces.span()
    return [n for choice in braces[1].split("|") for n in _expand(name[:start] + choice + name[end:])]


def _rows(prefix: str, table: str, sizes: Mapping[str, int]) -> Shapes:
    shapes: Shapes = {}
    for names, *dims in (row.split() for row in table.strip(",").split(",")):
        shape = tuple(int(d) if d.isdigit() else sizes[d] for d in dims)
        shapes |= {prefix + name: shape for name in _expand(names)}
    return shapes


def _language_shapes(root: str, t: Config, keeps_shared_kv: bool) -> Shapes:
    p, layers, experts = t["hidden_size_per_layer_input"], t["num_hidden_layers"], t.get("num_experts")
    sizes = {"h": t["hidden_size"], "v": t["vocab_size"], "p": p, "lp": layers * p}
    if experts:
        sizes |= {"e": experts, "m": t["moe_intermediate_size"], "2m": 2 * t["moe_intermediate_size"]}
    shapes = _rows(root, MODEL + (MODEL_INPUT if p else ""), sizes)
    for i, kind in enumerate(t["layer_types"]):
        full, shared = kind == "full_attention", i >= layers - t["num_kv_shared_layers"]
        k_eq_v = full and t["attention_k_eq_v"]
        d = sizes["d"] = t["global_head_dim" if full else "head_dim"]
        sizes["q"] = d * t["num_attention_heads"]
        sizes["k"] = d * t["num_global_key_value_heads" if k_eq_v else "num_key_value_heads"]
        sizes["i"] = t["intermediate_size"] * (2 if shared and t["use_double_wide_mlp"] else 1)
        table = LAYER + (LAYER_EXPERTS if experts else "") + (LAYER_INPUT if p else "")
        if not shared or keeps_shared_kv:
            table += LAYER_K + ("" if k_eq_v else LAYER_V)
        shapes |= _rows(f"{root}layers.{i}.", table, sizes)
    return shapes


def _tower_shapes(config: Config) -> Shapes:
    shapes: Shapes = {}
    for prefix, table in TOWERS[config["model_type"]].items():
        for i in range(config["num_hidden_layers"] if "*" in prefix else 1):
            shapes |= _rows(prefix.replace("*", str(i)), table, {})
    if config.get("standardize"):
        shapes |= _rows("model.vision_tower.", "std_bias 64, std_scale 64", {})
    if config.get("use_clipped_linears"):
        modules = [name.removesuffix("linear.weight") for name in shapes if name.endswith(".linear.weight")]
        shapes |= {name: () for module in modules for name in _expand(module + "{in|out}put_{min|max}")}
    return shapes


def _layer_order(name: str) -> list[tuple[int, str]]:
    return [(int(x), "") if x.isdigit() else (0, x) for x in re.split(r"(\d+)", name)]


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    fan_in = shape[-1] if ".experts." in name else math.prod(shape[1:])
    mean, spread = (0.0, fan_in**-0.5) if len(shape) > 1 else (1.0, 0.2)
    mean, spread = next((given for pattern, *given in VALUES if re.search(pattern, name)), (mean, spread))
    return (torch.randn(shape, generator=generator) * spread + mean).to(torch.bfloat16)


def _is_quantized(name: str, shape: tuple[int, ...], quant: Config) -> bool:
    """Whether transformers quantizes it: a Linear that no skip entry matches, by its start or its end."""
    module = name.removesuffix(".weight")
    linear = len(shape) == 2 and module != name and "embed_tokens" not in name
    skipped = quant["llm_int8_skip_modules"] or ()
    return linear and not any(module.startswith(entry) or module.endswith(entry) for entry in skipped)


def _quantize(name: str, weight: torch.Tensor, quant: Config) -> Tensors:
    if quant["load_in_8bit"]:
        quantized, scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        scale_name = name.removesuffix("weight") + "SCB"
        return {name: quantized, scale_name: scale, name + "_format": torch.tensor(0, dtype=torch.uint8)}
    quantized, state = bnb.quantize_4bit(
        weight,
        compress_statistics=quant["bnb_4bit_use_double_quant"],
        quant_type=quant["bnb_4bit_quant_type"],
        quant_storage=getattr(torch, quant["bnb_4bit_quant_storage"]),
    )
    return {name: quantized} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def _tensors(shapes: Shapes, quant: Config | None, generator: torch.Generator) -> Tensors:
    tensors: Tensors = {}
    for name, shape in shapes.items():
        value = _values(name, shape, generator)
        quantized = quant is not None and _is_quantized(name, shape, quant)
        tensors |= _quantize(name, value, quant) if quant and quantized else {name: value}
    return tensors


def _config(family: Family, quant: Config | None, per_layer_config: bool) -> Config:
    text, vision = dict(family.text), dict(family.vision or {})
    if per_layer_config:
        full = {"head_dim": text.pop("global_head_dim")}
        if heads := text.pop("num_global_key_value_heads"):
            full["num_key_value_heads"] = heads
        kinds = enumerate(text["layer_types"])
        text["per_layer_config"] = {str(i): full for i, kind in kinds if kind == "full_attention"}
        if "rope_parameters" in vision:
            vision["rope_parameters"] = vision["rope_parameters"] | {"rope_type": "axial"}
    config: Config = {"transformers_version": "5.19.0" if per_layer_config else "5.14.1"}
    config |= {"quantization_config": quant} if quant else {}
    if not vision:
        return config | text | {"architectures": ["Gemma4ForCausalLM"]}
    config |= {f"{role}_token_id": TOKENS.index(token) for role, token in MEDIA_TOKENS.items()}
    config |= {"text_config": text, "vision_config": vision, "audio_config": family.audio}
    config |= {"dtype": "bfloat16", "initializer_range": 0.02, "tie_word_embeddings": True}
    config |= {"eoa_token_index": config["eoa_token_id"]}
    config |= {"model_type": text["model_type"].removesuffix("_text")}
    return config | {"architectures": [family.name + "ForConditionalGeneration"]}


def _processor_config(name: str, vision: Config) -> Config:
    images = {key: vision[key] for key in ("patch_size", "pooling_kernel_size")} | {"max_soft_tokens": 70}
    return {
        "processor_class": name + "Processor",
        "image_seq_length": 70,
        "audio_seq_length": 750,
        "image_processor": {"image_processor_type": name + "ImageProcessor"} | images,
        "video_processor": {"video_processor_type": name + "VideoProcessor"} | images,
        "feature_extractor": {"feature_extractor_type": name + "AudioFeatureExtractor"},
    }


def _tokenizer() -> Config:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab = {word: i for i, word in enumerate(TOKENS + [f"t{i}" for i in range(len(TOKENS), VOCAB)])}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return (
        {"version": "1.0"}
        | empty
        | {
            "added_tokens": [{"id": i, "content": token} | flags for i, token in enumerate(TOKENS)],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        }
    )


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=path.name != "tokenizer.json") + "\n")


def _write_tensors(folder: Path, tensors: Tensors, shards: int) -> None:
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    total, start = sum(t.nbytes for t in tensors.values()), 0
    parts: dict[int, Tensors] = {}
    for name in sorted(tensors, key=_layer_order):
        parts.setdefault(start * shards // total, {})[name] = tensors[name]
        start += tensors[name].nbytes
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts.values(), 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _renamed(name: str, prefix: str) -> str:
    if name.startswith(STANDARD_PREFIX):
        return prefix + name.removeprefix(STANDARD_PREFIX)
    return name if prefix.startswith("model.") else name.removeprefix("model.")


def make(
    folder: Path,
    family: str = "dense31b",
    quant: str = "skip",
    *,
    shards: int = 1,
    seed: int = 0,
    prefix: str = STANDARD_PREFIX,
    per_layer_config: bool = False,
) -> Path:
    """Writes a checkpoint into `folder` and returns it.

    A family and a seed give the same values for every `quant`. Tensors are split in layer order into `shards`
    files (fewer where one tensor is larger than a share), so a weight and its quant state can part company.
    `prefix` is what language tensors start with; without a leading "model." in it, towers and embedders have
    none either. It changes neither the skip list nor the family "text", which has "model.".
    `per_layer_config` writes the config as transformers 5.19 does.
    """
    spec = FAMILIES[family]
    root = STANDARD_PREFIX if spec.vision else "model."
    settings: Config | None = json.loads(json.dumps(QUANTS[quant]).replace(STANDARD_PREFIX, root))
    shapes = _language_shapes(root, spec.text, spec.keeps_shared_kv)
    for tower in filter(None, (spec.vision, spec.audio)):
        shapes |= _tower_shapes(tower)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other over tensors of this size
    try:
        tensors = _tensors(shapes, settings, torch.Generator().manual_seed(seed))
    finally:
        torch.set_num_threads(threads)
    if spec.vision:
        tensors = {_renamed(name, prefix): tensor for name, tensor in tensors.items()}

    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, tensors, shards)
    _write_json(folder / "config.json", _config(spec, settings, per_layer_config))
    _write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})
    _write_json(folder / "tokenizer.json", _tokenizer())
    roles = SPECIAL_TOKENS | {f"{role}_token": token for role, token in MEDIA_TOKENS.items()}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | roles)
    if spec.vision:
        _write_json(folder / "processor_config.json", _processor_config(spec.name, spec.vision))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    task = "image-text-to-text" if spec.vision else "text-generation"
    (folder / "README.md").write_text(CARD.format(task=task, family=family, quant=quant))
    return folder


def main() -> None:
    """Makes the checkpoints named on the command line."""
    names = {f"{family}-{quant}": (family, quant) for family in FAMILIES for quant in QUANTS}
    known = f"Families: {', '.join(FAMILIES)}. Quants: {', '.join(QUANTS)}."
    parser = argparse.ArgumentParser(description="Makes tiny random Gemma4 checkpoints.", epilog=known)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="+", choices=names, metavar="FAMILY-QUANT")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.names:
        print(make(args.out / name, *names[name], shards=args.shards, seed=args.seed))


if __name__ == "__main__":
    main()
