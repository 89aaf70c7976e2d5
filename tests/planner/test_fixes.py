"""What a repair decides, for every family, quantization and target: which weights change, and which config keys."""

from __future__ import annotations

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbfix.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.manifest import find_slot, parameters
from bnbfix.engines.targets import resolve_target
from bnbfix.engines.transformers import transformers_linears, transformers_skips
from bnbfix.engines.vllm.recorded import expect
from bnbfix.engines.vllm.releases import ranges
from bnbfix.errors import QuantStateError, Unrepairable
from bnbfix.models.detect import read_model
from bnbfix.models.inspection import inspect_checkpoint
from bnbfix.planner.layout import Copy, Dequantize, Quantize, TensorPlan
from bnbfix.planner.plan import Options, Plan
from bnbfix.planner.plan_repair import plan_checkpoint
from bnbfix.planner.planned_source import PlannedSource
from bnbfix.rules.rule import Code
from tests.support.build import (
    SHARD,
    Make,
    Tensors,
    copy_weight,
    dequantize_weight,
    drop_weight,
    json_of,
    opened,
    planned,
    read_tensors,
    scan,
    set_skip,
    state_tensors,
    tensors_of,
    write_index,
    write_tensors,
    zeros,
)

FAMILIES = ("dense31b", "e4b", "e4b-noshared", "e2b", "moe26b", "unified12b", "text")
QUANTS = ("all", "skip", "mixed", "partial", "fp4", "single", "storage-bf16")
TARGETS = ("0.22.1", "0.27.1", "0.32.0", "portable")
REFUSED = {("unified12b", "0.22.1"), ("moe26b", "0.22.1"), ("moe26b", "portable")}
# Every family and every quantization; all of both for the two families that need the most.
ALSO = {
    "e4b": ("all", "skip", "partial"),
    "e2b": ("partial",),
    "moe26b": ("all", "skip", "mixed", "fp4"),
    "unified12b": ("all", "skip", "partial"),
    "text": ("all", "partial", "single"),
}
PAIRS = [(f, q) for f in FAMILIES for q in ALSO.get(f, QUANTS)]
CELLS = [(f, q, t) for f, q in PAIRS for t in TARGETS if (f, t) not in REFUSED]
every_cell = pytest.mark.parametrize(("family", "quant", "target"), CELLS)
L = "model.language_model.layers."


def made(plan: Plan) -> dict[str, TensorPlan]:
    """Every tensor of the output by name."""
    out = [t for shard in plan.shards for t in shard.tensors]
    assert len({t.info.name for t in out}) == len(out), "no tensor is in two shards"
    return {t.info.name: t for t in out}


def of(plan: Plan, action: str) -> dict[str, Code | None]:
    """What an action is done to, and the code that asked for it."""
    return {e.name: e.code for e in plan.edits if e.action == action}


_opened: dict[int, tuple[Plan, Checkpoint]] = {}


def after(plan: Plan) -> Checkpoint:
    """The output as a checkpoint."""
    if plan.nothing_to_do:
        return plan.checkpoint
    if id(plan) not in _opened:  # the plan is kept with it, so that its id stays its own
        _opened[id(plan)] = plan, open_checkpoint(PlannedSource(plan))
    return _opened[id(plan)][1]


def skip_list(plan: Plan) -> list[str]:
    return list(after(plan).skip_modules)


@every_cell
def test_there_is_a_plan_and_it_is_empty_only_where_nothing_counts(
    family: str, quant: str, target: str, pristine: Make
) -> None:
    plan = planned(pristine(family, quant), target)
    assert plan.nothing_to_do == (not plan.edits) == plan.scan.ok
    assert not {f.code for f in plan.remaining} - {Code.PLUGIN}


@pytest.mark.parametrize(("family", "quant"), PAIRS)
def test_a_repair_of_a_repaired_checkpoint_has_nothing_to_do(family: str, quant: str, pristine: Make) -> None:
    target = "0.32.0" if family == "moe26b" else "portable"
    plan = planned(pristine(family, quant), target)
    assert plan.edits
    again = plan_checkpoint(PlannedSource(plan), resolve_target(target))
    assert again.nothing_to_do and again.scan.ok
    assert not {f.code for f in again.scan.findings} - {Code.PLUGIN, Code.TRANSFORMERS}, "not even notes are left"


@pytest.mark.parametrize(("family", "target"), sorted(REFUSED))
@pytest.mark.parametrize("quant", ["all", "skip", "mixed", "partial", "storage-bf16"])
def test_what_no_edit_makes_load_is_refused(family: str, target: str, quant: str, pristine: Make) -> None:
    with pytest.raises(Unrepairable) as caught:
        planned(pristine(family, quant), target)
    code = "BNB303" if family == "unified12b" else "BNB401"
    assert str(caught.value).startswith(
        f"cannot be repaired for {resolve_target(target).label}: "
    ) and f"({code})" in str(caught.value)
    assert caught.value.hint


