"""Every rule on a checkpoint where it must speak, with its tensors, severity and releases, and on one where it must not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from build import (
    SHARD,
    Tensors,
    copy_weight,
    drop_weight,
    json_of,
    opened,
    plain,
    read_tensors,
    retype,
    scan,
    set_skip,
    siblings,
    tensors_of,
    unpack,
    write_index,
    write_tensors,
)
from conftest import Make

from bnbfix.codes import EXPLANATIONS, Code, Severity
from bnbfix.gemma4 import FULL
from bnbfix.rules import RULES
from bnbfix.scanner import Finding
from bnbfix.vllm_releases import Installed, Target, ranges, resolve_target

NOTE, DEGRADED, WRONG, FAILS = Severity
L = "model.language_model.layers."
TOWER = r"model\.(vision_tower\..*linear\.weight|vision_tower\.patch_embedder\.input_proj\.weight|embed_vision\..*)"
AUDIO = r"model\.(embed_audio\..*|audio_tower\..*(linear|_proj)\.weight)"
NAMES = [r.name for r in ranges()]
ALL = tuple(NAMES)
TO_022, TO_024, TO_027, TO_029 = (tuple(NAMES[:n]) for n in (1, 2, 4, 5))
FROM_023, FROM_025, FROM_028, FROM_031, FROM_032 = (tuple(NAMES[n:]) for n in (1, 2, 4, 6, 7))

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A checkpoint, perhaps changed, and a target; `found` says what a rule must say of it: nothing if None."""

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

    def findings(self, make: Make) -> list[Finding]:
        source = make(self.family, self.quant, **dict(self.options))
        if self.change is not None:
            self.change(source)
        return [f for f in scan(source, self.target).findings if f.code is self.code]


@dataclass(frozen=True)
class Found(Case):
    severity: Severity = FAILS
    tensors: str = ""  # a pattern: all tensors of the checkpoint that match it are named, and no others
    releases: tuple[str, ...] = ()


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


def plain_qk(tensors: Tensors) -> None:
    for layer in (2, 5):
        for part in "qk":
            unpack(tensors, f"{L}{layer}.self_attn.{part}_proj.weight")


def lm_head(tensors: Tensors) -> None:
    copy_weight(tensors, f"{L}1.mlp.up_proj.weight", "lm_head.weight")


def plain_lm_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = plain(512, 128)


def no_quant_map(tensors: Tensors) -> None:
    del tensors[f"{L}1.self_attn.k_proj.weight.quant_map"]


def lying_shape(tensors: Tensors) -> None:
    weight = f"{L}1.self_attn.k_proj.weight"
    name = next(weight + suffix for suffix in siblings(tensors, weight) if ".quant_state." in suffix)
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
    old = siblings(tensors, f"{L}0.mlp.up_proj.weight")
    for part in ("up", "gate"):
        unpack(tensors, f"{L}0.mlp.{part}_proj.weight")
    tensors |= {f"{L}0.mlp.up_proj.weight{suffix}": t for suffix, t in old.items()}


def one_by_one(prefix: str, *, packed: bool = True) -> Callable[[Tensors], None]:
    """Experts of layer 3 stored one by one in place of the two tensors of every layer."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]
        for expert in range(2):
            for part in ("gate", "up", "down"):
                name = f"{L}3.{prefix}.{expert}.{part}_proj.weight"
                if packed:
                    copy_weight(tensors, f"{L}3.mlp.{part}_proj.weight", name)
                else:
                    tensors[name] = plain(64, 128)

    return change


def packed_experts(tensors: Tensors) -> None:
    name = f"{L}3.experts.down_proj"
    del tensors[name]
    copy_weight(tensors, f"{L}3.mlp.down_proj.weight", name)


def index(folder: Path) -> None:
    write_index(folder)


def wrong_size(folder: Path) -> None:
    write_index(folder, metadata={"total_size": 7})


def stale_tensor(folder: Path) -> None:
    write_index(folder)
    with tensors_of(folder) as tensors:
        tensors[L + "0.stale"] = plain(8)
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
    write_tensors(folder / "other.safetensors", {name: tensors[name], "model.language_model.x": plain(4)})


def per_layer(**layer: object) -> Change:
    """per_layer_config with the same values for every full-attention layer."""

    def run(folder: Path) -> None:
        with json_of(folder) as config:
            text = config["text_config"]
            full = [str(i) for i, kind in enumerate(text["layer_types"]) if kind == FULL]
            text["per_layer_config"] = dict.fromkeys(full, layer)
            text["head_dim"] = 512

    return run


def no_default_rope(folder: Path) -> None:
    """Only per_layer_config in the newer form: the vision tower's rope keeps its older name."""
    with json_of(folder) as config:
        config["vision_config"]["rope_parameters"]["rope_type"] = "default"


def installed(version: str, plugin: str | None) -> Target:
    return resolve_target(None, Installed(version, plugin))


