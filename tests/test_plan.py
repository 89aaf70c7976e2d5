"""A plan to the byte: where every tensor of the output lies, the texts beside it, what is copied, what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from build import (
    SHARD,
    planned,
    read_tensors,
)
from conftest import Make

from bnbfix.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from bnbfix.gemma4 import canonical
from bnbfix.layout import Copy, Dequantize, Quantize, TensorPlan
from bnbfix.plan import Options, Plan, PlannedSource, plan_checkpoint
from bnbfix.safetensors_header import DTYPE_BITS, LENGTH_BYTES, parse_header
from bnbfix.source import LocalSource
from bnbfix.vllm_releases import resolve_target

L = "model.language_model.layers."
TARGETS = ("0.22.1", "0.27.1", "0.32.0", "portable")
REFUSED = {("unified12b", "0.22.1"), ("moe26b", "0.22.1"), ("moe26b", "portable")}
KINDS = [
    *((family, quant, 1) for family in ("dense31b", "text") for quant in ("all", "ragged", "single", "storage-bf16")),
    *((family, "ragged", 3) for family in ("dense31b", "e4b", "e4b-noshared", "e2b", "unified12b", "moe26b")),
    ("e4b-noshared", "all", 1), ("unified12b", "all", 7), ("moe26b", "all", 1),
]  # fmt: skip
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
def test_tensors_lie_one_after_the_other_each_at_a_multiple_of_its_element_size(
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
                assert [replace(t.info, begin=0, end=0) for t in run] == [
                    replace(info, begin=0, end=0) for info in run[0].op.infos()
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


@pytest.mark.parametrize(
    ("family", "quant", "target", "options"),
    [
        ("dense31b", "ragged", "portable", {}),
        ("e4b-noshared", "all", "0.22.1", {}),
        ("moe26b", "fp4", "0.27.1", {}),
        ("unified12b", "storage-bf16", "0.32.0", {}),
        ("dense31b", "ragged", "0.32.0", {"ragged": "quantize"}),
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
        plans = [plan_repair(p, "0.27.1", ragged=r) for p in sys.argv[1:] for r in ("dequantize", "quantize")]
        print([(p.edits, p.shards, p.texts, p.copied, p.remaining) for p in plans])"""
    sources = [str(pristine(family, "ragged", shards=3)) for family in ("dense31b", "e4b-noshared")]
    said = {
        subprocess.run(
            [sys.executable, "-c", code, *sources], capture_output=True, text=True, check=True, timeout=60,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1 and "Dequantize" in said.pop()


@pytest.mark.parametrize("family", ["dense31b", "e4b-noshared", "moe26b", "unified12b"])
@pytest.mark.parametrize("shards", [3, 17])
def test_the_number_of_shards_changes_neither_edits_nor_tensors(family: str, shards: int, pristine: Make) -> None:
    target = "0.27.1"
    one, many = (planned(pristine(family, "ragged", shards=n), target) for n in (1, shards))
    assert many.edits == one.edits
    assert many.texts[CONFIG] == one.texts[CONFIG]
    a, b = ({n: (t.info.dtype, t.info.shape, type(t.op)) for n, t in made(p).items()} for p in (one, many))
    assert a == b
    assert {s.name for s in many.shards} == set(many.checkpoint.shards) and len(many.shards) > 2


def test_siblings_in_another_shard_are_read_there_and_dropped_there(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "ragged", shards=17), "portable")
    dequantized = [t for t in made(plan).values() if isinstance(t.op, Dequantize)]
    parted = {
        s.info.name: s.shard
        for t in dequantized for w in t.op.weights for s in w.siblings.values() if s.shard != w.tensor.shard
    }  # fmt: skip
    assert parted, "some of what is dequantized has its quant state elsewhere"
    for name, shard in parted.items():
        assert name in plan.checkpoint.shards[shard].tensors
        assert name not in made(plan)
        assert not next(s for s in plan.shards if s.name == shard).copied


def test_a_copy_and_all_its_siblings_lie_in_the_shard_of_its_donor(pristine: Make) -> None:
    plan = planned(pristine("dense31b", "skip", shards=17), "0.22.1")
    shard_of = {t.info.name: shard.name for shard in plan.shards for t in shard.tensors}
    scattered = 0
    for layer in (2, 5):
        k, v = (f"{L}{layer}.self_attn.{part}_proj.weight" for part in "kv")
        weight = plan.checkpoint.weights[k]
        assert {shard_of[n] for n in (v, *(v + suffix for suffix in weight.siblings))} == {weight.tensor.shard}
        scattered += len({s.shard for s in weight.siblings.values()} | {weight.tensor.shard}) > 1
    touched = {shard.name for shard in plan.shards if not shard.copied}
    assert touched == {plan.checkpoint.weights[f"{L}{n}.self_attn.k_proj.weight"].tensor.shard for n in (2, 5)}
    assert len(touched) < len(plan.shards), "and the others are copied as they are"


def test_a_repair_of_the_config_alone_copies_every_shard(pristine: Make) -> None:
    source = pristine("dense31b", "skip", shards=3)
    plan = planned(source, "0.32.0")
    assert {e.action for e in plan.edits} == {"config"}
    assert all(s.copied for s in plan.shards) and INDEX in plan.copied and set(plan.texts) == {CONFIG}
    whole = sum(p.stat().st_size for p in source.iterdir()) - (source / CONFIG).stat().st_size
    assert plan.bytes_read == whole
    assert plan.bytes_written == whole + len(plan.texts[CONFIG].encode())


def test_bytes_read_are_those_of_every_tensor_once_and_of_copies_again(pristine: Make) -> None:
    source = pristine("dense31b", "all")
    plan = planned(source, "0.22.1")
    tensors = read_tensors(source / SHARD)
    copies = [n for n in tensors for layer in (2, 5) if n.startswith(f"{L}{layer}.self_attn.k_proj.")]
    assert {e.action for e in plan.edits} == {"dequantize", "insert", "config"} and len(copies) == 12
    others = sum(p.stat().st_size for p in source.iterdir() if p.name not in (SHARD, CONFIG))
    data = sum(len(t.data) for t in tensors.values()) + sum(len(tensors[n].data) for n in copies)
    assert plan.bytes_read == others + data
    assert plan.bytes_written == sum(PlannedSource(plan).files.values())


@pytest.mark.parametrize("family", ["dense31b", "e4b-noshared", "unified12b"])
@pytest.mark.parametrize("quant", ["all", "ragged"])
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


def test_a_text_only_checkpoint_is_mended_under_its_own_names(pristine: Make) -> None:
    plan = planned(pristine("text", "ragged"), "portable")
    assert all(n.startswith("model.") and "language_model" not in n for n in made(plan))
    assert list(after(plan).skip_modules)[-11:] == [
        "model.layers.1.self_attn.qkv_proj", "model.layers.2.self_attn.qkv_proj", "model.layers.3.mlp.gate_up_proj",
        "model.layers.5.self_attn.qkv_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj",
        "model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.q_proj", "model.layers.3.mlp.up_proj",
        "model.layers.5.self_attn.k_proj", "model.layers.5.self_attn.q_proj",
    ]  # fmt: skip
