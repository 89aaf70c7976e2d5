"""Per-expert weights, unquantized or in FP4, quantized for vLLM; and joined again in full precision."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

import bnbfix
from bnbfix.planner.plan import ONLY_VLLM
from bnbfix.report.results import repair_report
from bnbfix.rules.rule import Code
from tests.support.build import Make

FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def per_expert(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with per-expert weights in NF4, as vLLM 0.32 looks for them."""
    out = tmp_path_factory.mktemp("experts") / "nf4"
    bnbfix.repair(pristine("moe26b", "skip"), out, vllm="0.32.0", device="cpu")
    (out / "bnbfix.json").unlink()
    return out


def experts(tensors: Tensors) -> list[str]:
    """Those of layer 3: enough, and few enough to be quick."""
    return [n for n in tensors if re.search(r"layers\.3\.experts\.\d+\.\w+_proj\.weight$", n)]


def take(tensors: Tensors, name: str) -> torch.Tensor:
    """The values of a quantized weight, which goes with its quant-state tensors."""
    state_tensors = {n.removeprefix(name + "."): tensors.pop(n) for n in list(tensors) if n.startswith(name + ".")}
    return bnb.dequantize_4bit(tensors.pop(name), bnb.QuantState.from_dict(state_tensors, device=torch.device("cpu")))


def quantized(name: str, values: torch.Tensor, quant_type: str) -> Tensors:
    data, state = bnb.quantize_4bit(values, compress_statistics=True, quant_type=quant_type)
    return {name: data} | {f"{name}.{k}": t for k, t in state.as_dict(packed=True).items()}


def requantized(source: Path, out: Path, remake: Callable[[int, str, torch.Tensor], Tensors]) -> Tensors:
    """Writes the checkpoint anew, each expert of layer 3 as `remake` makes it, and returns their values by name."""
    shutil.copytree(source, out)
    tensors, values = load_file(out / FILE), {}
    for i, name in enumerate(experts(tensors)):
        made = remake(i, name, take(tensors, name))
        tensors |= made
        values[name] = made[name] if len(made) == 1 else take(dict(made), name)
    save_file(tensors, out / FILE, {"format": "pt"})
    return values


def unquantized(i: int, name: str, values: torch.Tensor) -> Tensors:
    return {name: values.to(torch.bfloat16)}


def fp4(i: int, name: str, values: torch.Tensor) -> Tensors:
    return quantized(name, values, "fp4")


