"""Experts as training tools keep them in 4 bits, read into vLLM's per-expert form without a change of values."""

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
from bnbfix.rules.rule import Code
from tests.support.build import Make, json_of

FILE = "model.safetensors"
CPU = torch.device("cpu")
LAYER = "model.language_model.layers.3.experts"
Tensors = dict[str, torch.Tensor]
Form = Callable[[str, torch.Tensor], Tensors]  # (gate_up_proj or down_proj of a layer, all its experts) to tensors


def quantize(name: str, values: torch.Tensor, **options: object) -> Tensors:
    data, state = bnb.quantize_4bit(values.contiguous(), **({"quant_type": "nf4"} | options))  # type: ignore[arg-type]
    return {name: data} | {f"{name}.{key}": t for key, t in state.as_dict(packed=True).items()}


def take(tensors: Tensors, name: str) -> torch.Tensor:
    """The values of a quantized weight."""
    own = {n.removeprefix(name + "."): t for n, t in tensors.items() if n.startswith(name + ".")}
    return bnb.dequantize_4bit(tensors[name], bnb.QuantState.from_dict(own, device=CPU))


def linears(names: str = "s", **options: object) -> Form:
    """A list of linear modules: bitsandbytes' own choice is double quantization, in blocks of 64."""

    def make(name: str, values: torch.Tensor) -> Tensors:
        made = (
            quantize(f"{name}{names}.{n}.weight", w, **({"compress_statistics": True} | options))
            for n, w in enumerate(values)
        )
        return {key: t for one in made for key, t in one.items()}

    return make


def three_lists(name: str, values: torch.Tensor) -> Tensors:
    if name.endswith("down_proj"):
        return linears()(name, values)
    gate, up = values.chunk(2, dim=1)
    return linears()(name.replace("gate_up", "gate"), gate) | linears()(name.replace("gate_up", "up"), up)


def stacks(name: str, values: torch.Tensor, *, quant_type: str = "nf4", blocksize: int = 64) -> Tensors:
    """What Experts4bit saves (bitsandbytes#1965)."""
    made = [bnb.quantize_4bit(w.contiguous(), quant_type=quant_type, blocksize=blocksize) for w in values]
    absmax = name.replace("_proj", "_absmax")
    return {name: torch.stack([q.flatten() for q, _ in made]), absmax: torch.stack([s.absmax for _, s in made])}


def build(pristine: Make, folder: Path, form: Form) -> Path:
    """A mixture of experts with its experts in another form."""
    shutil.copytree(pristine("moe26b", "skip"), folder)
    tensors = load_file(folder / FILE)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors |= form(name, tensors.pop(name))
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def values_of(source: Path) -> Tensors:
    """gate, up and down of every expert of layer 3, by the name that vLLM 0.32 looks for."""
    tensors, out = load_file(source / FILE), {}
    for name in tensors:
        if m := re.fullmatch(rf"{LAYER}\.(\w+?)_proj(?:s|_4bit)\.(\d)\.weight", name):
            found, number, part = take(tensors, name), m[2], m[1]
            for key, values in zip(part.split("_"), found.chunk(part.count("_") + 1), strict=True):
                out[f"{LAYER}.{number}.{key}_proj.weight"] = values
    for part, shape in ("gate_up", (128, 128)), ("down", (128, 64)):
        for number, (data, absmax) in enumerate(
            zip(tensors.get(f"{LAYER}.{part}_proj", ()), tensors.get(f"{LAYER}.{part}_absmax", ()), strict=True)
        ):
            size = 2 * data.numel() // absmax.numel()
            state = bnb.QuantState(absmax, torch.Size(shape), blocksize=size, quant_type="nf4", dtype=torch.bfloat16)
            found = bnb.dequantize_4bit(data.view(-1, 1), state)
            for key, values in zip(part.split("_"), found.chunk(part.count("_") + 1), strict=True):
                out[f"{LAYER}.{number}.{key}_proj.weight"] = values
    assert len(out) == 4 * 3
    return out