@every_cell
def test_every_tensor_stays_or_changes_as_its_edit_says(family: str, quant: str, target: str, pristine: Make) -> None:
    plan = planned(pristine(family, quant), target)
    if plan.nothing_to_do:
        assert (plan.edits, plan.shards, plan.texts, plan.copied) == ((), (), {}, ())
        return
    source, out = plan.checkpoint, made(plan)
    dequantized, retyped, quantized = of(plan, "dequantize"), of(plan, "retype"), of(plan, "quantize")
    gone = {*of(plan, "drop"), *quantized}
    for name in dequantized:
        gone |= set(source.weights[name].state_tensor_names().values())
    for name, t in source.tensors.items():
        if name in gone:
            assert name not in out
            continue
        op, info = out[name].op, out[name].info
        if name in dequantized:
            weight = source.weights[name]
            assert op == Dequantize((weight,), "BF16"), "in the dtype that the quant state names"
            assert (info.dtype, info.shape) == ("BF16", weight.shape)
        elif name in retyped:
            assert op == Copy(t) and (info.dtype, info.shape) == ("U8", (t.info.nbytes, 1))
        else:
            assert op == Copy(t) and (info.dtype, info.shape) == (t.info.dtype, t.info.shape)
    assert {e.action for e in plan.edits} <= {"dequantize", "insert", "retype", "quantize", "config"}


@every_cell
def test_nothing_is_quantized_but_experts(family: str, quant: str, target: str, pristine: Make) -> None:
    plan = planned(pristine(family, quant), target)
    quantized = {t.op.name for t in made(plan).values() if isinstance(t.op, Quantize)}
    prefix = {"0.27.1": "moe.experts", "0.32.0": "experts"}
    expected = (
        {
            f"{L}{layer}.{prefix[target]}.{expert}.{part}_proj.weight"
            for layer in range(6)
            for expert in range(4)
            for part in ("gate", "up", "down")
        }
        if family == "moe26b"
        else set()
    )
    assert quantized == expected
    assert set(of(plan, "quantize")) == {n for n in plan.checkpoint.weights if ".experts." in n}


def assert_both_readers_agree(plan: Plan) -> None:
    """What is quantized in the output is quantized to vLLM and to transformers, and nothing else is."""
    checkpoint = after(plan)
    new, model = checkpoint.skip_modules, read_model(checkpoint.config)
    linears = inspect_checkpoint(checkpoint).linears
    for release in plan.target.ranges:
        if (expectation := expect(model, release)) is not None:
            for p in parameters(linears, expectation, new):
                assert {m.quantized for m in p.members} == {p.quantized}, (release.name, p.module)
    for m, module in transformers_linears(linears, model):
        entries = [e for e in new if transformers_skips(e, module)]
        assert bool(entries) != m.quantized or (m.role.kind == "lm_head" and not new), (m.weight.name, entries)
    assert len(set(new)) == len(new)


@every_cell
def test_the_skip_list_names_what_is_unquantized_to_both_readers(
    family: str, quant: str, target: str, pristine: Make
) -> None:
    plan = planned(pristine(family, quant), target)
    assert_both_readers_agree(plan)
    old, new = list(plan.checkpoint.skip_modules), skip_list(plan)
    assert new[: len(old)] == old, "entries that are there stay, in their order"
    assert plan.nothing_to_do or (new == old) == ("quantization_config.llm_int8_skip_modules" not in of(plan, "config"))


