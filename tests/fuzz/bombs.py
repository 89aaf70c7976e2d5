"""Files that are small to make and could be long to read: each must be read or refused in bounded time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from bnbfix.checkpoint.checkpoint import CONFIG, INDEX
from tests.fuzz.memory import quantized
from tests.support.build import Raw, Tensors, zeros
from tests.support.surgery import pack

Files = dict[str, bytes]
SHARD, INDEXED = "model.safetensors", "model-00001-of-00001.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
BYTE = Raw("U8", (1,), b"x")


def checkpoint(tensors: Tensors, skip: object = None, **keys: object) -> Files:
    """A text-only checkpoint of two layers, whose config says `keys`."""
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": 2,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": skip},
    }
    return {CONFIG: json.dumps(config | keys).encode(), SHARD: quantized(tensors | one_quantized())}


def one_quantized() -> Tensors:
    """A quantized weight."""
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16]}).encode()
    return {
        Q: zeros(64, 1, dtype="U8"),
        Q + ".absmax": zeros(2, dtype="F32"),
        Q + ".quant_map": zeros(16, dtype="F32"),
        Q + ".quant_state.bitsandbytes__nf4": Raw("U8", (len(state),), state),
    }


def numbered(form: str, count: int, tensor: Raw = BYTE) -> Tensors:
    """Tensors whose names have a number in them."""
    return {form.format(i): tensor for i in range(1, count + 1)}


def indexed(text: bytes) -> Files:
    files = checkpoint({})
    return {CONFIG: files[CONFIG], INDEX: text, INDEXED: files[SHARD]}


def bombs(scale: float) -> Mapping[str, Callable[[], Files]]:
    """How to make each; at a scale of 1, just below the limits on what is read, or where it hurts most."""

    def n(count: int) -> int:
        return max(2, int(count * scale))

    weight = zeros(1, 1)
    layers = n(4_000)
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return {
        "tensors": lambda: checkpoint(numbered("m.{}", n(200_000))),
        "nothing in lists": lambda: checkpoint({}) | {SHARD: pack('{"a":[' + "[]," * n(8_000_000) + "[]]}")},
        "nothing in objects": lambda: (
            checkpoint({}) | {SHARD: pack("{" + ",".join(f'"{i}":{{}}' for i in range(n(1_800_000))) + "}")}
        ),
        "deep": lambda: checkpoint({}) | {SHARD: pack('{"a":' * n(5_000_000))},
        "one long shape": lambda: (
            checkpoint({})
            | {SHARD: pack('{"a":{"dtype":"U8","shape":[' + "1," * n(12_000_000) + '1],"data_offsets":[0,1]}}', b"x")}
        ),
        "one long number": lambda: (
            checkpoint({})
            | {SHARD: pack('{"a":{"dtype":"U8","shape":[' + "1" * n(24_000_000) + '],"data_offsets":[0,1]}}', b"x")}
        ),
        "many shards": lambda: (
            {f"{i}.safetensors": quantized({f"m{i}": weight}) for i in range(n(20_000))} | checkpoint({})
        ),
        "an index of tensors": lambda: indexed(
            json.dumps({"weight_map": {f"m{i}": INDEXED for i in range(n(1_000_000))}}).encode()
        ),
        "an index of shards": lambda: indexed(
            json.dumps({"weight_map": {f"m{i}": f"x{i}" for i in range(n(2_000_000))}}).encode()
        ),
        "a config of nothing": lambda: checkpoint({}, x=[[]] * n(900_000)),
        "a config of lines": lambda: (
            checkpoint({}) | {CONFIG: checkpoint({})[CONFIG][:-1] + b', "x": [' + b"1,\n" * n(1_200_000) + b"1]}"}
        ),
        "skip entries": lambda: checkpoint(
            numbered("model.layers.{}.self_attn.q_proj.weight", n(50_000), weight), [f"m.{i}" for i in range(n(90_000))]
        ),
        "skip entries without end": lambda: checkpoint({}, [f"m.{i}" for i in range(n(300_000))]),
        "a long skip entry": lambda: checkpoint({}, ["(a|b)*" * n(500_000), "(a+)+" * 9 + "$", "(?:" * n(20_000)]),
        "skip patterns": lambda: checkpoint(
            numbered("model.layers.{}.self_attn.q_proj.weight", n(3_300), weight),
            [f".*.*a{i}!" for i in range(20)] + [f".*a{i}!" for i in range(20, n(3_000))],
            num_hidden_layers=len(kinds),
            layer_types=kinds,
        ),
        "layers": lambda: checkpoint({}, num_hidden_layers=len(kinds), layer_types=kinds),
        "shared layers": lambda: checkpoint(
            numbered("model.layers.{}.self_attn.q_proj.weight", n(3_000), weight),
            num_hidden_layers=len(kinds),
            layer_types=kinds,
            num_kv_shared_layers=len(kinds) - 2,
        ),
        "per_layer_config": lambda: checkpoint(
            {}, per_layer_config={str(i): {"head_dim": 1} for i in range(n(90_000))}
        ),
        "weights": lambda: checkpoint(numbered("model.layers.{}.mlp.up_proj.weight", n(200_000), weight)),
        "partially quantized groups": lambda: checkpoint(
            numbered("model.layers.{}.mlp.up_proj.weight", n(12_000), weight)
            | {
                name.replace(".0.self_attn.q_proj", f".{i}.mlp.gate_proj"): t
                for i in range(1, n(12_000) + 1)
                for name, t in one_quantized().items()
            }
        ),
        "experts": lambda: checkpoint(
            numbered("model.layers.0.experts.{}.gate_proj.weight", n(90_000), weight), enable_moe_block=True
        ),
        "quant-state tensors of nothing": lambda: checkpoint(numbered("m.{}.weight.absmax", n(150_000))),
        "states of nothing": lambda: checkpoint(numbered("m.{}.weight.quant_state.bitsandbytes__nf4", n(150_000))),
        "the same tensors everywhere": lambda: (
            checkpoint({}) | {f"{i}.safetensors": quantized(numbered("m.{}", n(20_000), weight)) for i in range(7)}
        ),
        "long names": lambda: checkpoint(numbered("model.layers.0." + "a." * n(10_000) + "{}", n(1_000), weight)),
    }