@pytest.mark.parametrize("target", ["0.27.1", "0.32.0"])
@pytest.mark.parametrize(
    ("form", "code", "nested"),
    [
        (linears(), Code.EXPERT_LINEARS, {"down"}),  # the half of gate_up ends inside a block of its scales
        (linears(blocksize=32), Code.EXPERT_LINEARS, {"gate", "up", "down"}),
        (linears("_4bit"), Code.EXPERT_LINEARS, {"down"}),
        (linears(compress_statistics=False), Code.EXPERT_LINEARS, set()),
        (three_lists, Code.EXPERT_LINEARS, {"gate", "up", "down"}),
        (stacks, Code.FUSED_EXPERTS, set()),
    ],
    ids=["nested", "nested-halves", "unsloth", "flat", "three-lists", "stacks"],
)
def test_no_value_changes(
    pristine: Make, tmp_path: Path, form: Form, code: Code, nested: set[str], target: str
) -> None:
    source = build(pristine, tmp_path / "source", form)
    assert code in [f.code for f in bnbfix.scan(source, target).findings]
    result = bnbfix.repair(source, tmp_path / "out", vllm=target, device="cpu")
    assert result.plan.bytes_written == sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) - (
        (tmp_path / "out" / "bnbfix.json").stat().st_size
    )
    edits = [e for e in result.plan.edits if e.name.startswith(LAYER)]
    assert {e.action for e in edits} <= {"split", "rename"} and {e.code for e in edits} == {code}
    after = {n.replace(".moe.experts.", ".experts."): t for n, t in load_file(tmp_path / "out" / FILE).items()}
    want = values_of(source)
    assert {n for n in after if n.startswith(LAYER) and n.endswith(".weight")} == set(want)
    for name, values in want.items():
        assert after[name].dtype == torch.uint8 and after[name].shape == (values.numel() // 2, 1)
        assert torch.equal(take(after, name), values), name
        assert (f"{name}.nested_absmax" in after) == (name.split(".")[-2].removesuffix("_proj") in nested)
    assert bnbfix.verify(tmp_path / "out", source).ok and bnbfix.scan(tmp_path / "out", target).ok
    assert bnbfix.plan_repair(tmp_path / "out", target).nothing_to_do


@pytest.mark.parametrize(
    "form", [linears(), linears("_4bit", quant_type="fp4"), three_lists, stacks], ids=["nf4", "fp4", "three", "stacks"]
)
def test_full_precision_joins_them_with_the_values_that_they_have(pristine: Make, tmp_path: Path, form: Form) -> None:
    source = build(pristine, tmp_path / "source", form)
    bnbfix.repair(source, tmp_path / "out", vllm="0.22.1", device="cpu", bf16=True)
    after, values = load_file(next((tmp_path / "out").glob("*.safetensors"))), values_of(source)
    assert not any("absmax" in name or "_projs" in name or "_4bit" in name for name in after)
    both = [
        torch.cat([values[f"{LAYER}.{n}.gate_proj.weight"], values[f"{LAYER}.{n}.up_proj.weight"]]) for n in range(4)
    ]
    assert torch.equal(after[f"{LAYER}.gate_up_proj"], torch.stack(both))
    down = [values[f"{LAYER}.{n}.down_proj.weight"] for n in range(4)]
    assert torch.equal(after[f"{LAYER}.down_proj"], torch.stack(down))
    assert bnbfix.verify(tmp_path / "out", source).ok


def fp4_stacks(name: str, values: torch.Tensor) -> Tensors:
    return stacks(name, values, quant_type="fp4")


def fp4_lists(name: str, values: torch.Tensor) -> Tensors:
    return linears(quant_type="fp4")(name, values)


@pytest.mark.parametrize(("form", "quant_type"), [(fp4_lists, "nf4"), (fp4_stacks, "fp4")])
def test_what_is_in_fp4_is_quantized_to_nf4(pristine: Make, tmp_path: Path, form: Form, quant_type: str) -> None:
    source = build(pristine, tmp_path / "source", form)
    with json_of(source) as config:
        config["quantization_config"]["bnb_4bit_quant_type"] = quant_type
    result = bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu")
    edits = [e for e in result.plan.edits if e.name.startswith(LAYER)]
    assert edits and all(e.action == "quantize" and "FP4 to NF4, which loses precision" in e.detail for e in edits)
    after = load_file(tmp_path / "out" / FILE)
    bnbfix.repair(source, tmp_path / "full", vllm="0.32.0", device="cpu", bf16=True)
    full = load_file(next((tmp_path / "full").glob("*.safetensors")))
    for number in range(4):
        parts = dict(zip(("gate", "up"), full[f"{LAYER}.gate_up_proj"][number].chunk(2), strict=True))
        for part, values in (parts | {"down": full[f"{LAYER}.down_proj"][number]}).items():
            name = f"{LAYER}.{number}.{part}_proj.weight"
            want = quantize(name, values, compress_statistics=True)
            assert torch.equal(after[name], want[name]) and torch.equal(after[f"{name}.absmax"], want[f"{name}.absmax"])
    assert bnbfix.verify(tmp_path / "out", source).ok and bnbfix.scan(tmp_path / "out", "0.32.0").ok


def test_blocks_that_reach_from_gate_into_up_are_quantized_anew(pristine: Make, tmp_path: Path) -> None:
    def form(name: str, values: torch.Tensor) -> Tensors:  # 72 * 128 values are 4 and a half blocks of 2048
        shape = (4, 144, 128) if name.endswith("gate_up_proj") else (4, 128, 72)
        blocksize = 2048 if name.endswith("gate_up_proj") else 64
        return linears(blocksize=blocksize)(name, torch.randn(shape, dtype=torch.bfloat16))

    torch.manual_seed(3)
    source = build(pristine, tmp_path / "source", form)
    with json_of(source) as config:
        config["text_config"]["moe_intermediate_size"] = 72
    result = bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu")
    details = {e.action: e.detail for e in result.plan.edits if e.name.startswith(LAYER)}
    assert set(details) == {"quantize", "rename"} and "loses precision again" in details["quantize"]
    after, values = load_file(tmp_path / "out" / FILE), values_of(source)
    for name in (f"{LAYER}.2.gate_proj.weight", f"{LAYER}.2.up_proj.weight"):
        assert torch.equal(after[name], quantize(name, values[name])[name])
    assert bnbfix.verify(tmp_path / "out", source).ok and bnbfix.scan(tmp_path / "out", "0.32.0").ok


def test_a_stack_whose_bytes_are_of_another_type_than_config_json_says_is_not_read(
    pristine: Make, tmp_path: Path
) -> None:
    """transformers writes fp4 where nobody chose, and Experts4bit takes nf4 where nobody chose."""

    def ternary(name: str, values: torch.Tensor) -> Tensors:
        return stacks(name, values.sign())

    for form, said in (ternary, "fp4"), (fp4_stacks, "nf4"):
        source = build(pristine, tmp_path / said, form)
        with json_of(source) as config:
            config["quantization_config"]["bnb_4bit_quant_type"] = said
        for bf16 in (False, True):
            with pytest.raises(bnbfix.QuantStateError, match=f"not in {said}, as bnb_4bit_quant_type in config.json"):
                bnbfix.plan_repair(source, vllm="0.32.0", bf16=bf16)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_experts_of_zeros_are_of_every_type(pristine: Make, tmp_path: Path, quant_type: str) -> None:
    def form(name: str, values: torch.Tensor) -> Tensors:
        return stacks(name, torch.zeros_like(values), quant_type=quant_type)

    source = build(pristine, tmp_path / "source", form)
    with json_of(source) as config:
        config["quantization_config"]["bnb_4bit_quant_type"] = quant_type
    bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu", bf16=True)
    assert not any(t.any() for n, t in load_file(tmp_path / "out" / FILE).items() if ".experts." in n)


def test_an_interrupted_split_goes_on(pristine: Make, tmp_path: Path) -> None:
    source = build(pristine, tmp_path / "source", linears())
    seen = 0

    def stop(done: int) -> None:
        nonlocal seen
        seen += done
        if seen > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu", progress=stop)
    bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu")
    assert bnbfix.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("suffix", ["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"])
@pytest.mark.parametrize("form", [linears(), stacks], ids=["linears", "stacks"])
def test_a_spoilt_byte_is_found(pristine: Make, tmp_path: Path, form: Form, suffix: str) -> None:
    source = build(pristine, tmp_path / "source", form)
    bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu")
    name = f"{LAYER}.2.up_proj.weight"
    data = bytearray((tmp_path / "out" / FILE).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name + suffix]["data_offsets"]
    data[start + (begin + end) // 2] ^= 0x01
    (tmp_path / "out" / FILE).write_bytes(data)
    assert name in [p.tensor for p in bnbfix.verify(tmp_path / "out", source).problems]


def only_gate(t: Tensors) -> None:
    t[f"{LAYER}.gate_projs.1.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)


def a_gap(t: Tensors) -> None:
    for name in [n for n in t if n.startswith(f"{LAYER}.gate_up_projs.1.")]:
        del t[name]


def a_vector(t: Tensors) -> None:
    a_gap(t)
    t[f"{LAYER}.gate_up_projs.1.weight"] = torch.zeros(128, dtype=torch.bfloat16)


def odd_rows(t: Tensors) -> None:
    a_gap(t)
    t |= quantize(f"{LAYER}.gate_up_projs.1.weight", torch.zeros(127, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("change", [only_gate, a_gap, a_vector, odd_rows])
def test_what_is_not_a_whole_set_of_experts_is_refused_by_name(
    pristine: Make, tmp_path: Path, change: Callable[[Tensors], None], bf16: bool
) -> None:
    source = build(pristine, tmp_path / "source", linears())
    tensors = load_file(source / FILE)
    change(tensors)
    save_file(tensors, source / FILE, {"format": "pt"})
    with pytest.raises(bnbfix.Unrepairable, match=r"layers\.3\.experts"):
        bnbfix.plan_repair(source, vllm="0.32.0", bf16=bf16)
