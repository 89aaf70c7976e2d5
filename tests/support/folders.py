"""Checkpoints with hostile names, and one with thousands of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.command_line import EVIL

LAYERS = 45


def rename(shard: Path, names: dict[str, str]) -> None:
    """Gives tensors of a shard other names."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    doc = {names.get(k, k): v for k, v in json.loads(data[8 : 8 + length]).items()}
    header = json.dumps(doc).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def hostile(source: Path) -> Path:
    """Puts terminal escapes wherever a scan or a plan shows text of a checkpoint."""
    layer = "model.vision_tower.encoder.layers.0."
    renamed = {
        f"{layer}mlp.up_proj.linear.weight": f"model.vision_tower.{EVIL}.weight",
        "model.language_model.layers.0.mlp.up_proj.weight.absmax": f"{EVIL}lost.absmax",
    }
    rename(source / "model.safetensors", {k: v for k, v in renamed.items() if "absmax" not in k})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] += [f"model.vision_tower.{EVIL}", f"q_proj{EVIL}"]
    (source / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return source


def large_checkpoint(folder: Path) -> int:
    """A text model of more than 2,000 tensors: true headers and quant states, and holes in place of the weights."""
    folder.mkdir()
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [64, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.5,
    }
    raw = json.dumps(state).encode()
    state_tensors = {
        "": ("U8", [2048, 1], 2048),
        ".absmax": ("U8", [64], 64),
        ".quant_map": ("F32", [16], 64),
        ".nested_absmax": ("F32", [1], 4),
        ".nested_quant_map": ("F32", [256], 1024),
        ".quant_state.bitsandbytes__nf4": ("U8", [len(raw)], len(raw)),
    }
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    header: dict[str, Any] = {}
    states, at = [], 0
    for layer in range(LAYERS):
        for projection in projections:
            for suffix, (dtype, shape, size) in state_tensors.items():
                name = f"model.layers.{layer}.{projection}.weight{suffix}"
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                if "quant_state" in suffix:
                    states.append(at)
                at += size
        norms = [f"{n}_layernorm" for n in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
        for norm in (*norms, "self_attn.q_norm", "self_attn.k_norm"):
            name = f"model.layers.{layer}.{norm}.weight"
            header[name] = {"dtype": "F32", "shape": [64], "data_offsets": [at, at + 256]}
            at += 256
    for name, rows in (("embed_tokens", 64), ("norm", 1)):
        shape = [rows, 64] if rows > 1 else [64]
        header[f"model.{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 256 * rows]}
        at += 256 * rows
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        start = f.tell()
        for offset in states:
            f.seek(start + offset)
            f.write(raw)
        f.truncate(start + at)
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": LAYERS,
        **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "global_head_dim", "vocab_size"), 64),
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention"] * LAYERS,
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return len(header)
