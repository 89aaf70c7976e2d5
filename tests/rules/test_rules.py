"""Every rule on checkpoints where it must speak, with tensors, severity and releases, and where it must not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bnbfix.checkpoint.checkpoint import open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.engine import Installed, Target
from bnbfix.engines.targets import resolve_target
from bnbfix.engines.vllm.releases import ranges
from bnbfix.models.detect import read_model
from bnbfix.models.family import FULL, SLIDING
from bnbfix.models.roles import canonical
from bnbfix.rules.config import legacy_head_config
from bnbfix.rules.rule import CHECKS, EXPLANATIONS, Code, Severity
from bnbfix.rules.scan import scan_checkpoint
from tests.support.build import (
    SHARD,
    Make,
    Tensors,
    copy_weight,
    dequantize_weight,
    drop_weight,
    json_of,
    opened,
    read_tensors,
    retype,
    scan,
    set_skip,
    state_tensors,
    tensors_of,
    write_index,
    write_tensors,
    zeros,
)

LOADS, NOTE, DEGRADED, WRONG, FAILS = Severity
L = "model.language_model.layers."
TOWER = r"model\.(vision_tower\..*(linear|input_proj)\.weight|embed_vision\.\w+\.weight)"
AUDIO = r"model\.(embed_audio\.\w+\.weight|audio_tower\..*(linear|_proj)\.weight)"
NAMES = [r.name for r in ranges()]
ALL = tuple(NAMES)
TO_022, TO_024, TO_027, TO_028, TO_029 = (tuple(NAMES[:n]) for n in (1, 3, 5, 6, 7))
FROM_023, FROM_025, FROM_028, FROM_029, FROM_031, FROM_032 = (tuple(NAMES[n:]) for n in (1, 3, 5, 6, 8, 9))
NO_EXPERTS = (*TO_024, "0.31.0")  # releases that load no mixture of experts in 4 bits
EXPERTS = tuple(name for name in NAMES if name not in NO_EXPERTS)

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A checkpoint, perhaps changed, and a target for which a code must not be found."""

    code: Code
    family: str
    quant: str
    target: str | Target
    change: Change | None = None
    what: str = ""  # what the change is, for the name of the test
    options: tuple[tuple[str, bool], ...] = ()

    def __str__(self) -> str:
        target = self.target if isinstance(self.target, str) else "installed " + self.target.name
        return "-".join(filter(None, (self.code.name.lower(), self.family, self.quant, self.what, target)))

    def make(self, pristine: Make, checkpoint: Make) -> Path:
        if self.change is None:
            return pristine(self.family, self.quant, **dict(self.options))
        source = checkpoint(self.family, self.quant, **dict(self.options))
        self.change(source)
        return source


@dataclass(frozen=True)
class Found(Case):
    """The same, for which it must be found, and what the finding says."""

    severity: Severity = FAILS
    tensors: str = ""  # a pattern: every tensor of the checkpoint that matches it is named, and no other
    releases: tuple[str, ...] = ()
    others: int = 0  # findings of the same code next to this one


def edit(change: Callable[[Tensors], None]) -> Change:
    """A change of the tensors of a checkpoint in one file."""

    def run(folder: Path) -> None:
        with tensors_of(folder) as tensors:
            change(tensors)

    return run


def skip(*entries: str) -> Change:
    return lambda folder: set_skip(folder, *entries)


def quantization(**values: object) -> Change:
    def run(folder: Path) -> None:
        with json_of(folder) as config:
            config["quantization_config"] |= values

    return run


def explicit_v(tensors: Tensors) -> None:
    for layer in (2, 5):
        copy_weight(tensors, f"{L}{layer}.self_attn.k_proj.weight", f"{L}{layer}.self_attn.v_proj.weight")


def unquantized_qk(tensors: Tensors) -> None:
    for layer in (2, 5):
        for part in "qk":
            dequantize_weight(tensors, f"{L}{layer}.self_attn.{part}_proj.weight")


def nothing_quantized(folder: Path) -> None:
    with tensors_of(folder) as tensors:
        for name in [n for n in tensors if f"{n}.absmax" in tensors]:
            dequantize_weight(tensors, name)
    set_skip(folder, "model")


def adapter(tensors: Tensors) -> None:
    for name in ("lora_A", "lora_B"):
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"] = zeros(8, 128)


