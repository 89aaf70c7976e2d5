#!/usr/bin/env python3
"""Writes a checkpoint of the real Gemma4 31B's structure and size, some 20 GB of which almost nothing takes disk space.

    python tests/benchmarks/make_31b.py OUT [--quantized-tower] [--shard-size BYTES]

Config, index, headers, quant states and the small quant-state tensors are real; weights and absmax are holes in sparse
files, which read as zeros. Scans of it cost what scans of the real one cost. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 60, 5376, 21504, 262144
HEADS, KV_HEADS, GLOBAL_KV_HEADS, HEAD_DIM, GLOBAL_HEAD_DIM = 32, 16, 4, 256, 512
VISION_LAYERS, VISION, VISION_INTERMEDIATE = 27, 1152, 4304
SHARD_SIZE = 5_000_000_000  # bytes, as transformers cuts shards
WIDTH = {"F32": 4, "BF16": 2, "U8": 1}
NF4 = (
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.09105004,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.5626170,
    0.72295684,
    1.0,
)
KINDS = (["sliding_attention"] * 5 + ["full_attention"]) * 10

Shape = tuple[int, ...]
Tensor = tuple[str, Shape, bytes | None]  # dtype, shape, and the bytes unless they are a hole


def weights() -> Iterator[tuple[str, Shape, bool]]:
    """(name, shape, is it a matrix of a Linear?) of every tensor before quantization, in layer order."""
    yield "model.language_model.embed_tokens.weight", (VOCAB, HIDDEN), False
    for i, kind in enumerate(KINDS):
        full, root = kind == "full_attention", f"model.language_model.layers.{i}."
        d, kv = (GLOBAL_HEAD_DIM, GLOBAL_KV_HEADS) if full else (HEAD_DIM, KV_HEADS)
        for part in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{root}{part}_layernorm.weight", (HIDDEN,), False
        yield root + "layer_scalar", (1,), False
        yield from ((f"{root}self_attn.{x}_norm.weight", (d,), False) for x in "qk")
        yield root + "self_attn.q_proj.weight", (d * HEADS, HIDDEN), True
        yield from ((f"{root}self_attn.{x}_proj.weight", (d * kv, HIDDEN), True) for x in ("k" if full else "kv"))
        yield root + "self_attn.o_proj.weight", (HIDDEN, d * HEADS), True
        yield from ((f"{root}mlp.{x}_proj.weight", (INTERMEDIATE, HIDDEN), True) for x in ("gate", "up"))
        yield root + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE), True
    yield "model.language_model.norm.weight", (HIDDEN,), False
    tower = "model.vision_tower."
    yield tower + "patch_embedder.input_proj.weight", (VISION, 768), True
    yield tower + "patch_embedder.position_embedding_table", (2, 10240, VISION), False
    yield from ((f"{tower}{x}", (VISION,), False) for x in ("std_bias", "std_scale"))
    for i in range(VISION_LAYERS):
        root = f"{tower}encoder.layers.{i}."
        for part in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{root}{part}_layernorm.weight", (VISION,), False
        yield from ((f"{root}self_attn.{x}_norm.weight", (72,), False) for x in "qk")
        yield from ((f"{root}self_attn.{x}_proj.linear.weight", (VISION, VISION), True) for x in "qkvo")
        yield from ((f"{root}mlp.{x}_proj.linear.weight", (VISION_INTERMEDIATE, VISION), True) for x in ("gate", "up"))
        yield root + "mlp.down_proj.linear.weight", (VISION, VISION_INTERMEDIATE), True
    yield "model.embed_vision.embedding_projection.weight", (HIDDEN, VISION), True


def quantized_tensors(name: str, shape: Shape) -> dict[str, Tensor]:
    """A weight in NF4 with double quantization, as bitsandbytes lays it out."""
    numel = math.prod(shape)
    blocks = -(-numel // 64)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.03125,
    }
    text = json.dumps(state).encode()
    ramp = struct.pack("<256f", *((i - 127) / 128 for i in range(256)))
    return {
        name: ("U8", (numel // 2, 1), None),
        name + ".absmax": ("U8", (blocks,), None),
        name + ".nested_absmax": ("F32", (-(-blocks // 256),), None),
        name + ".nested_quant_map": ("F32", (256,), ramp),
        name + ".quant_map": ("F32", (16,), struct.pack("<16f", *NF4)),
        name + ".quant_state.bitsandbytes__nf4": ("U8", (len(text),), text),
    }


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Widest dtype first, then by name, as the safetensors library does."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, real = 0, []
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda t: (-WIDTH[t[1][0]], t[0])):
        size = math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        if data is not None:
            real.append((at, data))
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for offset, data in real:
            f.seek(8 + len(raw) + offset)
            f.write(data)
        f.truncate(8 + len(raw) + at)


def make(folder: Path, *, quantized_tower: bool = False, shard_size: int = SHARD_SIZE) -> Path:
    """Writes the checkpoint. `quantized_tower` quantizes the vision tower too: 600 quant states instead of 410."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, shape, linear in weights():
        quantized = linear and (quantized_tower or ".language_model." in name)
        tensors = quantized_tensors(name, shape) if quantized else {name: ("BF16", shape, None)}
        size = sum(math.prod(s) * WIDTH[dtype] for dtype, s, _ in tensors.values())
        if filled and filled + size > shard_size:
            shards.append({})
            filled = 0
        shards[-1] |= tensors
        filled += size
        total += size
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config(quantized_tower), indent=2) + "\n")
    (folder / "README.md").write_text("---\nlicense: gemma\n---\n# The structure of Gemma4 31B, and nothing in it\n")
    return folder


def config(quantized_tower: bool) -> dict[str, object]:
    """config.json, with a skip list as transformers spells it."""
    skip = ["lm_head"] if quantized_tower else ["lm_head", "model.vision_tower", "model.embed_vision"]
    common = {
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-06,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    rope = {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    text = common | {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_global_key_value_heads": GLOBAL_KV_HEADS,
        "head_dim": HEAD_DIM,
        "global_head_dim": GLOBAL_HEAD_DIM,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "layer_types": KINDS,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "num_experts": None,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
    }
    vision = common | {
        "model_type": "gemma4_vision",
        "hidden_size": VISION,
        "intermediate_size": VISION_INTERMEDIATE,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "use_clipped_linears": False,
        "standardize": True,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    }
    quantization = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": skip,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
        "audio_config": None,
        "quantization_config": quantization,
        "transformers_version": "5.14.1",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--quantized-tower", action="store_true", help="quantize the vision tower and its embedder too")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, metavar="BYTES")
    given = parser.parse_args()
    folder = make(given.out, quantized_tower=given.quantized_tower, shard_size=given.shard_size)
    stats = [p.stat() for p in folder.iterdir()]
    size, held = sum(s.st_size for s in stats), sum(s.st_blocks * 512 for s in stats)
    print(f"{folder}: {size / 1e9:,.1f} GB in {len(stats)} files, {held / 1e6:,.1f} MB of them on disk")


if __name__ == "__main__":
    main()