def raw(t: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return t.dtype, tuple(t.shape), bytes(t.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize(
    ("change", "code", "target", "prefix"),
    [
        (unquantized, Code.UNQUANTIZED_IN_QUANTIZED, "0.27.1", "moe.experts"),
        (fp4, Code.FP4_EXPERTS, "0.32.0", "experts"),
    ],
    ids=["unquantized", "fp4"],
)
def test_per_expert_weights_are_quantized_as_bitsandbytes_does(
    per_expert: Path, tmp_path: Path, change: Callable[..., Tensors], code: Code, target: str, prefix: str
) -> None:
    values = requantized(per_expert, tmp_path / "source", change)
    assert not bnbfix.scan(tmp_path / "source", target).ok
    result = bnbfix.repair(tmp_path / "source", tmp_path / "out", vllm=target, device="cpu")
    edits = {e.name: e for e in result.plan.edits if e.action == "quantize"}
    assert set(edits) == set(values) and len(values) == 4 * 3
    assert {e.code for e in edits.values()} == {code}
    assert all("loses precision" in e.detail for e in edits.values()), "and it is said"
    assert ONLY_VLLM in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert ONLY_VLLM in map(str, repair_report(result))
    before, after = load_file(tmp_path / "source" / FILE), load_file(tmp_path / "out" / FILE)
    want = {n.replace(".experts.", f".{prefix}."): t for n, t in before.items() if not n.startswith(tuple(values))}
    for name, value in values.items():
        want |= quantized(name.replace(".experts.", f".{prefix}."), value, "nf4")
    assert set(after) == set(want)
    for name, t in want.items():
        if ".quant_state." in name:  # the same JSON, padded
            assert json.loads(bytes(after[name].tolist())) == json.loads(bytes(t.tolist())), name
        else:
            assert raw(after[name]) == raw(t), name
    assert bnbfix.verify(tmp_path / "out", tmp_path / "source").ok and bnbfix.scan(tmp_path / "out", target).ok


def place_of(file: bytes | bytearray, name: str) -> tuple[int, int]:
    """Where a tensor's bytes begin and end in a safetensors file."""
    start = 8 + int.from_bytes(file[:8], "little")
    begin, end = json.loads(file[8:start])[name]["data_offsets"]
    return start + begin, start + end


def test_a_spoilt_expert_that_was_fp4_is_found(per_expert: Path, tmp_path: Path) -> None:
    values = requantized(per_expert, tmp_path / "source", fp4)
    bnbfix.repair(tmp_path / "source", tmp_path / "out", vllm="0.32.0", device="cpu")
    name = next(iter(values))
    data = bytearray((tmp_path / "out" / FILE).read_bytes())
    for at in range(*place_of(data, name)):
        data[at] ^= 0x88  # every value moves by half of NF4's table
    (tmp_path / "out" / FILE).write_bytes(data)
    found = bnbfix.verify(tmp_path / "out", tmp_path / "source").problems
    assert [(p.tensor, "4-bit rounding" in p.message) for p in found] == [(None, False), (name, True)]


def test_quantized_and_unquantized_experts_are_joined_in_full_precision(per_expert: Path, tmp_path: Path) -> None:
    def mixed(i: int, name: str, values: torch.Tensor) -> Tensors:
        return unquantized(i, name, values) if i % 2 else quantized(name, values, "nf4")

    values = requantized(per_expert, tmp_path / "source", mixed)
    bnbfix.repair(tmp_path / "source", tmp_path / "out", vllm="0.22.1", device="cpu", bf16=True)
    after = load_file(next((tmp_path / "out").glob("*.safetensors")))
    stem = "model.language_model.layers.3.experts"
    one = {p: [values[f"{stem}.{e}.{p}_proj.weight"] for e in range(4)] for p in ("gate", "up", "down")}
    both = [torch.cat(pair) for pair in zip(one["gate"], one["up"], strict=True)]
    assert torch.equal(after[f"{stem}.gate_up_proj"], torch.stack(both))
    assert torch.equal(after[f"{stem}.down_proj"], torch.stack(one["down"]))
    assert bnbfix.verify(tmp_path / "out", tmp_path / "source").ok


def test_int8_per_expert_weights_are_joined_in_the_dtype_of_the_model(per_expert: Path, tmp_path: Path) -> None:
    def int8(i: int, name: str, values: torch.Tensor) -> Tensors:
        data, scales, _ = bnb.int8_vectorwise_quant(values.to(torch.float16))
        return {name: data, name.removesuffix("weight") + "SCB": scales}

    shutil.copytree(per_expert, tmp_path / "source")
    tensors, values = load_file(tmp_path / "source" / FILE), {}
    for i, name in enumerate(experts(tensors)):
        values[name] = take(tensors, name)
        tensors |= int8(i, name, values[name])
    save_file(tensors, tmp_path / "source" / FILE, {"format": "pt"})
    bnbfix.repair(tmp_path / "source", tmp_path / "out", vllm="0.22.1", device="cpu", bf16=True)
    stem = "model.language_model.layers.3.experts"
    down = load_file(tmp_path / "out" / FILE)[f"{stem}.down_proj"]
    want = torch.stack([values[f"{stem}.{e}.down_proj.weight"] for e in range(4)])
    assert down.dtype == torch.bfloat16
    torch.testing.assert_close(down, want, atol=0.01, rtol=0.05)
    assert bnbfix.verify(tmp_path / "out", tmp_path / "source").ok


@pytest.mark.parametrize(
    "other",
    [
        lambda values: quantized("", values.to(torch.float16), "nf4"),
        lambda values: {"": values.float()},
        lambda values: {"": values.to(torch.bfloat16)[1:]},
    ],
    ids=["quantized-f16", "unquantized-f32", "shape"],
)
def test_experts_that_differ_are_not_joined(
    per_expert: Path, tmp_path: Path, other: Callable[[torch.Tensor], Tensors]
) -> None:
    requantized(
        per_expert,
        tmp_path / "source",
        lambda i, name, values: {name + n: t for n, t in (other(values) if i == 4 else {"": values}).items()},
    )
    with pytest.raises(
        bnbfix.Unrepairable, match=r"experts\.\d+\.\w+\.weight is .* of one dtype and shape become one tensor"
    ):
        bnbfix.plan_repair(tmp_path / "source", vllm="0.22.1", bf16=True)


@pytest.mark.parametrize("gone", ["1.up_proj", "2.down_proj"])
def test_experts_are_not_joined_over_a_gap(per_expert: Path, tmp_path: Path, gone: str) -> None:
    shutil.copytree(per_expert, tmp_path / "source")
    tensors = load_file(tmp_path / "source" / FILE)
    take(tensors, f"model.language_model.layers.3.experts.{gone}.weight")
    save_file(tensors, tmp_path / "source" / FILE, {"format": "pt"})
    number, part = gone.split(".")
    with pytest.raises(bnbfix.Unrepairable, match=rf"layers\.3\.experts\..*: expert {number} has no {part}"):
        bnbfix.plan_repair(tmp_path / "source", vllm="0.22.1", bf16=True)


LAYER = "model.language_model.layers.3.experts"


def without_gates(t: Tensors) -> None:
    for name in [n for n in t if n.startswith(LAYER) and ".gate_proj." in n]:
        del t[name]


def a_gap(t: Tensors) -> None:
    for name in [n for n in t if n.startswith(f"{LAYER}.2.")]:
        del t[name]


def twice(t: Tensors) -> None:
    t[f"{LAYER.replace('experts', 'moe.experts')}.0.up_proj.weight"] = take(dict(t), f"{LAYER}.0.up_proj.weight")


def becomes(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        take(t, f"{LAYER}.0.up_proj.weight")
        t[f"{LAYER}.0.up_proj.weight"] = torch.zeros(shape, dtype=dtype)

    return change


BF16, NF4 = {"bf16": True}, {"vllm": "0.32.0"}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (without_gates, BF16),
        (a_gap, BF16),
        (twice, BF16),
        (becomes(8, 128), BF16),
        (becomes(128), BF16),
        (becomes(64, 128, dtype=torch.float64), BF16),
        (becomes(128), NF4),
        (becomes(2, 64, 128), NF4),
        (becomes(64, 128, dtype=torch.float64), NF4),
    ],
)
def test_experts_that_are_not_a_whole_set_of_matrices_are_refused_by_name(
    per_expert: Path, tmp_path: Path, change: Callable[[Tensors], None], options: dict[str, object]
) -> None:
    tensors = load_file(per_expert / FILE)
    change(tensors)
    shutil.copytree(per_expert, tmp_path / "source")
    save_file(tensors, tmp_path / "source" / FILE, {"format": "pt"})
    with pytest.raises(bnbfix.Unrepairable, match=r"layers\.3\.(moe\.)?experts"):
        bnbfix.plan_repair(tmp_path / "source", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 128, 128), (4, 127, 128), (4, 0, 128)])