def lm_head(tensors: Tensors) -> None:
    copy_weight(tensors, next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight")), "lm_head.weight")


def unquantized_lm_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = zeros(512, 128)


def no_quant_map(tensors: Tensors) -> None:
    del tensors[f"{L}1.self_attn.k_proj.weight.quant_map"]


def inconsistent_shape(tensors: Tensors) -> None:
    weight = f"{L}1.self_attn.k_proj.weight"
    name = next(weight + suffix for suffix in state_tensors(tensors, weight) if ".quant_state." in suffix)
    tensors[name] = replace(tensors[name], data=tensors[name].data.replace(b"64, 128", b"64, 129"))


def flat(tensors: Tensors) -> None:
    name = f"{L}0.mlp.up_proj.weight"
    retype(tensors, name, "U8", 1, len(tensors[name].data))
    name = f"{L}3.self_attn.o_proj.weight"
    retype(tensors, name, "U8", len(tensors[name].data))


def bf16_bytes(tensors: Tensors) -> None:
    name = f"{L}0.mlp.up_proj.weight"
    retype(tensors, name, "BF16", len(tensors[name].data) // 2, 1)


def stray_statistics(tensors: Tensors) -> None:
    for suffix in (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"):
        tensors[L + "9.mlp.up_proj.weight" + suffix] = tensors[L + "0.mlp.up_proj.weight" + suffix]


def bound_state(tensors: Tensors) -> None:
    old = state_tensors(tensors, f"{L}0.mlp.up_proj.weight")
    for part in ("up", "gate"):
        dequantize_weight(tensors, f"{L}0.mlp.{part}_proj.weight")
    tensors |= {f"{L}0.mlp.up_proj.weight{suffix}": t for suffix, t in old.items()}


def per_expert(prefix: str, *, quantized: bool = True) -> Callable[[Tensors], None]:
    """Per-expert weights of layer 3 in place of the two tensors of every layer."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]
        for expert in range(2):
            for part in ("gate", "up", "down"):
                name = f"{L}3.{prefix}.{expert}.{part}_proj.weight"
                if quantized:
                    copy_weight(tensors, f"{L}3.mlp.{part}_proj.weight", name)
                else:
                    tensors[name] = zeros(64, 128)

    return change


def uneven(tensors: Tensors) -> None:
    """One matrix of one expert says that it was quantized from another dtype."""
    per_expert("experts")(tensors)
    name = f"{L}3.experts.1.down_proj.weight.quant_state.bitsandbytes__nf4"
    old = tensors[name].data
    tensors[name] = replace(tensors[name], data=old.replace(b'"dtype": "bfloat16"', b'"dtype":  "float16"'))
    assert tensors[name].data != old


def quantized_experts(tensors: Tensors) -> None:
    name = f"{L}3.experts.down_proj"
    del tensors[name]
    copy_weight(tensors, f"{L}3.mlp.down_proj.weight", name)


def wrong_size(folder: Path) -> None:
    write_index(folder, metadata={"total_size": 7})


def no_total_size(folder: Path) -> None:
    write_index(folder, metadata={"format": "pt"})


def stale_tensor(folder: Path) -> None:
    write_index(folder)
    with tensors_of(folder) as tensors:
        tensors[L + "0.stale"] = zeros(8)
    with json_of(folder, "model.safetensors.index.json") as doc:
        doc["metadata"]["total_size"] += 16


def moved(folder: Path) -> None:
    with tensors_of(folder) as tensors:
        name = "model.language_model.norm.weight"
        write_tensors(folder / "other.safetensors", {name: tensors.pop(name)})
    write_index(folder)
    with json_of(folder, "model.safetensors.index.json") as doc:
        doc["weight_map"] |= {name: SHARD, L + "0.layer_scalar": "other.safetensors"}


def twice(folder: Path) -> None:
    tensors = read_tensors(folder / SHARD)
    name = L + "0.mlp.up_proj.weight"
    write_tensors(folder / "other.safetensors", {name: tensors[name], "model.language_model.x": zeros(4)})


def per_layer(**layer: object) -> Change:
    """per_layer_config with the same values for every full-attention layer."""

    def run(folder: Path) -> None:
        with json_of(folder) as config:
            text = config["text_config"]
            full = [str(i) for i, kind in enumerate(text["layer_types"]) if kind == FULL]
            text["per_layer_config"] = dict.fromkeys(full, layer)
            text["head_dim"] = 512

    return run


def default_rope(folder: Path) -> None:
    """Of the newer form, only per_layer_config is left."""
    with json_of(folder) as config:
        config["vision_config"]["rope_parameters"]["rope_type"] = "default"


def pickled(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "old/consolidated.00.PTH", "binary", "bin.safetensors.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def programs(folder: Path) -> None:
    for name in ("modeling_gemma4.py", "convert.SH", "py", "python.txt"):
        (folder / name).touch()


def auto_map(folder: Path) -> None:
    with json_of(folder) as config:
        config["auto_map"] = {"AutoConfig": "configuration_gemma4.Gemma4Config"}


def has_axial_rope(folder: Path) -> None:
    with json_of(folder) as config:
        config["vision_config"]["rope_parameters"]["rope_type"] = "axial"


def installed(version: str, plugin: str | None, transformers: str = "5.14.1") -> Target:
    return resolve_target(None, Installed(version, plugin, transformers))


def copied_lm_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]


def untied(change: Callable[[Tensors], None]) -> Change:
    def run(folder: Path) -> None:
        edit(change)(folder)
        with json_of(folder) as config:
            config["tie_word_embeddings"] = False

    return run


def second_set(folder: Path) -> None:
    (folder / SHARD).rename(folder / "model-00001-of-00001.safetensors")
    write_index(folder)
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder / SHARD)


def no_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def float16(folder: Path) -> None:
    with json_of(folder) as config:
        config["dtype"] = "float16"


def no_soft_tokens(folder: Path) -> None:
    with json_of(folder) as config:
        del config["vision_config"]["num_soft_tokens"]


def text_class(folder: Path) -> None:
    with json_of(folder) as config:
        config["architectures"] = ["Gemma4ForCausalLM"]


def no_quantization_config(folder: Path) -> None:
    with json_of(folder) as config:
        del config["quantization_config"]


def expert_linears(tensors: Tensors) -> None:
    donor = f"{L}0.self_attn.o_proj.weight"
    copy_weight(tensors, donor, f"{L}0.experts.gate_up_projs.3.weight")


def stacked_experts(tensors: Tensors) -> None:
    """Layer 3 in 4 bits, as Experts4bit keeps them."""
    for part, columns in ("gate_up", 128), ("down", 64):
        experts, rows, _ = tensors[f"{L}3.experts.{part}_proj"].shape
        size = rows * columns
        tensors[f"{L}3.experts.{part}_proj"] = zeros(experts, size // 2, dtype="U8")
        tensors[f"{L}3.experts.{part}_absmax"] = zeros(experts, size // 64, dtype="F32")


def lora_leftover(tensors: Tensors) -> None:
    tensors[f"{L}0.self_attn.q_proj.lora_A.default.weight"] = zeros(4, 128)


def lost_weight(tensors: Tensors) -> None:
    del tensors[f"{L}0.mlp.up_proj.weight"]


# What a finding may name though no file holds it: k, v and k_norm of layers that share theirs.
MISSING = [f"{L}{n}.self_attn.{part}.weight" for n in (4, 5) for part in ("k_norm", "k_proj", "v_proj")]
NEWER = (("per_layer_config", True),)
NORM = "model.language_model.norm.weight"


def unknown_names(tensors: Tensors) -> None:
    tensors |= {"score.weight": zeros(2, 128), L + "0.self_attn.rotary_emb.inv_freq": zeros(16)}


def rename_norm(tensors: Tensors) -> None:
    tensors["model.model.language_model.norm.weight"] = tensors.pop(NORM)


def grow_embeddings(tensors: Tensors) -> None:
    tensors["model.language_model.embed_tokens.weight"] = zeros(520, 128)


def whole_numbers(tensors: Tensors) -> None:
    tensors[NORM] = zeros(128, dtype="I16")


FOUND = [
    Found(Code.UNKNOWN_NAME, "dense31b", "all", "0.32.0", edit(unknown_names), tensors="score.weight", releases=ALL),
    Found(Code.UNFILLED, "dense31b", "all", "0.32.0", edit(lambda t: t.pop(NORM)), tensors=NORM, releases=ALL),
    Found(
        Code.PARTLY_FILLED,
        "dense31b",
        "all",
        "0.27.1",
        edit(lambda t: drop_weight(t, L + "1.mlp.up_proj.weight")),
        tensors=r".*layers\.1\.mlp\.up_proj\.weight",
        releases=ALL,
    ),
    Found(
        Code.WRONG_SHAPE, "dense31b", "all", "0.32.0", edit(grow_embeddings), tensors=".*embed_tokens.*", releases=ALL
    ),
    Found(
        Code.WRONG_SHAPE,
        "dense31b",
        "all",
        "0.32.0",
        edit(whole_numbers),
        "whole numbers",
        severity=WRONG,
        tensors=NORM,
        releases=ALL,
    ),
    Found(Code.WRONG_PREFIX, "dense31b", "all", "0.32.0", edit(rename_norm), tensors="model.model.*", releases=ALL),
    Found(Code.QUANTIZED_IN_UNQUANTIZED, "dense31b", "all", "0.22.1", tensors=TOWER, releases=TO_022),
    Found(Code.QUANTIZED_IN_UNQUANTIZED, "dense31b", "all", "portable", tensors=TOWER, releases=TO_022),
    Found(Code.QUANTIZED_IN_UNQUANTIZED, "e4b", "all", "0.19.1", tensors=f"{TOWER}|{AUDIO}", releases=TO_022),
    Found(
        Code.QUANTIZED_IN_UNQUANTIZED,
        "unified12b",
        "all",
        "0.32.0",
        tensors=r".*\.embedding_projection\.weight",
        releases=FROM_023,
    ),
    Found(
        Code.QUANTIZED_IN_UNQUANTIZED, "moe26b", "all", "0.27.1", tensors=r".*\.router\.proj\.weight", releases=FROM_025
    ),
    Found(Code.UNQUANTIZED_IN_QUANTIZED, "dense31b", "skip", "0.27.1", tensors=TOWER, releases=FROM_023[:4]),
    Found(
        Code.UNQUANTIZED_IN_QUANTIZED, "dense31b", "skip", "0.32.0", severity=WRONG, tensors=TOWER, releases=FROM_028
    ),
    Found(Code.UNQUANTIZED_IN_QUANTIZED, "dense31b", "int8", "0.32.0", tensors=TOWER, releases=FROM_023),
    Found(
        Code.UNQUANTIZED_IN_QUANTIZED,
        "e4b",
        "skip",
        "0.28.0",
        severity=WRONG,
        tensors=f"{TOWER}|{AUDIO}",
        releases=FROM_028,
    ),
    Found(
        Code.UNQUANTIZED_IN_QUANTIZED,
        "unified12b",
        "skip",
        "0.33.0",
        severity=WRONG,
        tensors=r".*\.patch_dense\.weight",
        releases=FROM_028,
    ),
    Found(
        Code.UNQUANTIZED_IN_QUANTIZED,
        "dense31b",
        "mixed",
        "0.22.1",
        releases=TO_022,
        tensors=r".*\.layers\.(1\.self_attn\.[qkvo]_proj|3\.mlp\.\w+_proj)\.weight",
    ),
    Found(
        Code.PARTIALLY_QUANTIZED,
        "dense31b",
        "partial",
        "0.27.1",
        releases=TO_027,
        tensors=r".*language.*\.layers\.(1\.self_attn\.[qkv]_proj|3\.mlp\.(gate|up)_proj)\.weight",
    ),
    Found(
        Code.PARTIALLY_QUANTIZED,
        "dense31b",
        "partial",
        "0.32.0",
        severity=WRONG,
        releases=FROM_028,
        tensors=r".*language.*\.layers\.(1\.self_attn\.[qkv]_proj|3\.mlp\.(gate|up)_proj)\.weight",
    ),
    Found(
        Code.PARTIALLY_QUANTIZED,
        "text",
        "partial",
        "0.22.1",
        releases=TO_027,
        tensors=r"model\.layers\.(1\.self_attn\.[qkv]_proj|3\.mlp\.(gate|up)_proj)\.weight",
    ),
    Found(
        Code.K_EQ_V_WITHOUT_V,
        "dense31b",
        "all",
        "0.22.1",
        releases=TO_022,
        tensors=r".*\.layers\.[25]\.self_attn\.k_proj\.weight",
    ),
    Found(
        Code.K_EQ_V_WITHOUT_V,
        "text",
        "single",
        "portable",
        releases=TO_022,
        tensors=r".*\.layers\.[25]\.self_attn\.k_proj\.weight",
    ),
    Found(
        Code.EXPLICIT_V,
        "dense31b",
        "all",
        "0.32.0",
        edit(explicit_v),
        "explicit v",
        releases=FROM_031,
        tensors=r".*\.layers\.[25]\.self_attn\.v_proj\.weight",
    ),
    Found(
        Code.SHARED_WITHOUT_KV,
        "e4b-noshared",
        "all",
        "0.22.1",
        releases=TO_029,
        tensors=r".*\.layers\.[45]\.self_attn\.(k_norm|k_proj|v_proj)\.weight",
    ),
    Found(
        Code.QUANTIZED_PIXEL_PROJECTION,
        "dense31b",
        "all",
        "0.28.0",
        severity=DEGRADED,
        releases=FROM_028[:4],
        tensors=r".*\.patch_embedder\.input_proj\.weight",
    ),
    Found(
        Code.QUANTIZED_PIXEL_PROJECTION,
        "e4b",
        "all",
        "portable",
        severity=DEGRADED,
        releases=FROM_028[:4],
        tensors=r".*\.patch_embedder\.input_proj\.weight",
    ),
    Found(
        Code.QUANTIZED_LM_HEAD,
        "text",
        "all",
        "0.32.0",
        edit(lm_head),
        "tied",
        tensors=r"lm_head\.weight",
        releases=FROM_029,
    ),
    Found(
        Code.QUANTIZED_LM_HEAD,
        "dense31b",
        "all",
        "0.22.1",
        untied(lm_head),
        "untied",
        tensors=r"lm_head\.weight",
        releases=ALL,
    ),
    Found(
        Code.QUANTIZED_BUT_SKIPPED,
        "dense31b",
        "all",
        "0.27.1",
        skip("vision_tower", "embed_vision"),
        "skipped",
        tensors=TOWER,
        releases=FROM_023,
    ),
    Found(
        Code.QUANTIZED_BUT_SKIPPED,
        "text",
        "all",
        "0.22.1",
        skip("model.layers.3.mlp"),
        "skipped",
        releases=ALL,
        tensors=r"model\.layers\.3\.mlp\.\w+_proj\.weight",
    ),
    Found(
        Code.WEIGHT_NOT_A_COLUMN,
        "dense31b",
        "all",
        "0.32.0",
        edit(flat),
        "flat",
        releases=ALL,
        tensors=r".*language.*\.(0\.mlp\.up_proj|3\.self_attn\.o_proj)\.weight",
    ),
    Found(
        Code.QUANT_STORAGE,
        "dense31b",
        "storage-bf16",
        "0.32.0",
        releases=ALL,
        tensors=rf"{L}\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight",
    ),
    Found(
        Code.QUANT_STORAGE,
        "text",
        "all",
        "0.27.1",
        quantization(bnb_4bit_quant_storage="bfloat16"),
        "said",
        releases=ALL,
    ),
    Found(
        Code.QUANT_STORAGE,
        "dense31b",
        "all",
        "0.27.1",
        edit(bf16_bytes),
        "bytes",
        releases=ALL,
        tensors=rf"{L}0\.mlp\.up_proj\.weight",
    ),
    Found(
        Code.QUANT_STATE,
        "dense31b",
        "all",
        "0.32.0",
        edit(no_quant_map),
        "no quant_map",
        releases=ALL,
        tensors=rf"{L}1\.self_attn\.k_proj\.weight",
    ),
    Found(
        Code.QUANT_STATE,
        "dense31b",
        "single",
        "0.22.1",
        edit(inconsistent_shape),
        "other shape",
        releases=ALL,
        tensors=rf"{L}1\.self_attn\.k_proj\.weight",
    ),
    Found(
        Code.ORPHANED_STATE_TENSORS,
        "dense31b",
        "all",
        "0.32.0",
        edit(stray_statistics),
        "strays",
        severity=NOTE,
        releases=ALL,
        tensors=rf"{L}9\..*",
    ),
    Found(
        Code.ORPHANED_STATE_TENSORS,
        "dense31b",
        "single",
        "0.32.0",
        edit(bound_state),
        "next to unquantized",
        releases=ALL,
        tensors=rf"{L}0\.mlp\.up_proj\.weight\.quant_state\..*",
        others=1,
    ),
    Found(
        Code.PICKLES,
        "text",
        "all",
        "portable",
        pickled,
        severity=NOTE,
        releases=ALL,
        tensors=r"pytorch_model\.bin|training_args\.bin|old/consolidated\.00\.PTH",
    ),
    Found(
        Code.CODE,
        "text",
        "all",
        "portable",
        programs,
        severity=NOTE,
        releases=ALL,
        tensors=r"modeling_gemma4\.py|convert\.SH",
    ),
    Found(Code.CODE, "text", "all", "portable", auto_map, "auto_map", severity=NOTE, releases=ALL),
    Found(Code.ADAPTER, "text", "all", "0.32.0", edit(adapter), "adapter", tensors=r"base_model\..*", releases=ALL),
    Found(
        Code.ADAPTER, "dense31b", "all", "0.32.0", edit(lora_leftover), "lora", tensors=".*lora.*", releases=FROM_031
    ),
    Found(
        Code.ADAPTER,
        "dense31b",
        "all",
        "0.30.0",
        edit(lora_leftover),
        "lora ignored",
        severity=NOTE,
        tensors=".*lora.*",
        releases=ALL[:8],
    ),
    Found(
        Code.ORPHANED_STATE_TENSORS,
        "dense31b",
        "all",
        "0.32.0",
        edit(lost_weight),
        "lost",
        releases=ALL,
        tensors=rf"{L}0\.mlp\.up_proj\.weight\..*",
    ),
    Found(Code.UNUSED_WEIGHTS, "text", "all", "0.32.0", second_set, severity=NOTE, releases=ALL, tensors=SHARD),
    Found(Code.PROCESSOR, "e4b", "all", "0.32.0", no_processor, severity=NOTE, releases=ALL),
    Found(
        Code.TIED_LM_HEAD,
        "dense31b",
        "all",
        "0.27.1",
        edit(unquantized_lm_head),
        "another",
        severity=WRONG,
        tensors="lm_head.weight",
        releases=TO_028,
    ),
    Found(
        Code.TIED_LM_HEAD,
        "dense31b",
        "all",
        "portable",
        edit(copied_lm_head),
        "copy",
        severity=NOTE,
        tensors="lm_head.weight",
        releases=TO_028,
    ),
    Found(
        Code.TIED_LM_HEAD,
        "dense31b",
        "all",
        "0.22.1",
        edit(lm_head),
        "quantized",
        severity=NOTE,
        tensors="lm_head.weight",
        releases=TO_028,
    ),
    Found(Code.TRANSFORMERS, "dense31b", "all", "0.27.1", severity=NOTE, releases=("0.24.0", *ALL[3:5])),
    Found(Code.TRANSFORMERS, "dense31b", "all", installed("0.27.1", None, "5.15.0"), releases=("0.27.0-0.27.1",)),
    Found(Code.QUANTIZATION_CONFIG, "dense31b", "all", "0.32.0", no_quantization_config, "missing", releases=ALL),
    Found(Code.QUANTIZATION_CONFIG, "text", "all", "0.32.0", quantization(load_in_8bit=True), "8 bits", releases=ALL),
    Found(Code.OTHER_CLASS, "dense31b", "all", "0.27.1", text_class, severity=NOTE, releases=ALL),
    Found(Code.FLOAT16, "dense31b", "all", "0.27.1", float16, severity=NOTE, releases=ALL),
    Found(Code.SOFT_TOKENS, "unified12b", "all", "0.27.1", no_soft_tokens, releases=FROM_023),
    Found(
        Code.FUSED_EXPERTS,
        "moe26b",
        "all",
        "0.32.0",
        edit(stacked_experts),
        "stacks",
        releases=EXPERTS,
        tensors=r".*\.experts\.(gate_up|down)_proj",
    ),
    Found(
        Code.EXPERT_LINEARS,
        "moe26b",
        "all",
        "0.32.0",
        edit(expert_linears),
        releases=ALL,
        tensors=r".*\.gate_up_projs\.3\.weight",
    ),
    Found(Code.NOTHING_QUANTIZED, "text", "all", "portable", nothing_quantized, "everything skipped", releases=ALL),
    Found(Code.INDEX, "dense31b", "all", "0.32.0", wrong_size, "size", severity=NOTE, releases=ALL),
    Found(
        Code.INDEX, "dense31b", "all", "0.32.0", stale_tensor, "stale", severity=NOTE, releases=ALL, tensors=r".*stale"
    ),
    Found(
        Code.INDEX,
        "dense31b",
        "all",
        "0.32.0",
        moved,
        "moved",
        severity=NOTE,
        releases=ALL,
        tensors=rf"model\.language_model\.norm\.weight|{L}0\.layer_scalar",
    ),
    Found(
        Code.DUPLICATE,
        "dense31b",
        "all",
        "0.32.0",
        twice,
        "twice",
        severity=WRONG,
        releases=ALL,
        tensors=rf"{L}0\.mlp\.up_proj\.weight",
    ),
    Found(
        Code.SKIP_ENTRY,
        "dense31b",
        "skip",
        "0.32.0",
        severity=NOTE,
        releases=FROM_023,
        tensors="model.vision_tower|model.embed_vision",
    ),
    Found(
        Code.SKIP_ENTRY,
        "dense31b",
        "mixed",
        "0.22.1",
        severity=NOTE,
        releases=TO_022,
        tensors=rf"{L}1\.self_attn|{L}3\.mlp",
    ),
    Found(Code.PER_LAYER_CONFIG, "dense31b", "all", "0.27.1", default_rope, "heads", NEWER, releases=ALL[:9]),
    Found(Code.PER_LAYER_CONFIG, "dense31b", "all", "0.22.1", has_axial_rope, "rope", releases=ALL[:9]),
    Found(Code.PER_LAYER_CONFIG, "text", "all", "portable", None, "", NEWER, releases=ALL[:9]),
    Found(Code.PER_LAYER_CONFIG, "e4b", "all", "0.24.0", per_layer(head_dim=512), "512", releases=ALL[1:9]),
    Found(Code.UNKNOWN_CLASS, "unified12b", "skip", "0.22.1", releases=TO_022),
    Found(Code.PLUGIN, "dense31b", "all", "portable", severity=NOTE, releases=FROM_028),
    Found(Code.PLUGIN, "dense31b", "all", installed("0.32.0", None), releases=FROM_032),
    Found(Code.PLUGIN, "dense31b", "all", installed("0.27.1", "0.0.3"), releases=("0.27.0-0.27.1",)),
    Found(
        Code.TRANSFORMERS_REQUANTIZES,
        "dense31b",
        "skip",
        "0.32.0",
        skip("vision_tower", "embed_vision"),
        "not HF's",
        severity=NOTE,
        tensors=TOWER,
        releases=ALL,
    ),
    Found(Code.MOE_REFUSED, "moe26b", "skip", "0.22.1", releases=NO_EXPERTS),
    Found(Code.MOE_REFUSED, "moe26b", "int8", "0.24.0", releases=NO_EXPERTS),
    Found(
        Code.FUSED_EXPERTS, "moe26b", "skip", "0.27.1", releases=EXPERTS, tensors=r".*\.experts\.(gate_up|down)_proj"
    ),
    Found(
        Code.FUSED_EXPERTS,
        "moe26b",
        "all",
        "0.32.0",
        edit(quantized_experts),
        "not whole matrices",
        releases=EXPERTS,
        tensors=rf"{L}3\.experts\.down_proj",
        others=1,  # those that are whole
    ),
    Found(
        Code.EXPERT_PREFIX,
        "moe26b",
        "all",
        "0.27.1",
        edit(per_expert("experts")),
        "new prefix",
        tensors=r".*\.experts\.\d\..*_proj\.weight",
        releases=EXPERTS[:5],
    ),
    Found(
        Code.EXPERT_PREFIX,
        "moe26b",
        "all",
        "0.32.0",
        edit(per_expert("moe.experts")),
        "old prefix",
        tensors=r".*\.experts\.\d\..*_proj\.weight",
        releases=FROM_032,
    ),
    Found(
        Code.FP4_EXPERTS,
        "moe26b",
        "fp4",
        "0.32.0",
        edit(per_expert("experts")),
        "per expert",
        severity=WRONG,
        tensors=r".*\.experts\.\d\..*_proj\.weight",
        releases=EXPERTS,
    ),
    Found(
        Code.MIXED_EXPERTS,
        "moe26b",
        "all",
        "0.32.0",
        edit(uneven),
        "uneven",
        releases=EXPERTS,
        tensors=r".*\.experts\.\d\..*_proj\.weight",
    ),
    Found(
        Code.INT8,
        "dense31b",
        "int8",
        "0.22.1",
        severity=NOTE,
        releases=ALL,
        tensors=rf"{L}\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight",
    ),
    Found(
        Code.INT8,
        "moe26b",
        "int8",
        "0.32.0",
        releases=ALL,
        tensors=rf"{L}\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight",
    ),
]


ABSENT = [
    *(
        Case(code, family, "skip", target)
        for code in (Code.UNKNOWN_NAME, Code.UNFILLED, Code.PARTLY_FILLED, Code.WRONG_SHAPE, Code.WRONG_PREFIX)
        for family, target in (("dense31b", "portable"), ("e4b", "0.22.1"), ("unified12b", "portable"))
    ),
    Case(Code.QUANTIZED_IN_UNQUANTIZED, "dense31b", "all", "0.27.1"),
    Case(Code.QUANTIZED_IN_UNQUANTIZED, "dense31b", "skip", "0.22.1"),
    Case(Code.QUANTIZED_IN_UNQUANTIZED, "dense31b", "all", "0.32.0", edit(lm_head), "lm_head is BNB108's"),
    Case(Code.QUANTIZED_IN_UNQUANTIZED, "unified12b", "skip", "0.32.0"),
    Case(Code.QUANTIZED_IN_UNQUANTIZED, "moe26b", "skip", "0.27.1"),
    Case(Code.QUANTIZED_IN_UNQUANTIZED, "text", "all", "0.22.1"),
    Case(Code.UNQUANTIZED_IN_QUANTIZED, "dense31b", "all", "portable"),
    Case(Code.UNQUANTIZED_IN_QUANTIZED, "dense31b", "skip", "0.22.1"),
    Case(
        Code.UNQUANTIZED_IN_QUANTIZED, "dense31b", "skip", "portable", skip("vision_tower", "embed_vision"), "skipped"
    ),
    Case(Code.UNQUANTIZED_IN_QUANTIZED, "text", "mixed", "portable"),
    Case(Code.PARTIALLY_QUANTIZED, "dense31b", "mixed", "portable"),
    Case(
        Code.PARTIALLY_QUANTIZED,
        "dense31b",
        "partial",
        "portable",
        skip("language_model.model.layers.1.self_attn", "language_model.model.layers.3.mlp.gate_up_proj"),
        "skipped",
    ),
    Case(Code.PARTIALLY_QUANTIZED, "e4b", "all", "portable"),
    Case(Code.K_EQ_V_WITHOUT_V, "dense31b", "all", "0.23.0"),
    Case(Code.K_EQ_V_WITHOUT_V, "dense31b", "all", "0.22.1", edit(explicit_v), "explicit v"),
    Case(Code.K_EQ_V_WITHOUT_V, "dense31b", "all", "0.22.1", edit(unquantized_qk), "unquantized"),
    Case(Code.K_EQ_V_WITHOUT_V, "e4b", "all", "0.22.1"),
    Case(Code.EXPLICIT_V, "dense31b", "all", "portable"),
    Case(Code.EXPLICIT_V, "dense31b", "all", "0.30.0", edit(explicit_v), "explicit v"),
    Case(Code.EXPLICIT_V, "e4b", "all", "0.32.0"),
    Case(Code.SHARED_WITHOUT_KV, "e4b", "all", "portable"),
    Case(Code.SHARED_WITHOUT_KV, "e4b-noshared", "all", "0.30.0"),
    Case(Code.SHARED_WITHOUT_KV, "dense31b", "all", "0.22.1"),
    Case(Code.QUANTIZED_PIXEL_PROJECTION, "dense31b", "all", "0.22.1"),
    Case(Code.QUANTIZED_PIXEL_PROJECTION, "dense31b", "all", "0.27.1"),
    Case(Code.QUANTIZED_PIXEL_PROJECTION, "dense31b", "all", "0.32.0"),
    Case(Code.QUANTIZED_PIXEL_PROJECTION, "dense31b", "skip", "portable"),
    Case(Code.QUANTIZED_PIXEL_PROJECTION, "unified12b", "all", "portable"),
    Case(Code.QUANTIZED_LM_HEAD, "text", "all", "portable"),
    Case(Code.QUANTIZED_LM_HEAD, "text", "all", "0.28.0", edit(lm_head), "ignored"),
    Case(Code.QUANTIZED_LM_HEAD, "dense31b", "all", "portable", edit(unquantized_lm_head), "unquantized"),
    Case(Code.QUANTIZED_BUT_SKIPPED, "dense31b", "all", "portable", skip("model.vision_tower"), "HF's spelling"),
    Case(
        Code.QUANTIZED_BUT_SKIPPED, "dense31b", "skip", "portable", skip("vision_tower", "embed_vision"), "unquantized"
    ),
    Case(Code.QUANTIZED_BUT_SKIPPED, "dense31b", "all", "0.22.1", skip("vision_tower"), "never quantized there"),
    Case(Code.WEIGHT_NOT_A_COLUMN, "dense31b", "all", "portable"),
    Case(Code.WEIGHT_NOT_A_COLUMN, "dense31b", "storage-bf16", "portable"),
    Case(Code.QUANT_STORAGE, "dense31b", "all", "portable"),
    Case(Code.QUANT_STORAGE, "dense31b", "all", "portable", quantization(bnb_4bit_quant_storage=None), "not said"),
    Case(
        Code.QUANT_STORAGE,
        "dense31b",
        "int8",
        "portable",
        quantization(bnb_4bit_quant_storage="bfloat16"),
        "nothing in 4 bit",
    ),
    Case(Code.QUANT_STATE, "dense31b", "storage-bf16", "portable"),
    Case(Code.QUANT_STATE, "dense31b", "int8", "portable"),
    Case(Code.QUANT_STATE, "moe26b", "fp4", "portable"),
    Case(Code.ORPHANED_STATE_TENSORS, "dense31b", "single", "portable"),
    Case(Code.ORPHANED_STATE_TENSORS, "dense31b", "int8", "portable"),
    Case(Code.ORPHANED_STATE_TENSORS, "dense31b", "all", "portable", edit(no_quant_map), "damaged weight's own"),
    Case(Code.INDEX, "dense31b", "all", "portable"),
    Case(Code.INDEX, "dense31b", "all", "portable", write_index, "right index"),
    Case(Code.INDEX, "dense31b", "all", "portable", no_total_size, "no total_size"),
    Case(Code.INDEX, "dense31b", "all", "portable", None, "", (("shards", 3),)),
    Case(Code.DUPLICATE, "dense31b", "all", "portable", None, "", (("shards", 3),)),
    Case(Code.PICKLES, "text", "all", "portable", programs),
    Case(Code.CODE, "text", "all", "portable", pickled),
    Case(Code.ADAPTER, "text", "all", "portable"),
    Case(Code.NOTHING_QUANTIZED, "text", "single", "portable"),
    Case(Code.SKIP_ENTRY, "dense31b", "all", "portable"),
    Case(Code.SKIP_ENTRY, "text", "mixed", "portable"),
    Case(Code.SKIP_ENTRY, "dense31b", "skip", "0.22.1"),
    Case(
        Code.SKIP_ENTRY,
        "dense31b",
        "skip",
        "portable",
        skip("model.vision_tower", "vision_tower", "model.embed_vision", "embed_vision"),
        "both spellings",
    ),
    Case(Code.SKIP_ENTRY, "dense31b", "skip", "portable", skip("router.proj", "merger"), "names nothing"),
    Case(Code.PER_LAYER_CONFIG, "dense31b", "all", "0.32.0", None, "", NEWER),
    Case(Code.PER_LAYER_CONFIG, "dense31b", "all", "portable"),
    Case(Code.PER_LAYER_CONFIG, "e4b", "all", "0.22.1", per_layer(head_dim=512), "512 is the default"),
    Case(Code.UNKNOWN_CLASS, "unified12b", "skip", "0.23.0"),
    Case(Code.UNKNOWN_CLASS, "unified12b", "skip", "portable"),
    Case(Code.UNKNOWN_CLASS, "text", "skip", "0.19.0"),
    Case(Code.PLUGIN, "dense31b", "all", "0.27.1"),
    Case(Code.PLUGIN, "dense31b", "all", installed("0.32.0", "0.0.3")),
    Case(Code.PLUGIN, "dense31b", "all", installed("0.27.1", None)),
    Case(Code.PLUGIN, "dense31b", "all", installed("0.22.1", "0.0.3")),
    Case(Code.TRANSFORMERS_REQUANTIZES, "dense31b", "skip", "portable"),
    Case(Code.TRANSFORMERS_REQUANTIZES, "dense31b", "all", "portable"),
    Case(Code.TRANSFORMERS_REQUANTIZES, "dense31b", "all", "portable", edit(unquantized_lm_head), "lm_head"),
    Case(Code.MOE_REFUSED, "moe26b", "skip", "0.25.0"),
    Case(Code.MOE_REFUSED, "dense31b", "skip", "0.22.1"),
    Case(Code.FUSED_EXPERTS, "moe26b", "skip", "0.24.0"),
    Case(Code.FUSED_EXPERTS, "moe26b", "all", "0.32.0", edit(per_expert("experts")), "per expert"),
    Case(Code.FUSED_EXPERTS, "dense31b", "skip", "0.32.0"),
    Case(Code.EXPERT_PREFIX, "moe26b", "all", "0.32.0", edit(per_expert("experts")), "new prefix"),
    Case(Code.EXPERT_PREFIX, "moe26b", "all", "0.30.0", edit(per_expert("moe.experts")), "old prefix"),
    Case(Code.EXPERT_PREFIX, "moe26b", "all", "0.24.0", edit(per_expert("experts")), "refused anyway"),
    Case(Code.FP4_EXPERTS, "moe26b", "all", "0.32.0", edit(per_expert("experts")), "NF4"),
    Case(Code.FP4_EXPERTS, "moe26b", "fp4", "0.32.0"),
    Case(Code.FP4_EXPERTS, "moe26b", "fp4", "0.24.0", edit(per_expert("experts")), "refused anyway"),
    Case(Code.MIXED_EXPERTS, "moe26b", "all", "0.32.0", edit(per_expert("experts")), "alike"),
    Case(Code.MIXED_EXPERTS, "moe26b", "all", "0.24.0", edit(uneven), "refused anyway"),
    Case(Code.INT8, "dense31b", "all", "portable"),
    Case(Code.ADAPTER, "dense31b", "all", "portable"),
    Case(Code.UNUSED_WEIGHTS, "text", "all", "portable"),
    Case(Code.UNUSED_WEIGHTS, "text", "all", "portable", None, "", (("shards", 3),)),
    Case(Code.PROCESSOR, "e4b", "all", "portable"),
    Case(Code.PROCESSOR, "text", "all", "portable"),
    Case(Code.TIED_LM_HEAD, "dense31b", "all", "0.29.0", edit(unquantized_lm_head), "used"),
    Case(Code.TIED_LM_HEAD, "dense31b", "all", "portable", untied(unquantized_lm_head), "untied"),
    Case(Code.TIED_LM_HEAD, "dense31b", "all", "portable"),
    Case(Code.TRANSFORMERS, "dense31b", "all", "0.23.0"),
    Case(Code.TRANSFORMERS, "dense31b", "all", "0.28.0"),
    Case(Code.TRANSFORMERS, "dense31b", "all", installed("0.27.1", None, "5.14.9")),
    Case(Code.QUANTIZATION_CONFIG, "dense31b", "all", "portable"),
    Case(Code.QUANTIZATION_CONFIG, "dense31b", "int8", "portable"),
    Case(Code.OTHER_CLASS, "dense31b", "all", "portable"),
    Case(Code.OTHER_CLASS, "text", "all", "portable"),
    Case(Code.FLOAT16, "dense31b", "all", "portable"),
    Case(Code.SOFT_TOKENS, "unified12b", "all", "portable"),
    Case(Code.SOFT_TOKENS, "dense31b", "all", "portable"),
    Case(Code.FLOAT16, "e4b", "all", "portable", float16, "no standardize"),
    Case(Code.FLOAT16, "text", "all", "portable", float16, "no tower"),
    Case(Code.EXPERT_LINEARS, "moe26b", "all", "portable"),
]


def test_every_code_has_a_rule_an_explanation_and_cases_both_ways() -> None:
    assert set(CHECKS) == set(Code) == set(EXPLANATIONS)
    # Asked of a vLLM: tests/engines/test_live.py. Of Llama 4 only: test_families.py.
    elsewhere = {Code.ENGINE_REFUSES, Code.REQUANTIZED_AT_LOAD, Code.REORDERED_AT_LOAD, Code.REORDERED}
    assert {case.code for case in FOUND} == set(Code) - elsewhere
    assert {case.code for case in ABSENT} == set(Code) - elsewhere


@pytest.mark.parametrize("code", dict.fromkeys(case.code for case in FOUND), ids=str)
def test_explain_names_the_worst_severity_that_is_found(code: Code) -> None:
    assert code.explanation.severity == max(case.severity for case in FOUND if case.code is code)


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_found(case: Found, pristine: Make, checkpoint: Make) -> None:
    source = case.make(pristine, checkpoint)
    findings = [f for f in scan(source, case.target).findings if f.code is case.code]
    names = {Code.SKIP_ENTRY: opened(source).skip_modules, Code.SHARED_WITHOUT_KV: MISSING}
    names |= dict.fromkeys((Code.PICKLES, Code.CODE, Code.UNUSED_WEIGHTS), tuple(opened(source).source.files))
    names |= {Code.UNFILLED: (NORM,), Code.PARTLY_FILLED: (L + "1.mlp.up_proj.weight",)}
    known = names.get(case.code) or opened(source).tensors
    named = {name for name in known if re.fullmatch(case.tensors, name)}
    assert bool(named) == bool(case.tensors), "the pattern means something"
    said = [(f.severity, set(f.tensors), tuple(r.name for r in f.releases)) for f in findings]
    assert (case.severity, named, case.releases) in said
    assert len(said) == 1 + case.others
    assert all(f.message and (f.fix is None) == (f.reason is not None) for f in findings)


@pytest.mark.parametrize("case", ABSENT, ids=str)
def test_absent(case: Case, pristine: Make, checkpoint: Make) -> None:
    source = case.make(pristine, checkpoint)
    assert [f for f in scan(source, case.target).findings if f.code is case.code] == []


def codes(source: Path, target: str | Target = "portable") -> set[Code]:
    return {f.code for f in scan(source, target).findings if f.counts}


def message(source: Path, code: Code, target: str = "portable") -> str:
    (found,) = [f for f in scan(source, target).findings if f.code is code]
    return found.message


@pytest.mark.parametrize("change", [no_quant_map, inconsistent_shape])
def test_of_a_damaged_weight_nothing_else_is_said(change: Callable[[Tensors], None], checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    edit(change)(source)
    before = {f.code for f in scan(source, "0.32.0").findings}
    assert before == {Code.QUANT_STATE, Code.PLUGIN}, "neither its group nor its statistics"
    assert codes(source, "0.22.1") == {Code.QUANT_STATE, Code.QUANTIZED_IN_UNQUANTIZED, Code.K_EQ_V_WITHOUT_V}, (
        "of others it is"
    )
    (found,) = [f for f in scan(source, "0.32.0").findings if f.code is Code.QUANT_STATE]
    assert found.fix is None and found.reason == "the quant state is lost; quantize the model again"


@pytest.mark.parametrize("family", ["dense31b", "moe26b", "text"])
def test_of_a_model_that_the_release_does_not_know_only_that_is_said(family: str, checkpoint: Make) -> None:
    source = checkpoint(family, "partial")
    assert codes(source, "0.22.1") and Code.UNKNOWN_CLASS not in codes(source, "0.22.1")
    with json_of(source) as config:
        text = config.get("text_config", config)
        config |= {"architectures": ["Gemma4UnifiedForConditionalGeneration"], "text_config": dict(text)}
    assert [f.code for f in scan(source, "0.22.1").findings] == [Code.UNKNOWN_CLASS]
    assert Code.UNKNOWN_CLASS not in codes(source, "0.23.0")


@pytest.mark.parametrize("family", ["dense31b", "e4b-noshared", "moe26b", "unified12b"])
@pytest.mark.parametrize("quant", ["all", "partial"])
def test_neither_the_prefix_nor_the_number_of_shards_changes_a_finding(family: str, quant: str, pristine: Make) -> None:
    def said(**options: object) -> list[tuple[object, ...]]:
        found = scan(pristine(family, quant, **options)).findings
        return [(f.code, f.severity, f.releases, f.message, sorted(map(canonical, f.tensors))) for f in found]

    assert len(said()) >= 2
    assert said(shards=3) == said()
    assert said(prefix="language_model.model.") == said()


@pytest.mark.parametrize(("family", "quant"), [("dense31b", "partial"), ("e4b-noshared", "all"), ("moe26b", "fp4")])
def test_the_verdict_of_a_range_is_that_of_a_scan_for_it(family: str, quant: str, pristine: Make) -> None:
    source = pristine(family, quant)
    whole = scan(source)
    assert [r.release for r in whole.releases] == list(ranges())
    assert whole.verdict == max(r.verdict for r in whole.releases)
    for row in whole.releases:
        only = scan(source, row.release.first)
        counting = [f for f in only.findings if f.counts]
        assert row.verdict == only.verdict
        assert row.codes == tuple(sorted({f.code for f in counting}, key=lambda code: code.value))
        assert row.tensors == len({name for f in counting for name in f.tensors})


@pytest.mark.parametrize(
    ("code", "family", "quant", "change", "target", "words"),
    [
        (
            Code.QUANTIZED_BUT_SKIPPED,
            "dense31b",
            "all",
            skip("vision_tower", "embed_vision"),
            "0.32.0",
            "quantized, but skipped by embed_vision, vision_tower",
        ),
        (
            Code.QUANT_STORAGE,
            "dense31b",
            "all",
            edit(bf16_bytes),
            "0.32.0",
            "quantized bytes stored as BF16; vLLM takes only uint8",
        ),
        (
            Code.QUANT_STORAGE,
            "dense31b",
            "all",
            quantization(bnb_4bit_quant_storage="float16"),
            "0.32.0",
            "quantized bytes stored as float16, says config.json; vLLM takes only uint8",
        ),
        (
            Code.EXPERT_PREFIX,
            "moe26b",
            "all",
            edit(per_expert("experts")),
            "0.27.1",
            "the release looks for moe.experts.N",
        ),
        (Code.DUPLICATE, "dense31b", "all", twice, "0.32.0", "is in model.safetensors and other.safetensors"),
        (
            Code.UNQUANTIZED_IN_QUANTIZED,
            "moe26b",
            "all",
            edit(per_expert("experts", quantized=False)),
            "0.27.1",
            "full precision in the file, a quantized parameter in vLLM",
        ),
    ],
)
def test_a_message_says_what_is_meant(
    code: Code, family: str, quant: str, change: Change, target: str, words: str, checkpoint: Make
) -> None:
    source = checkpoint(family, quant)
    change(source)
    assert message(source, code, target) == words


def test_a_wrong_total_size_of_an_index_is_reported(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    wrong_size(source)
    size = sum(len(t.data) for t in read_tensors(source / SHARD).values())
    assert message(source, Code.INDEX).endswith(f"says total_size 7, the shards hold {size}")


def extra_key(layers: dict[str, Any]) -> None:
    for layer in layers.values():
        layer["sliding_window"] = 64


def one_differs(layers: dict[str, Any]) -> None:
    layers["5"] = layers["5"] | {"head_dim": 32}


def one_is_missing(layers: dict[str, Any]) -> None:
    del layers["5"]


def no_number(layers: dict[str, Any]) -> None:
    for layer in layers.values():
        layer["head_dim"] = "64"


@pytest.mark.parametrize("change", [extra_key, one_differs, one_is_missing, no_number])
def test_what_the_older_keys_cannot_say_has_no_fix(change: Callable[[dict[str, Any]], None], checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all", per_layer_config=True)
    with json_of(source) as config:
        change(config["text_config"]["per_layer_config"])
    found = [f for f in scan(source, "0.27.1").findings if f.code is Code.PER_LAYER_CONFIG and f.fix is None]
    assert [f.reason for f in found] == ["it says more than the older keys can"]
    assert Code.PER_LAYER_CONFIG not in codes(source, "0.32.0")


def test_the_older_keys_say_what_the_newer_form_means() -> None:
    text = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "head_dim": 256}

    def older(layers: object) -> dict[str, int] | None:
        return legacy_head_config(
            read_model({"architectures": ["Gemma4ForCausalLM"], "per_layer_config": layers} | text)
        )

    both = {"head_dim": 512, "num_key_value_heads": 4}
    assert older({"1": both, "3": both}) == {"global_head_dim": 512, "num_global_key_value_heads": 4}
    assert older({"1": {"head_dim": 512}, "3": {"head_dim": 512}}) == {"global_head_dim": 512}
    assert older({"1": {"num_key_value_heads": 4}, "3": {"num_key_value_heads": 4}}) == {
        "global_head_dim": 256,
        "num_global_key_value_heads": 4,
    }
    assert older({}) == older({"1": {}, "3": {}}) == {"global_head_dim": 256}, "no layer differs from the others"
    assert [older(x) for x in (None, [], "x", {"1": both}, {"0": both, "1": both, "3": both})] == [None] * 5
    assert older({"1": both, "3": [both]}) is older({"1": None, "3": None}) is None


def test_tensors_of_a_layer_that_the_config_does_not_have_are_not_taken_for_a_shared_one(checkpoint: Make) -> None:
    source = checkpoint("e4b", "all")
    with tensors_of(source) as tensors:
        copy_weight(tensors, f"{L}1.self_attn.q_proj.weight", f"{L}6.self_attn.q_proj.weight")
    assert Code.SHARED_WITHOUT_KV not in codes(source)


def test_experts_are_never_counted_as_skipped(checkpoint: Make) -> None:
    source = checkpoint("moe26b", "skip")
    edit(per_expert("experts"))(source)
    set_skip(source, "experts", "moe", "language_model.model.layers.3.experts", "router.proj")
    found = codes(source, "0.32.0")
    assert Code.QUANTIZED_BUT_SKIPPED not in found and Code.QUANTIZED_IN_UNQUANTIZED not in found


@pytest.mark.parametrize(
    ("vllm", "plugin", "words"),
    [
        ("0.28.0", "0.0.3", "vllm-bnb-plugin 0.0.3 is installed, which does not work with vLLM 0.28.0"),
        ("0.28.0", "0.0.4", "vllm-bnb-plugin 0.0.4 is installed, which does not work with vLLM 0.28.0"),
        ("0.28.0", "0.0.2", None),
        ("0.29.0", "0.0.3", None),
        ("0.32.0", "0.0.3", None),
    ],
)
def test_a_plugin_that_is_too_new_for_its_vllm_fails(pristine: Make, vllm: str, plugin: str, words: str | None) -> None:
    result = scan_checkpoint(open_checkpoint(LocalSource.open(pristine("e4b", "all"))), installed(vllm, plugin))
    found = [(f.severity, f.message, f.reason) for f in result.findings if f.code is Code.PLUGIN]
    reason = "not in the checkpoint: pip install 'vllm-bnb-plugin<0.0.3'"
    assert found == ([(FAILS, words, reason)] if words else [])