NEWER = (("per_layer_config", True),)
FOUND = [
    Found(Code.PACKED_IN_PLAIN, "dense31b", "all", "0.22.1", tensors=TOWER, releases=TO_022),
    Found(Code.PACKED_IN_PLAIN, "dense31b", "all", "portable", tensors=TOWER, releases=TO_022),
    Found(Code.PACKED_IN_PLAIN, "e4b", "all", "0.19.1", tensors=f"{TOWER}|{AUDIO}", releases=TO_022),
    Found(Code.PACKED_IN_PLAIN, "unified12b", "all", "0.32.0", tensors=r".*\.embedding_projection\.weight",
          releases=FROM_023),
    Found(Code.PACKED_IN_PLAIN, "moe26b", "all", "0.27.1", tensors=r".*\.router\.proj\.weight", releases=FROM_023),
    Found(Code.PLAIN_IN_PACKED, "dense31b", "skip", "0.27.1", tensors=TOWER, releases=FROM_023[:3]),
    Found(Code.PLAIN_IN_PACKED, "dense31b", "skip", "0.32.0", severity=WRONG, tensors=TOWER, releases=FROM_028),
    Found(Code.PLAIN_IN_PACKED, "dense31b", "int8", "0.32.0", tensors=TOWER, releases=FROM_023),
    Found(Code.PLAIN_IN_PACKED, "e4b", "skip", "0.28.0", severity=WRONG, tensors=f"{TOWER}|{AUDIO}",
          releases=FROM_028),
    Found(Code.PLAIN_IN_PACKED, "unified12b", "skip", "0.33.0", severity=WRONG, tensors=r".*\.patch_dense\.weight",
          releases=FROM_028),
    Found(Code.PLAIN_IN_PACKED, "dense31b", "mixed", "0.22.1", releases=TO_022,
          tensors=r".*\.layers\.(1\.self_attn\.[qkvo]_proj|3\.mlp\.\w+_proj)\.weight"),
    Found(Code.RAGGED_GROUP, "dense31b", "ragged", "0.27.1", releases=TO_027,
          tensors=r".*language.*\.layers\.(1\.self_attn\.[qkv]_proj|3\.mlp\.(gate|up)_proj)\.weight"),
    Found(Code.RAGGED_GROUP, "dense31b", "ragged", "0.32.0", severity=WRONG, releases=FROM_028,
          tensors=r".*language.*\.layers\.(1\.self_attn\.[qkv]_proj|3\.mlp\.(gate|up)_proj)\.weight"),
    Found(Code.RAGGED_GROUP, "text", "ragged", "0.22.1", releases=TO_027,
          tensors=r"model\.layers\.(1\.self_attn\.[qkv]_proj|3\.mlp\.(gate|up)_proj)\.weight"),
    Found(Code.K_EQ_V_WITHOUT_V, "dense31b", "all", "0.22.1", releases=TO_022,
          tensors=r".*\.layers\.[25]\.self_attn\.k_proj\.weight"),
    Found(Code.K_EQ_V_WITHOUT_V, "text", "single", "portable", releases=TO_022,
          tensors=r".*\.layers\.[25]\.self_attn\.k_proj\.weight"),
    Found(Code.EXPLICIT_V, "dense31b", "all", "0.32.0", edit(explicit_v), "explicit v", releases=FROM_031,
          tensors=r".*\.layers\.[25]\.self_attn\.v_proj\.weight"),
    Found(Code.SHARED_WITHOUT_KV, "e4b-noshared", "all", "0.22.1", releases=TO_029,
          tensors="|".join(f"{L}{n}.self_attn.{p}.weight" for n in (4, 5) for p in ("k_norm", "k_proj", "v_proj"))),
    Found(Code.PACKED_PIXELS, "dense31b", "all", "0.28.0", severity=DEGRADED, releases=FROM_028[:3],
          tensors=r".*\.patch_embedder\.input_proj\.weight"),
    Found(Code.PACKED_PIXELS, "e4b", "all", "portable", severity=DEGRADED, releases=FROM_028[:3],
          tensors=r".*\.patch_embedder\.input_proj\.weight"),
    Found(Code.PACKED_LM_HEAD, "text", "all", "0.32.0", lambda folder: rename_head(folder), "lm_head",
          tensors=r"lm_head\.weight", releases=ALL),
    Found(Code.PACKED_LM_HEAD, "dense31b", "all", "0.22.1", edit(lm_head), "lm_head", tensors=r"lm_head\.weight",
          releases=ALL),
    Found(Code.PACKED_BUT_SKIPPED, "dense31b", "all", "0.27.1", skip("vision_tower", "embed_vision"), "skipped",
          tensors=TOWER, releases=FROM_023),
    Found(Code.PACKED_BUT_SKIPPED, "text", "all", "0.22.1", skip("model.layers.3.mlp"), "skipped", releases=ALL,
          tensors=r"model\.layers\.3\.mlp\.\w+_proj\.weight"),
    Found(Code.PACKED_SHAPE, "dense31b", "all", "0.32.0", edit(flat), "flat", releases=ALL,
          tensors=r".*language.*\.(0\.mlp\.up_proj|3\.self_attn\.o_proj)\.weight"),
    Found(Code.PACKED_STORAGE, "dense31b", "storage-bf16", "0.32.0", releases=ALL,
          tensors=rf"{L}\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight"),
    Found(Code.PACKED_STORAGE, "text", "all", "0.27.1", quantization(bnb_4bit_quant_storage="bfloat16"), "said",
          releases=ALL),
    Found(Code.PACKED_STORAGE, "dense31b", "all", "0.27.1", edit(bf16_bytes), "bytes", releases=ALL,
          tensors=rf"{L}0\.mlp\.up_proj\.weight"),
    Found(Code.QUANT_STATE, "dense31b", "all", "0.32.0", edit(no_quant_map), "no quant_map", releases=ALL,
          tensors=rf"{L}1\.self_attn\.k_proj\.weight"),
    Found(Code.QUANT_STATE, "dense31b", "single", "0.22.1", edit(lying_shape), "other shape", releases=ALL,
          tensors=rf"{L}1\.self_attn\.k_proj\.weight"),
    Found(Code.ORPHANS, "dense31b", "all", "0.32.0", edit(stray_statistics), "strays", severity=NOTE, releases=ALL,
          tensors=rf"{L}9\..*"),
    Found(Code.ORPHANS, "dense31b", "single", "0.32.0", edit(bound_state), "beside plain", releases=ALL,
          tensors=rf"{L}0\.mlp\.up_proj\.weight\.quant_state\..*"),
    Found(Code.INDEX, "dense31b", "all", "0.32.0", wrong_size, "size", severity=NOTE, releases=ALL),
    Found(Code.INDEX, "dense31b", "all", "0.32.0", stale_tensor, "stale", severity=NOTE, releases=ALL,
          tensors=r".*stale"),
    Found(Code.INDEX, "dense31b", "all", "0.32.0", moved, "moved", severity=NOTE, releases=ALL,
          tensors=rf"model\.language_model\.norm\.weight|{L}0\.layer_scalar"),
    Found(Code.DUPLICATE, "dense31b", "all", "0.32.0", twice, "twice", severity=WRONG, releases=ALL,
          tensors=rf"{L}0\.mlp\.up_proj\.weight"),
    Found(Code.SKIP_ENTRY, "dense31b", "skip", "0.32.0", severity=NOTE, releases=FROM_023,
          tensors="model.vision_tower|model.embed_vision"),
    Found(Code.SKIP_ENTRY, "dense31b", "mixed", "0.22.1", severity=NOTE, releases=TO_022,
          tensors=rf"{L}1\.self_attn|{L}3\.mlp"),
    Found(Code.PER_LAYER_CONFIG, "dense31b", "all", "0.27.1", no_default_rope, "", NEWER, releases=NAMES_BEFORE_032)
    if (NAMES_BEFORE_032 := ALL[:7]) else None,
    Found(Code.PER_LAYER_CONFIG, "e4b", "all", "0.24.0", per_layer(head_dim=512), "512", releases=ALL[1:7]),
    Found(Code.UNKNOWN_CLASS, "unified12b", "skip", "0.22.1", releases=TO_022),
    Found(Code.PLUGIN, "dense31b", "all", "portable", severity=NOTE, releases=FROM_028),
    Found(Code.PLUGIN, "dense31b", "all", installed("0.32.0", None), releases=FROM_032),
    Found(Code.PLUGIN, "dense31b", "all", installed("0.27.1", "0.0.3"), releases=("0.27.0-0.27.1",)),
    Found(Code.TRANSFORMERS_REPACKS, "dense31b", "skip", "0.32.0", skip("vision_tower", "embed_vision"), "not HF's",
          severity=NOTE, tensors=TOWER, releases=ALL),
    Found(Code.MOE_REFUSED, "moe26b", "skip", "0.22.1", releases=TO_024),
    Found(Code.MOE_REFUSED, "moe26b", "int8", "0.24.0", releases=TO_024),
    Found(Code.FUSED_EXPERTS, "moe26b", "skip", "0.27.1", releases=FROM_025,
          tensors=r".*\.experts\.(gate_up|down)_proj"),
    Found(Code.FUSED_EXPERTS, "moe26b", "all", "0.32.0", edit(packed_experts), "packed", releases=FROM_025,
          tensors=r".*\.experts\.(gate_up|down)_proj"),
    Found(Code.EXPERT_PREFIX, "moe26b", "all", "0.27.1", edit(one_by_one("experts")), "new prefix",
          tensors=r".*\.experts\.\d\..*_proj\.weight", releases=FROM_025[:4]),
    Found(Code.EXPERT_PREFIX, "moe26b", "all", "0.31.0", edit(one_by_one("moe.experts")), "old prefix",
          tensors=r".*\.experts\.\d\..*_proj\.weight", releases=FROM_031),
    Found(Code.FP4_EXPERTS, "moe26b", "fp4", "0.32.0", edit(one_by_one("experts")), "one by one", severity=WRONG,
          tensors=r".*\.experts\.\d\..*_proj\.weight", releases=FROM_025),
    Found(Code.INT8, "dense31b", "int8", "0.22.1", severity=NOTE, releases=ALL,
          tensors=rf"{L}\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight"),
    Found(Code.INT8, "moe26b", "int8", "0.32.0", releases=ALL,
          tensors=rf"{L}\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight"),
]  # fmt: skip
