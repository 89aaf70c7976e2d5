"""Classes other than Gemma4: verdicts as real vLLM gave them, and repairs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bnbfix
from bnbfix.checkpoint.safetensors import TensorInfo, build_header, tensor_nbytes
from bnbfix.engines.targets import find_range, resolve_target
from bnbfix.engines.transformers import transformers_linears, transformers_skips
from bnbfix.engines.vllm.profiles import find_pattern, load_profile
from bnbfix.engines.vllm.recorded import expect
from bnbfix.models.detect import read_model
from bnbfix.models.inspection import inspect_checkpoint
from bnbfix.planner.choices import find_choices
from bnbfix.rules.rule import Code, Severity
from tests.support.build import json_of, opened, read_tensors, scan, write_tensors
from tests.support.families import SHAPES, dequantize, make_family, quantize

RELEASES = ("0.22.1", "0.27.1", "0.32.0")
LLAMA, MOE = "LlamaForCausalLM", "Qwen3MoeForCausalLM"
QWEN, GEMMA = "Qwen3VLForConditionalGeneration", "Gemma3ForConditionalGeneration"
QWEN35 = "Qwen3_5ForConditionalGeneration"  # most of its layers have linear attention
LLAVA = "LlavaNextForConditionalGeneration"
GPT_OSS = "GptOssForCausalLM"
VERDICTS = {  # of dry loads by each release: tests/conformance/family_loads.py
    (LLAMA, "all"): "loads loads loads",
    (LLAMA, "skip"): "loads loads loads",
    (LLAMA, "partial"): "fails fails wrong",
    (MOE, "all"): "fails fails fails",
    (MOE, "skip"): "fails fails fails",
    (QWEN, "all"): "loads loads loads",
    (QWEN, "skip"): "fails fails wrong",
    (QWEN, "partial"): "fails fails wrong",
    (QWEN35, "all"): "loads loads loads",
    (QWEN35, "skip"): "fails fails wrong",
    (QWEN35, "partial"): "fails fails wrong",
    (GEMMA, "all"): "fails fails fails",
    (GEMMA, "skip"): "fails fails fails",
    (LLAVA, "skip"): "fails fails fails",
    (GPT_OSS, "all"): "fails fails fails",
}
REFUSED = {
    (MOE, "0.27.1"): "a mixture of experts, which the release refuses",  # it reports the experts under other names
    (MOE, "portable"): "a mixture of experts, which the release refuses",
    (LLAVA, "0.22.1"): "No 'packed_modules_mapping' found",
    (LLAVA, "0.27.1"): "No 'packed_modules_mapping' found",
    **{(GPT_OSS, target): "a mixture of experts, which the release refuses" for target in (*RELEASES, "portable")},
}
MODEL = "model.safetensors"

Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, form: str) -> Path:
        if (name, form) not in made:
            made[name, form] = make_family(tmp_path_factory.mktemp("family") / form, name, form)
        return made[name, form]

    return make


@pytest.mark.parametrize(("name", "form"), VERDICTS, ids=lambda x: str(x))
def test_the_verdict_is_that_of_each_release(name: str, form: str, family: Make) -> None:
    seen = [str(scan(family(name, form), release).verdict) for release in RELEASES]
    assert " ".join(seen) == VERDICTS[name, form]


@pytest.mark.parametrize("target", [*RELEASES, "portable"])
@pytest.mark.parametrize(("name", "form"), VERDICTS, ids=lambda x: str(x))
def test_a_repair_loads_in_its_target_and_its_skip_list_reads_alike_in_transformers(
    name: str, form: str, target: str, family: Make, tmp_path: Path
) -> None:
    source, out = family(name, form), tmp_path / "out"
    if (words := REFUSED.get((name, target))) is not None:
        with pytest.raises(bnbfix.Unrepairable, match=words):
            bnbfix.repair(source, out, vllm=target, device="cpu")
        return
    if scan(source, target).ok:
        return
    bnbfix.repair(source, out, vllm=target, device="cpu")
    assert scan(out, target).ok and bnbfix.verify(out, source).ok
    inspection = inspect_checkpoint(opened(out))
    entries = inspection.checkpoint.skip_modules
    for linear, module in transformers_linears(inspection.linears, inspection.model):
        if linear.role.kind not in ("lm_head", "expert"):
            assert any(transformers_skips(e, module) for e in entries) != linear.quantized, module


@pytest.mark.parametrize("target", ["0.32.0", "portable"])
def test_a_model_of_any_depth_is_repaired(target: str, family: Make, tmp_path: Path) -> None:
    """Models merged from others have had 315 layers, 2,205 linear modules."""
    source, layers = tmp_path / "deep", 330
    shutil.copytree(family(LLAMA, "partial"), source)
    tensors = read_tensors(source / MODEL)
    deep = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    for n in range(layers):  # 0 and 1, again and again
        one = f"model.layers.{n % 2}."
        deep |= {name.replace(one, f"model.layers.{n}."): t for name, t in tensors.items() if name.startswith(one)}
    write_tensors(source / MODEL, deep)
    with json_of(source) as config:
        config["num_hidden_layers"] = layers
    result = scan(source, target)
    partial = {name for f in result.findings if f.code is Code.PARTIALLY_QUANTIZED for name in f.tensors}
    assert {f.code for f in result.findings if f.severity > Severity.NOTE} == {Code.PARTIALLY_QUANTIZED}
    assert len(partial) == 3 * layers // 2
    bnbfix.repair(source, tmp_path / "out", vllm=target, device="cpu")
    assert scan(tmp_path / "out", target).ok
    skip = opened(tmp_path / "out").skip_modules
    assert {f"model.layers.{n}.self_attn.qkv_proj" for n in range(1, layers, 2)} <= set(skip)


def test_a_skip_list_costs_config_json_only(family: Make, tmp_path: Path) -> None:
    source = family(QWEN, "skip")
    bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu")
    assert (source / MODEL).read_bytes() == (tmp_path / "out" / MODEL).read_bytes()
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "visual" in skip and "model.visual.blocks.0.attn.qkv" in skip, "vLLM's spelling, and transformers'"


def test_names_of_the_tower_that_the_release_does_not_read_are_renamed(family: Make, tmp_path: Path) -> None:
    source = family(GEMMA, "skip")
    bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu")
    before, after = load_file(source / MODEL), load_file(tmp_path / "out" / MODEL)
    name = "vision_tower.{}encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before[name.format("")], after[name.format("vision_model.")])
    assert len(before) == len(after)


def test_experts_are_quantized_and_the_router_is_skipped(family: Make, tmp_path: Path) -> None:
    bnbfix.repair(family(MOE, "all"), tmp_path / "out", vllm="0.32.0", device="cpu")
    after = load_file(tmp_path / "out" / MODEL)
    assert after["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == torch.uint8
    assert after["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", [LLAMA, MOE, GPT_OSS])
def test_full_precision_keeps_the_names_of_experts(name: str, family: Make, tmp_path: Path) -> None:
    bnbfix.repair(family(name, "all"), tmp_path / "out", vllm="0.32.0", device="cpu", bf16=True)
    after = load_file(tmp_path / "out" / MODEL)
    assert set(after) == set(SHAPES[name]["tensors"])
    assert {t.dtype for t in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", [LLAMA, QWEN])
def test_a_tensor_that_is_lost_renamed_or_reshaped_does_not_load(
    name: str, release: str, family: Make, tmp_path: Path
) -> None:
    tensors = load_file(family(name, "all") / MODEL)
    config = (family(name, "all") / "config.json").read_text()

    def verdict(changed: dict[str, torch.Tensor]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(changed, folder / MODEL, {"format": "pt"})
        (folder / "config.json").write_text(config)
        return str(scan(folder, release).verdict)

    assert verdict(tensors) == "loads"
    for victim in [n for n in tensors if n.endswith(("norm.weight", "q_proj.weight"))][:3]:
        own = {n: t for n, t in tensors.items() if n == victim or n.startswith(victim + ".")}
        rest = {n: t for n, t in tensors.items() if n not in own}
        assert verdict(rest) == "fails", victim
        assert verdict(rest | {n.replace(victim, "x" + victim): t for n, t in own.items()}) == "fails", victim
        if len(own) == 1:
            assert verdict(rest | {victim: torch.zeros(8, dtype=torch.bfloat16)}) == "fails", victim


# Experts of other classes


LLAMA4 = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "intermediate_size_mlp": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "pixel_shuffle_ratio": 0.5,
    },
}


STACKS = (("gate_up_proj", (128, 512)), ("down_proj", (256, 128)))  # of one expert


def llama4(folder: Path, *quantized: str) -> Path:
    """Every tensor that the profile of this class names, the experts in two for a layer and projections in NF4."""
    release = find_range("0.32.0")
    assert release is not None
    found = expect(read_model(LLAMA4), release)
    assert found is not None
    tensors: dict[str, torch.Tensor] = {}
    for name in (n for parameter in found.parameters for n in found.missing(parameter, set())):
        place = found.place(name)
        assert place is not None and place.shape is not None
        if m := re.fullmatch(r"(.*\.experts)\.\d+\.\w+\.weight", name):
            tensors |= {f"{m[1]}.{part}": torch.randn(4, *shape).to(torch.bfloat16) for part, shape in STACKS}
        else:
            tensors[name] = torch.zeros([n or 0 for n in place.shape], dtype=torch.bfloat16)
    for part in quantized:
        name = f"language_model.model.layers.0.self_attn.{part}.weight"
        tensors |= quantize(name, torch.randn(tensors[name].shape).to(torch.bfloat16))
    quantization: dict[str, object] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantization["bnb_4bit_quant_type"] = "nf4"
    modules = {slot.module for slot in found.parameters.values() if slot.quantized and not slot.experts}
    fused = {"o_proj" if part == "o_proj" else "qkv_proj" for part in quantized}
    modules -= {f"language_model.model.layers.0.self_attn.{part}" for part in fused}
    quantization["llm_int8_skip_modules"] = sorted(modules)
    folder.mkdir()
    save_file(tensors, folder / MODEL, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA4 | {"quantization_config": quantization}))
    return folder


def numbered(source: Path, out: Path) -> Path:
    """Llama 4 as transformers 4 saves it quantized: a list of experts, each of linear modules in NF4."""
    shutil.copytree(source, out)
    tensors = load_file(out / MODEL)
    for name in [name for name in tensors if ".experts." in name]:
        stem, fused = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
        for number, one in enumerate(tensors.pop(name)):
            for part, values in zip(parts, one.chunk(len(parts), dim=-1), strict=True):
                tensors |= quantize(f"{stem}.{number}.{part}.weight", values.T.contiguous())
    save_file(tensors, out / MODEL, {"format": "pt"})
    return out


@pytest.mark.parametrize("release", ["0.22.1", "0.32.0", "portable"])
def test_experts_that_are_stored_transposed_are_split_by_columns(release: str, tmp_path: Path) -> None:
    source = llama4(tmp_path / "source", "o_proj")
    (found,) = [f for f in scan(source, release).findings if f.code is Code.FUSED_EXPERTS]
    assert found.reason is None and len(found.tensors) == 4
    bnbfix.repair(source, tmp_path / "out", release, device="cpu")
    assert bnbfix.scan(tmp_path / "out", release).ok and bnbfix.verify(tmp_path / "out", source).ok
    before, after = load_file(source / MODEL), load_file(tmp_path / "out" / MODEL)
    experts = "language_model.model.layers.1.feed_forward.experts"
    gate, up = before[f"{experts}.gate_up_proj"][2].T.chunk(2)
    for part, values in (("gate_proj", gate), ("up_proj", up), ("down_proj", before[f"{experts}.down_proj"][2].T)):
        name = f"{experts}.2.{part}.weight"
        assert torch.equal(after[name], quantize(name, values.contiguous())[name]), part
    assert "transformers does not load" not in (tmp_path / "out" / "README.md").read_text(), "of this class it does"


def test_numbered_experts_are_joined_as_the_class_stores_them(tmp_path: Path) -> None:
    whole = llama4(tmp_path / "whole", "o_proj")
    source = numbered(whole, tmp_path / "source")
    assert scan(source, "portable").ok
    bnbfix.repair(source, tmp_path / "out", "0.32.0", device="cpu", bf16=True)
    assert bnbfix.verify(tmp_path / "out", source).ok
    before, after = load_file(source / MODEL), load_file(tmp_path / "out" / MODEL)
    assert {n: t.shape for n, t in after.items() if "experts" in n} == {
        n: t.shape for n, t in load_file(whole / MODEL).items() if "experts" in n
    }
    experts = "language_model.model.layers.0.feed_forward.experts"
    rows = [dequantize(before, f"{experts}.3.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj")]
    assert torch.equal(after[f"{experts}.gate_up_proj"][3], torch.cat(rows[:2]).T)
    assert torch.equal(after[f"{experts}.down_proj"][3], rows[2].T)


def test_what_a_class_reorders_is_wrong_in_4_bits_and_dequantized_with_its_group(tmp_path: Path) -> None:
    source = numbered(llama4(tmp_path / "whole", "q_proj", "k_proj", "v_proj", "o_proj"), tmp_path / "source")
    group = [f"language_model.model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    for release in (*RELEASES, "portable"):
        result = scan(source, release)
        (found,) = [f for f in result.findings if f.code is Code.REORDERED]
        assert (result.verdict, sorted(found.tensors)) == (Severity.WRONG, sorted(group))
        plan = bnbfix.plan_repair(source, release)
        changed = {e.name: (e.action, e.code) for e in plan.edits if e.name.endswith(".weight")}
        assert changed == dict.fromkeys(group, ("dequantize", Code.REORDERED)), "o_proj is not among them"
    bnbfix.repair(source, tmp_path / "out", "portable", device="cpu")
    assert scan(tmp_path / "out", "portable").ok
    unfused = llama4(tmp_path / "unfused", "o_proj")
    assert not [f for f in scan(unfused, "portable").findings if f.code is Code.REORDERED]


def test_experts_in_lists_of_a_class_that_has_no_tensor_of_all_are_refused_by_name(
    family: Make, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(family(MOE, "all"), tmp_path / "source"))
    tensors = load_file(source / MODEL)
    name = "model.layers.0.mlp.experts.gate_projs.0.weight"
    tensors[name] = tensors.pop("model.layers.0.mlp.experts.0.gate_proj.weight")
    save_file(tensors, source / MODEL, {"format": "pt"})
    with pytest.raises(bnbfix.Unrepairable, match=f"{re.escape(name)} cannot be joined: a {MOE} has no tensor of all"):
        bnbfix.plan_repair(source, "0.32.0", bf16=True)


GEMMA3N = {
    "architectures": ["Gemma3nForConditionalGeneration"],
    "model_type": "gemma3n",
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 512,
        "vocab_size_per_layer_input": 480,
        "hidden_size": 128,
        "intermediate_size": [256] * 4,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_size_per_layer_input": 48,
        "laurel_rank": 24,
    },
    "vision_config": {"hidden_size": 2048, "vocab_size": 16},
    "audio_config": {"hidden_size": 64, "vocab_size": 16, "conf_num_hidden_layers": 1},
}
L3N = "model.language_model.layers."


def gemma3n(folder: Path, *full: str) -> Path:
    """Every tensor that transformers has of this class; all linear modules in NF4 but those that match.

    Tensors that are not in NF4 are holes in the file: the vision tower has the size of the published one.
    """
    release = find_range("0.32.0")
    assert release is not None
    found, linears = expect(read_model(GEMMA3N), release), load_profile(GEMMA3N["architectures"][0])["linears"]  # type: ignore[index]
    assert found is not None
    infos, data, at = [], {}, 0

    def add(name: str, dtype: str, shape: list[int], values: bytes = b"") -> None:
        nonlocal at
        size = tensor_nbytes(dtype, shape)
        infos.append(TensorInfo(name, dtype, tuple(shape), at, at + size))
        data[at] = values
        at += size

    for name in (n for parameter in found.parameters for n in found.missing(parameter, set())):
        place = found.place(name)
        assert place is not None and place.shape is not None
        shape = [n or (16 if i == 0 else 64) for i, n in enumerate(place.shape)]
        if find_pattern(name) in linears and not any(re.search(pattern, name) for pattern in full):
            for part, value in quantize(name, torch.randn(shape).to(torch.bfloat16)).items():
                dtype = {torch.uint8: "U8", torch.float32: "F32"}[value.dtype]
                add(part, dtype, list(value.shape), value.numpy().tobytes())
        else:
            add(name, "BF16", shape)
    folder.mkdir()
    header = build_header(infos, {"format": "pt"})
    with (folder / MODEL).open("wb") as f:
        f.write(header)
        for begin, values in data.items():
            f.seek(len(header) + begin)
            f.write(values)
        f.truncate(len(header) + at)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(GEMMA3N | {"quantization_config": quantization}))
    return folder


def test_gemma_3n_as_transformers_quantizes_it(tmp_path: Path) -> None:
    source = gemma3n(tmp_path / "source")
    older, newer = (
        {f"{f.code} {f.message}": f.tensors for f in scan(source, release).findings} for release in ("0.22.1", "0.32.0")
    )
    routers = tuple(f"{L3N}{layer}.altup.modality_router.weight" for layer in range(4))
    decoder = ["altup_projections.0", "altup_projections.1", "altup_projections.2", "per_layer_model_projection"]
    for findings in (older, newer):
        assert findings["BNB107 quantized; vLLM makes a factor in its dtype, which becomes 0"] == routers
        towers = findings["BNB101 quantized in the file, an unquantized parameter in vLLM"]
        assert "model.embed_vision.embedding_projection.weight" in towers
        assert all(name.startswith(("model.audio_tower.", "model.embed_")) for name in towers)
        unbound = findings["BNB101 quantized in the file, for a parameter that gets no quant state"]
        assert sorted(unbound) == [f"model.language_model.{module}.weight" for module in decoder]
    shared = [f"{L3N}{layer}.self_attn.{part}.weight" for layer in (2, 3) for part in ("k_norm", "k_proj", "v_proj")]
    lost = "BNB106 not in the file; the release makes the parameter all the same"
    assert sorted(older[lost]) == shared and lost not in newer
    plan = bnbfix.plan_repair(source, "0.22.1")
    done = {e.name: e.action for e in plan.edits}
    assert all(done[name] == "dequantize" for name in routers) and all(done[name] == "insert" for name in shared)
    skip = str(plan.texts["config.json"])
    assert "language_model.model.layers.0.altup.modality_router" in skip
    assert f"{L3N}0.altup.modality_router" in skip
    assert '"language_model.model.self_decoder"' in skip, "the module in which vLLM has them"
    assert not bnbfix.plan_repair(source, "portable").nothing_to_do


@pytest.mark.parametrize(("release", "severity"), [("0.27.1", Severity.FAILS), ("0.32.0", Severity.WRONG)])
def test_what_vllm_does_not_find_is_not_requantized_either(tmp_path: Path, release: str, severity: Severity) -> None:
    source = gemma3n(tmp_path / "source", "altup", "audio", "embed_", "per_layer_model")
    found = [f for f in scan(source, release).findings if f.code is Code.UNQUANTIZED_IN_QUANTIZED]
    by_name = {name: f.severity for f in found for name in f.tensors}
    assert by_name["model.language_model.altup_projections.0.weight"] is Severity.FAILS
    assert by_name["model.language_model.altup_unembed_projections.0.weight"] is severity


def test_a_quarter_of_gemma_3ns_layers_may_be_narrower(tmp_path: Path) -> None:
    config = GEMMA3N | {"text_config": GEMMA3N["text_config"] | {"intermediate_size": [256, 256, 256, 128]}}  # type: ignore[operator]
    release = find_range("0.32.0")
    assert release is not None
    for known, shape in ((GEMMA3N, (256, 128)), (config, (None, 128))):
        found = expect(read_model(known), release)
        assert found is not None
        place = found.place(f"{L3N}0.mlp.up_proj.weight")
        assert place is not None and place.shape == shape, "each layer has its own: no size is held against it"


def as_lists(source: Path, out: Path) -> Path:
    """gpt-oss as unsloth publishes it: each expert's projections in NF4 linear modules, the router in a module more."""
    shutil.copytree(source, out)
    tensors = load_file(out / MODEL)
    for name in list(tensors):
        value = tensors.pop(name)
        if m := re.fullmatch(r"(.*\.experts\.\w+_proj)(_bias)?", name):
            for number, one in enumerate(value):
                linear = f"{m[1]}s.{number}"
                tensors |= {f"{linear}.bias": one} if m[2] else quantize(f"{linear}.weight", one.T.contiguous())
        else:
            tensors[name.replace("router.", "router.linear.")] = value
    save_file(tensors, out / MODEL, {"format": "pt"})
    return out