def changes(old: Any, new: Any, path: str = "") -> set[str]:
    """Paths of the values that differ; a key that is gone or new is one."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return set() if old == new and type(old) is type(new) else {path}
    out = {f"{path}.{key}".strip(".") for key in set(old) ^ set(new)}
    for key in set(old) & set(new):
        out |= changes(old[key], new[key], f"{path}.{key}".strip("."))
    assert [k for k in old if k in new] == [k for k in new if k in old], f"order of the keys of {path or 'config'}"
    return out


NEWER = [(f, q, t, True) for f, q, t in CELLS if q == "all"]


@pytest.mark.parametrize(("family", "quant", "target", "newer"), [(*cell, False) for cell in CELLS] + NEWER)
def test_the_config_changes_only_by_the_planned_keys(
    family: str, quant: str, target: str, newer: bool, pristine: Make
) -> None:
    plan = planned(pristine(family, quant, **({"per_layer_config": True} if newer else {})), target)
    edits = set(of(plan, "config"))
    assert changes(plan.checkpoint.config, after(plan).config) == edits
    at = "" if family == "text" else "text_config."
    keys = {at + "global_head_dim", at + "per_layer_config"}
    if plan.checkpoint.config.get("text_config", plan.checkpoint.config)["attention_k_eq_v"]:
        keys.add(at + "num_global_key_value_heads")
    if family not in ("text", "unified12b"):
        keys.add("vision_config.rope_parameters.rope_type")
    storage = {"quantization_config.bnb_4bit_quant_storage"} if quant == "storage-bf16" else set()
    older = keys if newer and target != "0.32.0" else set()
    assert edits - {"quantization_config.llm_int8_skip_modules"} == older | storage


@pytest.mark.parametrize(
    ("family", "target"),
    [(f, "0.27.1") for f in FAMILIES] + [(f, "portable") for f in FAMILIES if (f, "portable") not in REFUSED],
)
def test_the_older_form_of_a_config_is_what_older_releases_wrote(family: str, target: str, pristine: Make) -> None:
    new = planned(pristine(family, "skip", per_layer_config=True), target)
    old = planned(pristine(family, "skip"), target)
    was, now = deepcopy(after(old).config), deepcopy(after(new).config)
    assert now.pop("transformers_version") != was.pop("transformers_version")
    for doc in (was, now):
        text = doc.get("text_config", doc)
        assert text.get("num_global_key_value_heads", "") in ("", None, 1)
        if text.get("num_global_key_value_heads") is None:
            text.pop("num_global_key_value_heads", None)
    assert now == was


def test_the_newer_form_stays_where_it_is_read(pristine: Make) -> None:
    plan = planned(pristine("text", "all", per_layer_config=True), "0.32.0")
    assert plan.nothing_to_do and "per_layer_config" in plan.checkpoint.config


TOWER = r"model\.(vision_tower\..*(linear|input_proj)\.weight|embed_vision\.\w+\.weight)"
AUDIO = r"model\.(embed_audio\.\w+\.weight|audio_tower\..*(linear|_proj)\.weight)"
K_EQ_V_QK = r"model\.(language_model\.)?layers\.[25]\.self_attn\.[qk]_proj\.weight"
PARTIAL_GROUPS = rf"{L}(1\.self_attn\.[kv]_proj|3\.mlp\.up_proj)\.weight"


@pytest.mark.parametrize(
    ("family", "quant", "target", "expected"),
    [
        ("dense31b", "all", "0.22.1", {TOWER: Code.QUANTIZED_IN_UNQUANTIZED}),
        ("dense31b", "all", "portable", {TOWER: Code.QUANTIZED_IN_UNQUANTIZED, K_EQ_V_QK: Code.K_EQ_V_WITHOUT_V}),
        ("dense31b", "all", "0.28.0", {r".*\.input_proj\.weight": Code.QUANTIZED_PIXEL_PROJECTION}),
        ("dense31b", "skip", "0.22.1", {}),
        ("dense31b", "skip", "0.32.0", {}),
        ("dense31b", "skip", "portable", {K_EQ_V_QK: Code.K_EQ_V_WITHOUT_V}),
        ("dense31b", "mixed", "0.27.1", {}),
        ("dense31b", "partial", "0.22.1", {PARTIAL_GROUPS: Code.PARTIALLY_QUANTIZED}),
        ("dense31b", "partial", "0.32.0", {PARTIAL_GROUPS: Code.PARTIALLY_QUANTIZED}),
        (
            "dense31b",
            "partial",
            "portable",
            {PARTIAL_GROUPS: Code.PARTIALLY_QUANTIZED, K_EQ_V_QK: Code.K_EQ_V_WITHOUT_V},
        ),
        ("e4b", "all", "0.22.1", {f"{TOWER}|{AUDIO}": Code.QUANTIZED_IN_UNQUANTIZED}),
        ("e4b", "all", "portable", {f"{TOWER}|{AUDIO}": Code.QUANTIZED_IN_UNQUANTIZED}),
        ("e4b", "partial", "portable", {PARTIAL_GROUPS: Code.PARTIALLY_QUANTIZED}),
        ("e4b-noshared", "skip", "portable", {}),
        ("unified12b", "all", "0.32.0", {r".*\.embedding_projection\.weight": Code.QUANTIZED_IN_UNQUANTIZED}),
        ("unified12b", "all", "portable", {r".*\.embedding_projection\.weight": Code.QUANTIZED_IN_UNQUANTIZED}),
        ("moe26b", "all", "0.27.1", {r".*\.router\.proj\.weight": Code.QUANTIZED_IN_UNQUANTIZED}),
        ("text", "all", "0.22.1", {}),
        ("text", "fp4", "portable", {K_EQ_V_QK: Code.K_EQ_V_WITHOUT_V}),
    ],
)
def test_what_is_dequantized_and_why(
    family: str, quant: str, target: str, expected: dict[str, Code], pristine: Make
) -> None:
    plan = planned(pristine(family, quant), target)
    said = {
        name: code
        for pattern, code in expected.items()
        for name in plan.checkpoint.weights
        if re.fullmatch(pattern, name)
    }
    assert of(plan, "dequantize") == said
    assert set(said.values()) == set(expected.values())


HF_LIST = [
    "lm_head",
    "model.vision_tower",
    "model.audio_tower",
    "model.embed_vision",
    "model.embed_audio",
    "model.vision_embedder",
    "router.proj",
]


@pytest.mark.parametrize(
    ("family", "quant", "target", "added"),
    [
        ("dense31b", "skip", "0.22.1", []),
        ("dense31b", "skip", "0.27.1", ["embed_vision", "vision_tower"]),
        ("dense31b", "skip", "0.32.0", ["embed_vision", "vision_tower"]),
        ("e4b", "skip", "portable", ["audio_tower", "embed_audio", "embed_vision", "vision_tower"]),
        ("unified12b", "skip", "0.32.0", ["vision_embedder"]),
        ("text", "skip", "0.32.0", []),
        (
            "dense31b",
            "skip",
            "portable",
            [
                "language_model.model.layers.2.self_attn.qkv_proj",
                "language_model.model.layers.5.self_attn.qkv_proj",
                "embed_vision",
                "vision_tower",
                *(f"{L}{n}.self_attn.{p}_proj" for n in (2, 5) for p in "kq"),
            ],
        ),
        (
            "dense31b",
            "partial",
            "0.27.1",
            [
                L + "1.self_attn.q_proj",
                L + "3.mlp.gate_proj",
                "embed_vision",
                "language_model.model.layers.1.self_attn.qkv_proj",
                "language_model.model.layers.3.mlp.gate_up_proj",
                "vision_tower",
                L + "1.self_attn.k_proj",
                L + "1.self_attn.v_proj",
                L + "3.mlp.up_proj",
            ],
        ),
        (
            "dense31b",
            "mixed",
            "0.22.1",
            [
                L + "1.self_attn",
                L + "3.mlp",
                "language_model.model.layers.1.self_attn",
                "language_model.model.layers.3.mlp",
            ],
        ),
    ],
)
def test_what_is_added_to_a_skip_list(family: str, quant: str, target: str, added: list[str], pristine: Make) -> None:
    assert skip_list(planned(pristine(family, quant), target)) == HF_LIST + added


@pytest.mark.parametrize(
    ("family", "target", "expected"),
    [
        ("dense31b", "0.22.1", ["model.embed_vision", "model.vision_tower", "lm_head"]),
        ("unified12b", "0.32.0", ["model.embed_audio", "model.embed_vision.multimodal_embedder", "lm_head"]),
        ("moe26b", "0.32.0", [*(f"{L}{n}.router" for n in range(6)), "lm_head"]),
        ("e4b", "0.32.0", []),
    ],
)
def test_a_list_that_was_not_there_names_lm_head_too(
    family: str, target: str, expected: list[str], pristine: Make
) -> None:
    assert skip_list(planned(pristine(family, "all"), target)) == expected


@pytest.mark.parametrize("family", ["dense31b", "text"])
@pytest.mark.parametrize("quant", ["all", "single", "storage-bf16"])
def test_v_is_an_exact_copy_of_k(family: str, quant: str, pristine: Make) -> None:
    plan = planned(pristine(family, quant), "0.22.1")
    root = L if family == "dense31b" else "model.layers."
    assert of(plan, "insert") == {f"{root}{n}.self_attn.v_proj.weight": Code.K_EQ_V_WITHOUT_V for n in (2, 5)}
    out, source = made(plan), plan.checkpoint
    for n in (2, 5):
        k, v = (f"{root}{n}.self_attn.{part}_proj.weight" for part in "kv")
        mine = {name.removeprefix(v): t for name, t in out.items() if name.startswith(v)}
        theirs = {name.removeprefix(k): t for name, t in out.items() if name.startswith(k)}
        assert set(mine) == set(theirs) and len(mine) == (4 if quant == "single" else 6)
        for suffix, t in mine.items():
            assert t.op == theirs[suffix].op == Copy(source.tensors[k + suffix])
            assert (t.info.dtype, t.info.shape) == (theirs[suffix].info.dtype, theirs[suffix].info.shape)


@pytest.mark.parametrize("target", ["0.22.1", "0.27.1", "portable"])
@pytest.mark.parametrize("quant", ["all", "single", "fp4", "storage-bf16"])
def test_k_and_v_of_shared_layers_are_copies_of_the_layer_whose_they_share(
    target: str, quant: str, pristine: Make
) -> None:
    plan = planned(pristine("e4b-noshared", quant), target)
    inserted = of(plan, "insert")
    parts = ("k_proj", "v_proj", "k_norm")
    assert inserted == {f"{L}{n}.self_attn.{p}.weight": Code.SHARED_WITHOUT_KV for n in (4, 5) for p in parts}
    out, source = made(plan), plan.checkpoint
    for layer, donor in ((4, 2), (5, 3)):  # the last layers of the same kind that have their own
        assert source.config["text_config"]["layer_types"][layer] == source.config["text_config"]["layer_types"][donor]
        for part in parts:
            mine, theirs = (f"{L}{n}.self_attn.{part}.weight" for n in (layer, donor))
            copied = {n.removeprefix(mine): t for n, t in out.items() if n.startswith(mine)}
            assert len(copied) == (1 if part == "k_norm" else 4 if quant == "single" else 6)
            for suffix, t in copied.items():
                assert t.op == Copy(source.tensors[theirs + suffix])
                assert (t.info.dtype, t.info.shape) == (
                    out[theirs + suffix].info.dtype,
                    out[theirs + suffix].info.shape,
                )


def test_shared_layers_get_nothing_where_it_would_be_dropped(pristine: Make) -> None:
    assert of(planned(pristine("e4b-noshared", "skip"), "0.30.0"), "insert") == {}
    assert of(planned(pristine("e4b", "skip"), "portable"), "insert") == {}


def fix(source: Path, target: str, **options: Any) -> Plan:
    return plan_checkpoint(LocalSource.open(source), resolve_target(target), Options(**options))


def test_a_donor_of_another_form_is_dequantized_for_an_unquantized_q(checkpoint: Make) -> None:
    source = checkpoint("e4b-noshared", "all")
    with tensors_of(source) as tensors:
        dequantize_weight(tensors, L + "4.self_attn.q_proj.weight")
    plan = fix(source, "0.27.1")
    for part in ("k_proj", "v_proj"):
        donor = plan.checkpoint.weights[f"{L}2.self_attn.{part}.weight"]
        assert made(plan)[f"{L}4.self_attn.{part}.weight"].op == Dequantize((donor,), "BF16")
        assert isinstance(made(plan)[f"{L}5.self_attn.{part}.weight"].op, Copy)
    assert of(plan, "dequantize") == {}
    assert "language_model.model.layers.4.self_attn.qkv_proj" in skip_list(plan)


@pytest.mark.parametrize("dropped", [("k_proj", "v_proj"), ("v_proj",), ("k_proj",)])
def test_without_a_quantized_donor_the_whole_group_is_dequantized(dropped: tuple[str, ...], checkpoint: Make) -> None:
    source = checkpoint("e4b", "all")
    with tensors_of(source) as tensors:
        for layer in (1, 3):
            dequantize_weight(tensors, f"{L}{layer}.self_attn.v_proj.weight")
        for part in dropped:
            drop_weight(tensors, f"{L}5.self_attn.{part}.weight")
    plan = fix(source, "0.27.1")
    kept = {f"{L}5.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj") if p not in dropped}
    asked = {n for n, code in of(plan, "dequantize").items() if code is Code.SHARED_WITHOUT_KV}
    if "v_proj" in dropped:
        assert asked == kept, "v has no quantized donor"
        assert {n: made(plan)[n].info.dtype for n in kept} == dict.fromkeys(kept, "BF16")
    else:
        assert asked == set() and isinstance(made(plan)[f"{L}5.self_attn.k_proj.weight"].op, Copy)
    assert set(of(plan, "insert")) == {f"{L}5.self_attn.{p}.weight" for p in dropped}


def test_shared_layers_without_any_donor_are_refused(checkpoint: Make) -> None:
    source = checkpoint("e4b-noshared", "all")
    with json_of(source) as config:
        config["text_config"]["layer_types"] = ["full_attention"] * 4 + ["sliding_attention", "full_attention"]
    with pytest.raises(Unrepairable, match="BNB1"):
        fix(source, "0.27.1")


def explicit_v(source: Path) -> None:
    with tensors_of(source) as tensors:
        for n in (2, 5):
            copy_weight(tensors, f"{L}{n}.self_attn.k_proj.weight", f"{L}{n}.self_attn.v_proj.weight")


@pytest.mark.parametrize("target", ["0.32.0", "portable"])
def test_an_explicit_v_goes_with_its_state_tensors(target: str, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    explicit_v(source)
    plan = fix(source, target)
    dropped = of(plan, "drop")
    assert set(dropped.values()) == {Code.EXPLICIT_V} and len(dropped) == 12
    assert not any(n.startswith(f"{L}{layer}.self_attn.v_proj") for n in made(plan) for layer in (2, 5))
    assert f"{L}1.self_attn.v_proj.weight" in made(plan)


def test_of_a_dropped_explicit_v_nothing_else_is_reported(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "storage-bf16")
    explicit_v(source)
    name = f"{L}2.self_attn.v_proj.weight"
    write_tensors(source / "other.safetensors", {name: read_tensors(source / SHARD)[name]})
    plan = fix(source, "0.32.0")
    assert [(e.action, e.code) for e in plan.edits if e.name == name] == [("drop", Code.EXPLICIT_V)]


def test_an_explicit_v_stays_where_it_is_needed(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    explicit_v(source)
    assert fix(source, "0.22.1").nothing_to_do


def test_a_quantized_lm_head_is_dequantized_and_named_in_a_list_that_is_there(checkpoint: Make) -> None:
    source = checkpoint("text", "all")
    with tensors_of(source) as tensors:
        copy_weight(tensors, "model.layers.1.mlp.up_proj.weight", "lm_head.weight")
    with json_of(source) as config:
        config["tie_word_embeddings"] = False
    plan = fix(source, "0.27.1")
    assert of(plan, "dequantize") == {"lm_head.weight": Code.QUANTIZED_LM_HEAD}
    assert skip_list(plan) == [], "without a list transformers leaves lm_head unquantized"
    set_skip(source, "model.vision_tower")
    assert skip_list(fix(source, "0.27.1")) == ["model.vision_tower", "lm_head"]


def test_an_entry_that_names_a_quantized_module_is_replaced_by_the_unquantized_ones_it_named(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "mixed")
    old = ["first", "language_model.model.layers", "lm_head", "model.vision_tower", "embed_vision", "last"]
    set_skip(source, *old)
    assert Code.QUANTIZED_BUT_SKIPPED in {f.code for f in scan(source, "0.27.1").findings}
    plan = fix(source, "0.27.1")
    assert skip_list(plan) == [
        "first",
        "lm_head",
        "model.vision_tower",
        "embed_vision",
        "last",
        "language_model.model.layers.1.self_attn",
        "language_model.model.layers.3.mlp",
        "vision_tower",
        "model.embed_vision",
        L + "1.self_attn",
        L + "3.mlp",
    ]
    assert set(of(plan, "config")) == {"quantization_config.llm_int8_skip_modules"}
    assert {e.action for e in plan.edits} == {"config"}


def twelve_layers(source: Path) -> None:
    """The six layers of a text-only checkpoint twice."""
    with json_of(source) as config:
        config |= {"num_hidden_layers": 12, "layer_types": config["layer_types"] * 2}
    with tensors_of(source) as tensors:
        for name in [n for n in tensors if n.startswith("model.layers.")]:
            layer = int(name.split(".")[2])
            tensors[name.replace(f".{layer}.", f".{layer + 6}.", 1)] = tensors[name]


def test_an_entry_for_one_reader_does_not_name_a_quantized_module_to_the_other(checkpoint: Make) -> None:
    source = checkpoint("text", "all")
    twelve_layers(source)
    with tensors_of(source) as tensors:
        for name in [n for n in tensors if re.fullmatch(r"model\.layers\.1\..*_proj\.weight", n)]:
            dequantize_weight(tensors, name)
    plan = fix(source, "0.32.0")
    assert transformers_skips("model.layers.1", "model.layers.10.mlp"), "which is why that entry will not do"
    assert skip_list(plan) == ["model.layers.1.mlp", "model.layers.1.self_attn", "lm_head"]


def test_added_entries_are_sorted_by_layer_number(checkpoint: Make) -> None:
    source = checkpoint("text", "all")
    twelve_layers(source)
    with tensors_of(source) as tensors:
        for layer in (2, 10, 11):
            dequantize_weight(tensors, f"model.layers.{layer}.mlp.down_proj.weight")
    entries = [e for e in skip_list(fix(source, "0.32.0")) if "down_proj" in e]
    assert entries == [f"model.layers.{layer}.mlp.down_proj" for layer in (2, 10, 11)]


def test_statistics_without_a_weight_are_dropped_with_whatever_else_is_repaired(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    with tensors_of(source) as tensors:
        weight = L + "0.mlp.up_proj.weight"
        strays = {f"{L}9.mlp.up_proj.weight{suffix}": t for suffix, t in state_tensors(tensors, weight).items()}
        tensors |= strays
    plan = fix(source, "0.32.0")
    assert of(plan, "drop") == dict.fromkeys(strays, Code.ORPHANED_STATE_TENSORS)
    assert not set(strays) & set(made(plan))


def test_statistics_by_themselves_are_not_repaired(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        tensors[L + "9.mlp.up_proj.weight.absmax"] = zeros(4, dtype="F32")
    assert fix(source, "0.32.0").nothing_to_do


def test_a_shard_of_nothing_but_strays_is_left_out_and_out_of_the_index(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    write_tensors(source / "strays.safetensors", {L + "9.mlp.up_proj.weight.absmax": zeros(4, dtype="F32")})
    write_index(source)
    plan = fix(source, "0.32.0")
    assert [s.name for s in plan.shards] == ["model.safetensors"]
    index = json.loads(plan.texts["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert "strays.safetensors" not in plan.copied


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_is_kept(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    name = "model.language_model.norm.weight"
    write_tensors(source / "other.safetensors", {name: zeros(128), L + "0.self_attn.rotary_emb.inv_freq": zeros(4)})
    write_index(source)
    with json_of(source, "model.safetensors.index.json") as doc:
        doc["weight_map"][name] = "model.safetensors"
    plan = fix(source, "0.32.0")
    assert [(e.action, e.name, e.code) for e in plan.edits] == [("drop", name, Code.DUPLICATE)]
    assert plan.edits[0].detail == "from other.safetensors; kept in model.safetensors"
    op = made(plan)[name].op
    assert isinstance(op, Copy) and op.origin.shard == "model.safetensors"
    assert [s.copied for s in plan.shards] == [True, False]


@pytest.mark.parametrize("target", TARGETS)
def test_int8_is_refused_where_a_weight_would_have_to_be_dequantized(target: str, pristine: Make) -> None:
    source = pristine("dense31b", "int8")
    if target == "portable":
        with pytest.raises(Unrepairable, match=r"2\.self_attn\.k_proj\.weight is an LLM\.int8 weight"):
            planned(source, target)
        return
    plan = planned(source, target)
    assert {e.action for e in plan.edits} == ({"insert"} if target == "0.22.1" else {"config"})


@pytest.mark.parametrize("target", TARGETS)
def test_int8_experts_are_refused(target: str, pristine: Make) -> None:
    with pytest.raises(Unrepairable, match=r"BNB40[15]"):
        planned(pristine("moe26b", "int8"), target)


def test_v_of_an_int8_k_gets_its_scales_under_their_own_names(pristine: Make) -> None:
    out = made(planned(pristine("text", "int8"), "0.22.1"))
    for suffix in ("weight", "SCB", "weight_format"):
        k, v = (out[f"model.layers.2.self_attn.{part}_proj.{suffix}"] for part in "kv")
        assert k.op == v.op and (k.info.dtype, k.info.shape) == (v.info.dtype, v.info.shape)


def test_a_damaged_quant_state_stops_a_repair(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        del tensors[L + "1.self_attn.k_proj.weight.quant_map"]
    with pytest.raises(QuantStateError, match=r"1\.self_attn\.k_proj\.weight: its quant-state tensor quant_map"):
        fix(source, "0.32.0")


def test_a_config_that_the_older_keys_cannot_say_is_refused(checkpoint: Make) -> None:
    source = checkpoint("text", "all", per_layer_config=True)
    with json_of(source) as config:
        config["per_layer_config"]["5"]["head_dim"] = 32
    with pytest.raises(Unrepairable, match="BNB302") as caught:
        fix(source, "0.27.1")
    assert caught.value.hint == "it says more than the older keys can"
    assert fix(source, "0.32.0").nothing_to_do


@pytest.mark.parametrize("target", ["0.27.1", "0.32.0"])
def test_a_partially_quantized_group_is_quantized_where_the_user_asks(target: str, pristine: Make) -> None:
    plan = planned(pristine("dense31b", "partial"), target, Options(partial_groups="quantize"))
    assert of(plan, "quantize") == dict.fromkeys(
        [L + "1.self_attn.q_proj.weight", L + "3.mlp.gate_proj.weight"], Code.PARTIALLY_QUANTIZED
    )
    assert of(plan, "dequantize") == {}
    assert not [e for e in skip_list(plan) if "layers" in e], "nothing of the language model is unquantized any more"


def test_a_group_that_gets_a_copied_member_is_dequantized_even_where_the_user_asks(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        dequantize_weight(tensors, L + "2.self_attn.k_proj.weight")
        dequantize_weight(tensors, L + "5.self_attn.q_proj.weight")
    plan = fix(source, "0.22.1", partial_groups="quantize")
    assert of(plan, "quantize") == {L + "5.self_attn.q_proj.weight": Code.PARTIALLY_QUANTIZED}
    assert of(plan, "dequantize")[L + "2.self_attn.q_proj.weight"] is Code.PARTIALLY_QUANTIZED
    assert set(of(plan, "insert")) == {L + "5.self_attn.v_proj.weight"}


def test_a_group_that_gets_a_shared_member_is_dequantized_even_where_the_user_asks(checkpoint: Make) -> None:
    source = checkpoint("e4b", "all")
    with tensors_of(source) as tensors:
        dequantize_weight(tensors, L + "4.self_attn.q_proj.weight")
        drop_weight(tensors, L + "4.self_attn.k_proj.weight")
    plan = fix(source, "0.27.1", partial_groups="quantize")
    assert of(plan, "quantize") == {}
    assert set(of(plan, "dequantize")) == {L + "4.self_attn.v_proj.weight"}
    assert made(plan)[L + "4.self_attn.k_proj.weight"].info.dtype == "BF16"


@pytest.fixture(scope="module")
def mixed(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensors, Tensors]]:
    """By family: a folder to write in, every tensor with all linears quantized, and every tensor in full precision."""
    out = {}
    for family in ("dense31b", "e4b", "text"):
        folder = Path(shutil.copytree(pristine(family, "all"), tmp_path_factory.mktemp("mixed") / family))
        out[family] = folder, read_tensors(folder / SHARD), read_tensors(pristine(family, "bf16") / SHARD)
    return out


@pytest.mark.parametrize("family", ["dense31b", "e4b", "text"])
@settings(max_examples=12)
@given(data=st.data())
def test_any_mixture_of_quantized_and_unquantized_with_any_skip_list_is_repaired(
    family: str, data: st.DataObject, mixed: dict[str, tuple[Path, Tensors, Tensors]]
) -> None:
    folder, quantized, full = mixed[family]
    linear = sorted(n for n in full if n + ".quant_map" in quantized)
    model = read_model(opened(folder).config)
    expectation = expect(model, ranges()[0])
    assert expectation is not None
    modules = [slot.module for n in linear if (slot := find_slot(n, expectation)) is not None]
    modules += [n.removesuffix(".weight") for n in linear]
    prefixes = sorted({m.rsplit(".", n)[0] for m in modules for n in range(4)} | {m.split(".")[-1] for m in modules})
    unquantized = data.draw(st.sets(st.sampled_from(linear)), label="unquantized")
    set_skip(folder, *data.draw(st.lists(st.sampled_from(prefixes), max_size=4, unique=True), label="skip"))
    gone = {n for n in quantized for name in unquantized if n == name or n.startswith(name + ".")}
    shared = [n for n in quantized if re.search(r"layers\.[45]\.self_attn\.(k_proj|v_proj|k_norm)\.weight$", n)]
    if family == "e4b":
        lost = data.draw(st.sets(st.sampled_from(shared)), label="lost")
        gone |= {n for n in quantized for name in lost if n == name or n.startswith(name + ".")}
        unquantized -= lost
    kept = {n: t for n, t in quantized.items() if n not in gone}
    write_tensors(folder / SHARD, kept | {n: full[n] for n in unquantized})
    target, partial_groups = data.draw(st.sampled_from(TARGETS)), data.draw(st.sampled_from(["dequantize", "quantize"]))
    plan = fix(folder, target, partial_groups=partial_groups)
    if plan.nothing_to_do:
        return  # all is well in vLLM; transformers may have been at odds with this list before
    assert_both_readers_agree(plan)
    if partial_groups == "dequantize":
        assert not of(plan, "quantize")
    assert {n for n, code in of(plan, "dequantize").items() if n in unquantized} == set()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F64"])
def test_a_group_that_bitsandbytes_cannot_quantize_is_dequantized_even_where_the_user_asks(
    dtype: str, checkpoint: Make
) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        drop_weight(tensors, L + "0.mlp.up_proj.weight")
        tensors[L + "0.mlp.up_proj.weight"] = zeros(256, 128, dtype=dtype)
    plan = fix(source, "0.27.1", partial_groups="quantize")
    assert of(plan, "quantize") == {}
    assert of(plan, "dequantize") == {L + "0.mlp.gate_proj.weight": Code.PARTIALLY_QUANTIZED}
