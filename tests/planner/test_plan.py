"""A plan to the byte: where every tensor of the output is, the texts next to it, what is copied, what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.checkpoint.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from bnbfix.checkpoint.safetensors import DTYPE_BITS, LENGTH_BYTES, parse_header
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.engine import Installed
from bnbfix.engines.targets import resolve_target
from bnbfix.errors import InputError, NotApplicable, Unrepairable
from bnbfix.models.roles import canonical
from bnbfix.planner.layout import Copy, Dequantize, Quantize, TensorPlan
from bnbfix.planner.model_card import CARD
from bnbfix.planner.plan import RECORD, Options, Plan
from bnbfix.planner.plan_repair import plan_checkpoint
from bnbfix.planner.planned_source import PlannedSource, open_planned
from bnbfix.rules.rule import Code
from tests.support.build import (
    SHARD,
    Make,
    copy_weight,
    json_of,
    opened,
    planned,
    read_tensors,
    scan,
    tensors_of,
    write_tensors,
    zeros,
)

L = "model.language_model.layers."
TARGETS = ("0.22.1", "0.27.1", "0.32.0", "portable")
REFUSED = {("unified12b", "0.22.1"), ("moe26b", "0.22.1"), ("moe26b", "portable")}
KINDS = [
    *((family, quant, 1) for family in ("dense31b", "text") for quant in ("all", "partial", "single", "storage-bf16")),
    *((family, "partial", 3) for family in ("dense31b", "e4b-noshared", "unified12b", "moe26b")),
    ("e4b-noshared", "all", 1),
    ("unified12b", "all", 7),
    ("moe26b", "all", 1),
]
CELLS = [(*kind, target) for kind in KINDS for target in TARGETS if (kind[0], target) not in REFUSED]
every_cell = pytest.mark.parametrize(("family", "quant", "shards", "target"), CELLS)


def fix(source: Path, target: str = "portable", **options: Any) -> Plan:
    return plan_checkpoint(LocalSource.open(source), resolve_target(target), Options(**options))


def made(plan: Plan) -> dict[str, TensorPlan]:
    """Every tensor of the output by name."""
    return {t.info.name: t for shard in plan.shards for t in shard.tensors}


def after(plan: Plan) -> Checkpoint:
    """The output as a checkpoint."""
    return open_checkpoint(PlannedSource(plan))


@every_cell
def test_tensors_follow_each_other_each_at_a_multiple_of_its_element_size(
    family: str, quant: str, shards: int, target: str, pristine: Make
) -> None:
    plan = planned(pristine(family, quant, shards=shards), target)
    for shard in plan.shards:
        at = 0
        for t in shard.tensors:
            width = DTYPE_BITS[t.info.dtype] // 8
            assert (t.info.begin, t.info.end) == (at, at + math.prod(t.info.shape) * width), t.info.name
            assert t.info.begin % width == 0, t.info.name
            at = t.info.end
        assert shard.size == shard.data_start + at
        # Whole runs of what is quantized come first; of the rest the widest dtype.
        quantized = [isinstance(t.op, Quantize) for t in shard.tensors]
        assert quantized == sorted(quantized, reverse=True)
        widths = [DTYPE_BITS[t.info.dtype] for t in shard.tensors if not isinstance(t.op, Quantize)]
        assert widths == sorted(widths, reverse=True)
        for run in shard.runs():
            if isinstance(run[0].op, Quantize):
                assert [t.info._replace(begin=0, end=0) for t in run] == [
                    info._replace(begin=0, end=0) for info in run[0].op.infos()
                ]
                assert run[0].info.begin % 8 == run[-1].info.end % 8 == 0
            else:
                assert len(run) == 1


@every_cell
def test_a_header_reads_back_as_the_tensors_that_were_planned(
    family: str, quant: str, shards: int, target: str, pristine: Make
) -> None:
    plan = planned(pristine(family, quant, shards=shards), target)
    for shard in plan.shards:
        old = plan.checkpoint.shards[shard.name]
        if shard.copied:
            assert shard.header == b"" and shard.size == plan.checkpoint.source.files[shard.name]
            assert [t.info for t in shard.tensors] == list(old.tensors.values())
            assert [t.op for t in shard.tensors] == [Copy(plan.checkpoint.tensors[name]) for name in old.tensors]
            continue
        assert int.from_bytes(shard.header[:LENGTH_BYTES], "little") == len(shard.header) - LENGTH_BYTES
        header = parse_header(shard.header[LENGTH_BYTES:], shard.size, shard.name)
        assert list(header.tensors.values()) == [t.info for t in shard.tensors]
        assert header.metadata == old.metadata == {"format": "pt"}
        assert header.data_start == len(shard.header) == shard.data_start and header.data_start % 8 == 0


@every_cell
def test_the_index_names_every_tensor_and_the_size_of_all(
    family: str, quant: str, shards: int, target: str, pristine: Make
) -> None:
    plan = planned(pristine(family, quant, shards=shards), target)
    if plan.nothing_to_do or shards == 1:
        assert INDEX not in plan.texts and INDEX not in plan.copied
        return
    planned_files = PlannedSource(plan).files
    assert len(plan.shards) > 1 and INDEX in planned_files
    index = after(plan).index
    assert index is not None
    assert index["weight_map"] == {t.info.name: shard.name for shard in plan.shards for t in shard.tensors}
    data = sum(planned_files[shard.name] - shard.data_start for shard in plan.shards)
    assert index["metadata"] == {"total_size": data}
    assert (INDEX in plan.copied) == (INDEX not in plan.texts) == (index == plan.checkpoint.index)


@every_cell
def test_a_plan_for_the_output_has_nothing_to_do(
    family: str, quant: str, shards: int, target: str, pristine: Make
) -> None:
    plan = planned(pristine(family, quant, shards=shards), target)
    if plan.nothing_to_do:
        assert (plan.bytes_read, plan.bytes_written, plan.config_diff()) == (0, 0, "")
        return
    again = plan_checkpoint(PlannedSource(plan), plan.target)
    assert again.nothing_to_do and again.scan.ok and again.scan.shards == len(plan.shards)


@pytest.mark.parametrize(("quant", "config_only"), [("skip", True), ("partial", False)])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("target", ["0.27.1", "0.32.0"])
def test_an_output_opened_by_what_is_known_is_as_its_bytes_say(
    quant: str, config_only: bool, shards: int, target: str, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(pristine("dense31b", quant, shards=shards), target)
    assert plan.config_only == config_only
    by_bytes = after(plan)
    if config_only:
        monkeypatch.setattr(PlannedSource, "read_many", None)  # no shard is read
    assert open_planned(plan) == by_bytes
    assert open_planned(plan).tensors == by_bytes.tensors


@pytest.mark.parametrize(
    ("family", "quant", "target", "options"),
    [
        ("dense31b", "partial", "portable", {}),
        ("e4b-noshared", "all", "0.22.1", {}),
        ("moe26b", "fp4", "0.27.1", {}),
        ("unified12b", "storage-bf16", "0.32.0", {}),
        ("dense31b", "partial", "0.32.0", {"partial_groups": "quantize"}),
        ("moe26b", "int8", "0.22.1", {"bf16": True, "max_shard_size": 300_000}),
    ],
)
def test_the_same_question_twice_gives_the_same_plan(
    family: str, quant: str, target: str, options: dict[str, Any], pristine: Make
) -> None:
    source = pristine(family, quant, shards=3)
    one, two = fix(source, target, **options), fix(source, target, **options)
    assert one is not two and one == two
    assert repr(one) == repr(two), "in the order of every mapping too"
    assert one.edits


def test_a_plan_does_not_depend_on_the_order_of_sets(pristine: Make) -> None:
    code = """if True:
        import sys
        from bnbfix import plan_repair
        plans = [plan_repair(p, "0.27.1", partial_groups=r) for p in sys.argv[1:] for r in ("dequantize", "quantize")]
        print([(p.edits, p.shards, p.texts, p.copied, p.remaining) for p in plans])"""
    sources = [str(pristine(family, "partial", shards=3)) for family in ("dense31b", "e4b-noshared")]
    said = {
        subprocess.run(
            [sys.executable, "-c", code, *sources],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and "Dequantize" in said.pop()


@pytest.mark.parametrize("family", ["dense31b", "e4b-noshared", "moe26b", "unified12b"])
@pytest.mark.parametrize("shards", [3, 17])
def test_the_number_of_shards_changes_neither_edits_nor_tensors(family: str, shards: int, pristine: Make) -> None:
    target = "0.27.1"
    one, many = (planned(pristine(family, "partial", shards=n), target) for n in (1, shards))
    assert many.edits == one.edits
    assert many.texts[CONFIG] == one.texts[CONFIG]
    a, b = ({n: (t.info.dtype, t.info.shape, type(t.op)) for n, t in made(p).items()} for p in (one, many))
    assert a == b
    assert {s.name for s in many.shards} == set(many.checkpoint.shards) and len(many.shards) > 2


def test_state_tensors_in_another_shard_are_read_there_and_dropped_there(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "partial", shards=17), "portable")
    dequantized = [t for t in made(plan).values() if isinstance(t.op, Dequantize)]
    parted = {
        s.info.name: s.shard
        for t in dequantized
        for w in t.op.weights
        for s in w.state_tensors.values()
        if s.shard != w.tensor.shard
    }
    assert parted, "some of what is dequantized has its quant state elsewhere"
    for name, shard in parted.items():
        assert name in plan.checkpoint.shards[shard].tensors
        assert name not in made(plan)
        assert not next(s for s in plan.shards if s.name == shard).copied


def test_a_copy_and_all_its_state_tensors_are_in_the_shard_of_its_donor(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "skip", shards=17), "0.22.1")
    shard_of = {t.info.name: shard.name for shard in plan.shards for t in shard.tensors}
    scattered = 0
    for layer in (2, 5):
        k, v = (f"{L}{layer}.self_attn.{part}_proj.weight" for part in "kv")
        weight = plan.checkpoint.weights[k]
        assert {shard_of[n] for n in (v, *(v + suffix for suffix in weight.state_tensors))} == {weight.tensor.shard}
        scattered += len({s.shard for s in weight.state_tensors.values()} | {weight.tensor.shard}) > 1
    touched = {shard.name for shard in plan.shards if not shard.copied}
    assert touched == {plan.checkpoint.weights[f"{L}{n}.self_attn.k_proj.weight"].tensor.shard for n in (2, 5)}
    assert len(touched) < len(plan.shards), "and the others are copied as they are"


def test_a_repair_of_only_the_config_copies_every_shard(pristine: Make) -> None:
    source = pristine("dense31b", "skip", shards=3)
    plan = planned(source, "0.32.0")
    assert {e.action for e in plan.edits} == {"config"}
    assert all(s.copied for s in plan.shards) and INDEX in plan.copied and set(plan.texts) == {CONFIG, CARD}
    whole = sum(p.stat().st_size for p in source.iterdir() if p.name not in (CONFIG, CARD))
    assert plan.bytes_read == whole
    assert plan.bytes_written == whole + sum(len(t.encode()) for t in plan.texts.values())


def test_bytes_read_are_those_of_every_tensor_once_and_of_copies_again(pristine: Make) -> None:
    source = pristine("dense31b", "all")
    plan = planned(source, "0.22.1")
    tensors = read_tensors(source / SHARD)
    copies = [n for n in tensors for layer in (2, 5) if n.startswith(f"{L}{layer}.self_attn.k_proj.")]
    assert {e.action for e in plan.edits} == {"dequantize", "insert", "config"} and len(copies) == 12
    others = sum(p.stat().st_size for p in source.iterdir() if p.name not in (SHARD, CONFIG, CARD))
    data = sum(len(t.data) for t in tensors.values()) + sum(len(tensors[n].data) for n in copies)
    assert plan.bytes_read == others + data
    assert plan.bytes_written == sum(PlannedSource(plan).files.values())


@pytest.mark.parametrize("family", ["dense31b", "e4b-noshared", "unified12b"])
@pytest.mark.parametrize("quant", ["all", "partial"])
def test_an_older_prefix_gets_the_same_plan_under_its_own_names(family: str, quant: str, pristine: Make) -> None:
    new = planned(pristine(family, quant), "portable")
    old = planned(pristine(family, quant, prefix="language_model.model."), "portable")
    assert old.texts == new.texts
    said = [{(e.action, canonical(e.name), e.code) for e in p.edits} for p in (old, new)]
    assert said[0] == said[1] and len(said[0]) == len(old.edits)
    names = set(made(old))
    assert {canonical(n) for n in names} == set(made(new)) and len(names) == len(made(new))
    inserted = {e.name for e in old.edits if e.action == "insert"}
    assert inserted <= names and all(n.startswith("language_model.model.layers.") for n in inserted)
    assert bool(inserted) == (family == "e4b-noshared")


def test_a_text_only_checkpoint_is_repaired_under_its_own_names(pristine: Make) -> None:
    plan = planned(pristine("text", "partial"), "portable")
    assert all(n.startswith("model.") and "language_model" not in n for n in made(plan))
    assert list(after(plan).skip_modules)[-11:] == [
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.2.self_attn.qkv_proj",
        "model.layers.3.mlp.gate_up_proj",
        "model.layers.5.self_attn.qkv_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.2.self_attn.k_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.3.mlp.up_proj",
        "model.layers.5.self_attn.k_proj",
        "model.layers.5.self_attn.q_proj",
    ]


OUTPUTS = [
    ("dense31b", "partial", 3, "portable"),
    ("dense31b", "all", 1, "0.22.1"),
    ("dense31b", "storage-bf16", 1, "portable"),
    ("e4b-noshared", "all", 1, "0.22.1"),
    ("unified12b", "partial", 3, "0.32.0"),
    ("moe26b", "all", 1, "0.32.0"),
    ("text", "single", 1, "0.22.1"),
]


@pytest.fixture(params=OUTPUTS, ids=["-".join(map(str, case)) for case in OUTPUTS])
def plan(request: pytest.FixtureRequest, pristine: Make) -> Plan:
    family, quant, shards, target = request.param
    out = planned(pristine(family, quant, shards=shards), target)
    assert out.edits
    return out


def test_every_file_is_either_written_or_copied(plan: Plan) -> None:
    shards, texts, copied = {s.name for s in plan.shards}, set(plan.texts), set(plan.copied)
    assert shards | texts | copied == set(plan.checkpoint.source.files)
    assert len(shards) + len(texts) + len(copied) == len(plan.checkpoint.source.files)
    assert {"tokenizer.json", "chat_template.jinja"} <= copied and CARD in texts
    assert set(PlannedSource(plan).files) == shards | texts | copied
    assert sum(PlannedSource(plan).files.values()) == plan.bytes_written


def test_the_planned_source_reads_what_stays_as_the_source_has_it(plan: Plan) -> None:
    source, out = plan.checkpoint.source, PlannedSource(plan)
    kept = 0
    for shard in plan.shards:
        for t in shard.tensors:
            if isinstance(t.op, Copy):
                origin = t.op.origin
                (got,) = out.read(shard.name, [(shard.data_start + t.info.begin, t.info.nbytes)])
                assert [got] == source.read(origin.shard, [(origin.offset, origin.info.nbytes)]), t.info.name
                kept += 1
    assert kept > 20
    for name in plan.copied:
        assert out.read(name, [(0, out.files[name])]) == source.read(name, [(0, source.files[name])])


def test_the_planned_source_comes_from_where_the_source_does(plan: Plan) -> None:
    source, out = plan.checkpoint.source, PlannedSource(plan)
    assert (out.name, out.origin, out.fingerprint) == (source.name, source.origin, source.fingerprint)
    assert out.with_subfolders() is out
    assert all(out.local_path(name) is None for name in out.files), "and nothing is on disk yet"


def test_the_planned_source_has_no_bytes_for_what_is_not_made_yet(plan: Plan) -> None:
    out = PlannedSource(plan)
    unmade = [
        (shard, t)
        for shard in plan.shards
        for t in shard.tensors
        if isinstance(t.op, (Dequantize, Quantize)) and ".quant_state." not in t.info.name
    ]
    assert bool(unmade) == bool({"dequantize", "quantize"} & {e.action for e in plan.edits})
    for shard, t in unmade[:3]:
        with pytest.raises(InputError, match=re.escape(f"tensor {t.info.name!r} is not made yet")):
            out.read(shard.name, [(shard.data_start + t.info.begin, 1)])


def test_reads_inside_headers_texts_and_tensors_begin_and_end_where_asked(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "partial", shards=3), "portable")
    out = PlannedSource(plan)
    shard = next(s for s in plan.shards if not s.copied)
    t = next(t for t in shard.tensors if isinstance(t.op, Copy) and t.info.nbytes > 100)
    at = shard.data_start + t.info.begin
    (whole,) = out.read(shard.name, [(at, t.info.nbytes)])
    asked = [(at + 7, 20), (8, 5), (at, 0), (0, 8)]
    assert out.read(shard.name, asked) == [whole[7:27], shard.header[8:13], b"", shard.header[:8]]
    assert out.read(CONFIG, [(3, 9)]) == [plan.texts[CONFIG].encode()[3:12]]
    assert out.name == plan.checkpoint.source.name


@pytest.mark.parametrize(
    ("family", "quant", "shards", "target"),
    [("dense31b", "partial", 3, "portable"), ("dense31b", "storage-bf16", 1, "0.22.1"), ("moe26b", "all", 1, "0.27.1")],
)
def test_what_is_written_is_what_was_planned(
    family: str, quant: str, shards: int, target: str, pristine: Make, tmp_path: Path
) -> None:
    source = pristine(family, quant, shards=shards)
    plan = planned(source, target)
    bnbfix.repair(source, tmp_path / "out", target, device="cpu")
    out = LocalSource.open(tmp_path / "out")
    assert {f: n for f, n in out.files.items() if f != "bnbfix.json"} == dict(PlannedSource(plan).files)
    assert {n: (tmp_path / "out" / n).read_text("utf-8") for n in plan.texts} == dict(plan.texts)
    written, before = opened(tmp_path / "out"), after(plan)
    assert {n: t.info for n, t in written.tensors.items()} == {n: t.info for n, t in before.tensors.items()}
    for shard in plan.shards:
        assert (tmp_path / "out" / shard.name).read_bytes()[: len(shard.header)] == shard.header


def test_state_tensors_of_a_dequantized_weight_go_from_another_shard_and_two_shards_get_an_index(
    checkpoint: Make,
) -> None:
    source = checkpoint("dense31b", "partial")
    name = L + "1.self_attn.k_proj.weight"
    with tensors_of(source) as tensors:
        moved = {n: tensors.pop(n) for n in list(tensors) if n.startswith(name + ".")}
    write_tensors(source / "other.safetensors", {**moved, L + "0.other": zeros(4)})
    plan = fix(source, "0.27.1")
    names = set(made(plan))
    assert len(moved) == 5 and not names & set(moved) and name in names
    assert [s.name for s in plan.shards] == ["model.safetensors", "other.safetensors"]
    assert set(json.loads(plan.texts[INDEX])["weight_map"]) == names


def test_the_index_keeps_what_else_it_says(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "partial", shards=3)
    with json_of(source, INDEX) as index:
        index["metadata"] |= {"total_parameters": 7, "total_size": 1}
        index["extra"] = "ü"
    plan = fix(source, "0.27.1")
    new = json.loads(plan.texts[INDEX])
    assert (new["extra"], new["metadata"]["total_parameters"]) == ("ü", 7)
    assert new["metadata"]["total_size"] == sum(t.info.nbytes for s in plan.shards for t in s.tensors)
    assert "ü" in plan.texts[INDEX]


def test_a_wrong_index_by_itself_is_not_repaired(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all", shards=3)
    with json_of(source, INDEX) as index:
        index["metadata"]["total_size"] = 1
    assert Code.INDEX in {f.code for f in scan(source, "0.32.0").findings}
    assert fix(source, "0.32.0").nothing_to_do


def test_the_diff_of_the_config_shows_the_planned_keys(pristine: Make) -> None:
    plan = planned(pristine("text", "all", per_layer_config=True), "portable")
    lines = plan.config_diff().splitlines()
    assert lines[:2] == ["--- config.json", "+++ config.json"]
    removed = [line for line in lines[2:] if line.startswith("-")]
    added = [line for line in lines[2:] if line.startswith("+")]
    assert any('"per_layer_config"' in line for line in removed)
    assert any('"global_head_dim": 64' in line for line in added)
    assert any("layers.2.self_attn.qkv_proj" in line for line in added)
    assert planned(pristine("text", "all"), "0.22.1").config_diff() == ""


def test_the_config_keeps_its_line_ends_and_indentation(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    doc = json.loads((source / CONFIG).read_text("utf-8"))
    (source / CONFIG).write_bytes(json.dumps(doc, indent="\t").replace("\n", "\r\n").encode())
    plan = fix(source, "0.32.0")
    doc["quantization_config"]["llm_int8_skip_modules"] += ["embed_vision", "vision_tower"]
    assert plan.texts[CONFIG] == json.dumps(doc, indent="\t").replace("\n", "\r\n")


def test_edits_are_listed_in_full(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "skip"), "0.22.1")
    assert [(e.action, e.name, e.code, e.detail) for e in plan.edits] == [
        (
            "insert",
            f"{L}{n}.self_attn.v_proj.weight",
            Code.K_EQ_V_WITHOUT_V,
            f"exact copy of {L}{n}.self_attn.k_proj.weight",
        )
        for n in (2, 5)
    ]
    assert plan.edits[0].to_dict() == {
        "action": "insert",
        "name": L + "2.self_attn.v_proj.weight",
        "code": "BNB104",
        "detail": f"exact copy of {L}2.self_attn.k_proj.weight",
    }


def test_an_unquantized_checkpoint_is_not_applicable(pristine: Make) -> None:
    with pytest.raises(NotApplicable, match="is an unquantized Gemma4ForConditionalGeneration"):
        fix(pristine("dense31b", "bf16"))


def test_bf16_in_one_file_needs_no_index_and_takes_none_along(pristine: Make) -> None:
    plan = planned(pristine("text", "all", shards=3), "0.32.0", Options(bf16=True))
    assert [s.name for s in plan.shards] == ["model.safetensors"]
    assert not [f for f in PlannedSource(plan).files if "safetensors" in f and f != "model.safetensors"]


def test_bf16_keeps_an_index_where_a_file_remains_that_the_old_one_left_out(checkpoint: Make) -> None:
    source = checkpoint("text", "all", shards=3)
    write_tensors(source / "stray.safetensors", {"model.norm.weight": zeros(128), "model.stray": zeros(4)})
    plan = fix(source, "0.32.0", bf16=True)
    assert [s.name for s in plan.shards] == ["model.safetensors"] and "stray.safetensors" in plan.copied
    assert json.loads(plan.texts[INDEX])["weight_map"] == dict.fromkeys(made(plan), "model.safetensors")
    assert set(after(plan).tensors) == set(made(plan)), "nobody reads the stray file"


@pytest.mark.parametrize("size", [1, 20_000, 70_000, 10**9])
def test_bf16_fills_each_shard_as_far_as_it_goes_in_the_order_of_the_source(size: int, pristine: Make) -> None:
    source = pristine("text", "all", shards=3)
    plan = planned(source, "0.32.0", Options(bf16=True, max_shard_size=size))
    sizes = [[t.info.nbytes for t in shard.tensors] for shard in plan.shards]
    assert all(len(part) == 1 or sum(part) <= size for part in sizes)
    names = [[t.info.name for t in shard.tensors] for shard in plan.shards]
    order = [n for h in plan.checkpoint.shards.values() for n in h.tensors if n in plan.checkpoint.weights]
    at = 0
    for part in names:
        assert set(part) == set(order[at : at + len(part)])
        at += len(part)
        if at < len(order):
            assert sum(made(plan)[n].info.nbytes for n in [*part, order[at]]) > size, "the next one had no room"
    assert at == len(order)
    assert {t.info.dtype for t in made(plan).values()} == {"BF16"}
    assert "quantization_config" not in after(plan).config


def test_bf16_of_a_class_that_the_release_does_not_know_is_refused(pristine: Make) -> None:
    with pytest.raises(Unrepairable, match="BNB303"):
        planned(pristine("unified12b", "all"), "0.22.1", Options(bf16=True))
    assert planned(pristine("moe26b", "all"), "0.22.1", Options(bf16=True)).edits, "but experts are no reason"


def single_experts(source: Path, *prefixes: str) -> None:
    """Two per-expert weights of layer 3 under each prefix, next to whatever experts there are."""
    with tensors_of(source) as tensors:
        for prefix in prefixes:
            for expert in range(2):
                for part in ("gate", "up", "down"):
                    old, new = f"{L}3.mlp.{part}_proj.weight", f"{L}3.{prefix}.{expert}.{part}_proj.weight"
                    copy_weight(tensors, old, new)


@pytest.mark.parametrize("prefixes", [("experts",), ("moe.experts", "experts")])
def test_experts_that_would_end_up_under_one_name_are_refused(prefixes: tuple[str, ...], checkpoint: Make) -> None:
    source = checkpoint("moe26b", "all")
    if len(prefixes) == 2:
        with tensors_of(source) as tensors:
            for name in [n for n in tensors if ".experts." in n]:
                del tensors[name]
    single_experts(source, *prefixes)
    with pytest.raises(Unrepairable, match=r"two tensors would be named '.*layers\.3\.moe\.experts\.0\."):
        fix(source, "0.27.1")


@pytest.mark.parametrize(("family", "empty"), [("e4b", True), ("e4b-noshared", True), ("dense31b", False)])
def test_a_plugin_that_is_missing_stays_and_stops_no_repair(family: str, empty: bool, pristine: Make) -> None:
    target = resolve_target(None, Installed("0.32.0", None))
    plan = plan_checkpoint(LocalSource.open(pristine(family, "all" if empty else "skip")), target)
    assert plan.nothing_to_do == empty
    assert [(f.code, f.fix) for f in plan.remaining] == [(Code.PLUGIN, None)]
    assert not plan.scan.ok
    fine = replace(target, installed=Installed("0.32.0", "0.0.3"))
    assert plan_checkpoint(LocalSource.open(pristine(family, "all")), fine).remaining == ()


def test_other_files_come_along_but_not_the_record_of_an_earlier_repair(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "x.safetensors").write_bytes(b"of no shard")
    (source / RECORD).write_text("{}")
    plan = fix(source, "0.32.0")
    assert {"deep/er/x.safetensors", "tokenizer.json"} <= set(plan.copied)
    assert RECORD not in plan.copied and RECORD not in PlannedSource(plan).files