def test_lists_of_experts_of_which_no_release_takes_4_bits_are_joined_as_the_class_stores_them(
    family: Make, tmp_path: Path
) -> None:
    source = as_lists(family(GPT_OSS, "all"), tmp_path / "lists")
    for release in (*RELEASES, "portable"):
        found = {f.code: f for f in scan(source, release).findings}
        assert {Code.MOE_REFUSED, Code.EXPERT_LINEARS} <= set(found)
        assert "no release takes experts of this class in 4 bits" in str(found[Code.EXPERT_LINEARS].reason)
    bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu", bf16=True)
    assert bnbfix.verify(tmp_path / "out", source).ok
    before, after = load_file(source / MODEL), load_file(tmp_path / "out" / MODEL)
    assert {name: list(t.shape) for name, t in after.items()} == SHAPES[GPT_OSS]["tensors"]
    mlp = "model.layers.1.mlp."
    assert torch.equal(after[f"{mlp}router.weight"], before[f"{mlp}router.linear.weight"])
    for part in ("gate_up_proj", "down_proj"):
        stem = f"{mlp}experts.{part}s.2"
        assert torch.equal(after[f"{mlp}experts.{part}_bias"][2], before[f"{stem}.bias"])
        assert torch.equal(after[f"{mlp}experts.{part}"][2], dequantize(before, f"{stem}.weight").T)
    name = f"{mlp}experts.down_proj"
    data = bytearray((tmp_path / "out" / MODEL).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + json.loads(data[8:start])[name]["data_offsets"][0] + 1] ^= 0x01
    (tmp_path / "out" / MODEL).write_bytes(data)
    assert name in [p.tensor for p in bnbfix.verify(tmp_path / "out", source).problems]


