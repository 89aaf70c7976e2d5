"""Random checkpoints, repaired: every tensor of the output is its source's, or what an independent decode makes of it.

The decode is this file's own: numpy, the papers' tables, and nothing of the package.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_gemma4
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnbfix
from tests.support.build import Raw, Tensors, json_of, read_tensors, state_tensors, write_index, write_tensors

INDEX = "model.safetensors.index.json"
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
KINDS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
FAMILIES = {
    "small-text": tiny_gemma4.Family(tiny_gemma4.K_EQ_V | tiny_gemma4.NO_EXPERTS | SIZES | KINDS),
    "small-shared": tiny_gemma4.Family(
        tiny_gemma4.TEXT | tiny_gemma4.NO_EXPERTS | SIZES | KINDS | {"num_kv_shared_layers": 1}
    ),
}
QUANTS = ("all", "single", "fp4")
# From the papers: QLoRA (arXiv:2305.14314), appendix E, for NF4; FP4 is sign, two bits of exponent, one of mantissa.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = tuple(s * v + 0.0 for s in (1, -1) for v in (0, 0.0052083333, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25))


def decoded(tensors: Tensors, name: str) -> Raw:
    """A quantized weight in bfloat16, by nothing but the bytes of its tensors."""
    own = state_tensors(tensors, name)
    ((suffix, raw),) = [(s, t.data) for s, t in own.items() if ".quant_state." in s]
    said = json.loads(raw)
    assert said["dtype"] == "bfloat16"
    table = np.array(NF4 if suffix.endswith("nf4") else FP4, np.float32)
    quantized = np.frombuffer(tensors[name].data, np.uint8)
    codes = np.stack([quantized >> 4, quantized & 15], axis=1).reshape(-1)
    scales = np.frombuffer(own[".absmax"].data, "<f4" if "nested_blocksize" not in said else "u1")
    if "nested_blocksize" in said:
        nested = np.frombuffer(own[".nested_quant_map"].data, "<f4")[scales]
        outer = np.frombuffer(own[".nested_absmax"].data, "<f4").repeat(said["nested_blocksize"])[: len(scales)]
        scales = nested * outer + np.float32(said["nested_offset"])
    values = (table[codes] * scales.repeat(said["blocksize"])[: len(codes)]).view("<u4")
    rounded = ((values + 0x7FFF + ((values >> 16) & 1)) >> 16).astype("<u2")  # to the nearest even
    return Raw("BF16", tuple(said["shape"]), rounded.tobytes())


@cache
def made(family: str, quant: str) -> tuple[dict[str, bytes], Tensors]:
    """A checkpoint: its other files, and its tensors."""
    tiny_gemma4.FAMILIES[family] = FAMILIES[family]
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_gemma4.make(Path(folder), family, quant)
        del tiny_gemma4.FAMILIES[family]
        files = {p.name: p.read_bytes() for p in path.iterdir() if p.suffix != ".safetensors"}
        return files, read_tensors(path / "model.safetensors")


def write_checkpoint(out: Path, files: dict[str, bytes], tensors: Tensors, shards: int, r: random.Random) -> None:
    """Writes a checkpoint of these tensors, dealt out to shards at random."""
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    lots: list[Tensors] = [{} for _ in range(shards)]
    for name, t in tensors.items():
        r.choice(lots)[name] = t
    for i, lot in enumerate(lots):
        if lot:
            write_tensors(out / f"model-{i}.safetensors", lot)
    write_index(out)


def everything(folder: Path) -> Tensors:
    """Every tensor of a folder; one that is in two files fails the test."""
    out: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found = read_tensors(shard)
        assert not set(found) & set(out)
        out |= found
    return out


def wrong_tensors(source: Tensors, output: Tensors) -> list[str]:
    """Names of tensors that are neither kept to the byte, nor decoded, nor a copy of some tensor of the source's."""
    quantized = {name.split(".quant_state.")[0] for name in source if ".quant_state." in name}
    values = {name: decoded(source, name) for name in quantized}
    wrong = []
    for name, t in source.items():
        weight = name.split(".weight.")[0] + ".weight" if ".weight." in name else name
        if name not in output:  # quant-state tensors go with their weight's quantization, and nothing else goes
            fine = weight != name and output.get(weight) == values[weight]
        else:
            fine = output[name] == t or (name in quantized and output[name] == values[name])
        if not fine:
            wrong.append(name)
    known = [*source.values(), *values.values()]
    return wrong + [name for name, t in output.items() if name not in source and t not in known]


@settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(QUANTS),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.integers(1, 4),
    st.sampled_from(["portable", "0.22.1", "0.27.1", "0.32.0"]),
    st.sampled_from([{}, {}, {}, {"bf16": True}, {"bf16": True, "max_shard_size": 30_000}]),
    st.sampled_from([[], ["lm_head"], ["model.layers.0"], ["mlp"], ["self_attn.q_proj", "layers.2"]]),
    st.sampled_from(["model.", "model.language_model."]),
    st.integers(0, 2**32),
)
def test_a_repair_of_any_checkpoint_is_what_it_should_be(
    family: str,
    quant: str,
    share: float,
    shards: int,
    target: str,
    options: dict[str, Any],
    skip: list[str],
    prefix: str,
    seed: int,
) -> None:
    r = random.Random(seed)
    files, whole = made(family, quant)
    _, full = made(family, "bf16")
    tensors: Tensors = {}
    for name, t in full.items():
        own = {n: p for n, p in whole.items() if n == name or n.startswith(name + ".")}
        tensors |= own if len(own) > 1 and r.random() < share else {name: t}
    tensors = {prefix + name.removeprefix("model."): t for name, t in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        write_checkpoint(source, files, tensors, shards, r)
        with json_of(source) as config:
            config["quantization_config"]["llm_int8_skip_modules"] = skip or None
        result = bnbfix.repair(source, out, vllm=target, device="cpu", **options)
        if not result.written:
            assert bnbfix.scan(source, target).ok and not out.exists()
            return
        output = everything(out)
        assert wrong_tensors(tensors, output) == []
        shards_of = {name: p.name for p in out.glob("*.safetensors") for name in read_tensors(p)}
        if (out / INDEX).exists():
            index = json.loads((out / INDEX).read_text())
            assert index["weight_map"] == shards_of
            assert index["metadata"]["total_size"] == sum(len(t.data) for t in output.values())
        else:
            assert len(set(shards_of.values())) == 1
        assert bnbfix.verify(out, source).ok
        if "quantization_config" not in json.loads((out / "config.json").read_text()):
            assert not [name for name in output if ".weight." in name], "nothing is quantized any more"
        else:
            assert bnbfix.scan(out, target).ok
            assert not bnbfix.repair(out, Path(folder) / "again", vllm=target, device="cpu").written


def test_the_model_of_what_should_be_there_finds_what_is_not(tmp_path: Path) -> None:
    _, source = made("small-text", "all")
    name = "model.layers.0.mlp.up_proj.weight"
    value = decoded(source, name)
    dequantized = {n: t for n, t in source.items() if not n.startswith(name)} | {name: value}
    assert wrong_tensors(source, source) == [] == wrong_tensors(source, dequantized)
    assert wrong_tensors(source, {n: t for n, t in source.items() if n != name + ".absmax"}) == [name + ".absmax"]
    assert wrong_tensors(source, source | {"x": Raw("U8", (1,), b"x")}) == ["x"]
    one_bit = Raw(value.dtype, value.shape, bytes([value.data[0] ^ 1]) + value.data[1:])
    assert name in wrong_tensors(source, dequantized | {name: one_bit})