def test_experts_in_one_tensor_that_cannot_be_split_are_refused_by_name(
    pristine: Make, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    shutil.copytree(pristine("moe26b", "skip"), tmp_path / "source")
    tensors = load_file(tmp_path / "source" / FILE)
    tensors[f"{LAYER}.gate_up_proj"] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "source" / FILE, {"format": "pt"})
    with pytest.raises(bnbfix.Unrepairable, match=r"layers\.3\.experts\.gate_up_proj: all experts in one tensor"):
        bnbfix.plan_repair(tmp_path / "source", vllm="0.32.0")


def test_another_map_of_the_scales_is_found(per_expert: Path, tmp_path: Path) -> None:
    values = requantized(per_expert, tmp_path / "source", fp4)
    bnbfix.repair(tmp_path / "source", tmp_path / "out", vllm="0.32.0", device="cpu")
    name = next(iter(values))
    data = bytearray((tmp_path / "out" / FILE).read_bytes())
    data[place_of(data, f"{name}.nested_quant_map")[0]] ^= 0x01
    (tmp_path / "out" / FILE).write_bytes(data)
    found = {p.tensor: p.message for p in bnbfix.verify(tmp_path / "out", tmp_path / "source").problems}
    assert found[name] == "its nested_quant_map is not bitsandbytes' 8-bit map"