def test_gate_and_up_are_not_joined_where_they_may_alternate(family: Make, tmp_path: Path) -> None:
    source = as_lists(family(GPT_OSS, "all"), tmp_path / "lists")
    tensors = load_file(source / MODEL)
    name = "model.layers.0.mlp.experts.gate_projs.0.weight"
    tensors[name] = torch.zeros(192, 128, dtype=torch.bfloat16)
    save_file(tensors, source / MODEL, {"format": "pt"})
    with pytest.raises(bnbfix.Unrepairable, match=f"{re.escape(name)} cannot be joined: gate and up alternate"):
        bnbfix.plan_repair(source, "0.32.0", bf16=True)


@pytest.mark.parametrize("lost", ["gate_up_projs.1.bias", "down_projs.2.bias"])
def test_a_bias_that_is_lost_is_named(lost: str, family: Make, tmp_path: Path) -> None:
    source = as_lists(family(GPT_OSS, "all"), tmp_path / "lists")
    tensors = load_file(source / MODEL)
    del tensors[f"model.layers.0.mlp.experts.{lost}"]
    save_file(tensors, source / MODEL, {"format": "pt"})
    with pytest.raises(bnbfix.Unrepairable, match=r"proj_bias cannot be joined: expert [12] has no"):
        bnbfix.plan_repair(source, "0.32.0", bf16=True)


def test_the_nearest_repair_of_what_no_release_loads_in_4_bits_is_full_precision(
    checkpoint: Callable[..., Path],
) -> None:
    source = checkpoint("moe26b", "int8")
    (choice,) = find_choices(opened(source), resolve_target("0.32.0"))
    assert choice.bf16 and choice.target.name == "0.32.0" and not choice.nothing_to_do
