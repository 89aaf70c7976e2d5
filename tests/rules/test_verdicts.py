"""What scan says of every kind of checkpoint for three releases, as the real engines of these releases showed it.

Measured with vLLM 0.22.1, 0.27.1 and 0.32.0 (CPU builds) on the checkpoints that examples/tiny_gemma4.py makes;
tests/conformance measures it again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make, scan

RELEASES = ("0.22.1", "0.27.1", "0.32.0")
F, W, L = "fails", "wrong", "loads"
# family: quantization: verdict for each of RELEASES
MEASURED = {
    "dense31b": {
        "all": (F, L, L),
        "skip": (F, F, W),
        "mixed": (F, F, W),
        "partial": (F, F, W),
        "fp4": (F, F, W),
        "single": (F, F, W),
        "storage-bf16": (F, F, F),
        "int8": (F, F, F),
    },
    "e4b": {
        "all": (F, L, L),
        "skip": (L, F, W),
        "mixed": (F, F, W),
        "partial": (F, F, W),
        "fp4": (L, F, W),
        "single": (L, F, W),
        "storage-bf16": (F, F, F),
        "int8": (L, F, F),
    },
    "e4b-noshared": {
        "all": (F, F, L),
        "skip": (F, F, W),
        "mixed": (F, F, W),
        "partial": (F, F, W),
        "fp4": (F, F, W),
        "single": (F, F, W),
    },
    "e2b": {
        "all": (F, L, L),
        "skip": (L, F, W),
        "mixed": (F, F, W),
        "partial": (F, F, W),
        "fp4": (L, F, W),
        "single": (L, F, W),
    },
    "moe26b": {
        "all": (F, F, F),
        "skip": (F, F, F),
        "mixed": (F, F, F),
        "partial": (F, F, F),
        "fp4": (F, F, F),
        "single": (F, F, F),
        "storage-bf16": (F, F, F),
        "int8": (F, F, F),
    },
    "unified12b": {
        "all": (F, F, F),
        "skip": (F, F, W),
        "mixed": (F, F, W),
        "partial": (F, F, W),
        "fp4": (F, F, W),
        "single": (F, F, W),
        "storage-bf16": (F, F, F),
        "int8": (F, F, F),
    },
}
CELLS = [
    (family, quant, release, verdict)
    for family, quants in MEASURED.items()
    for quant, verdicts in quants.items()
    for release, verdict in zip(RELEASES, verdicts, strict=True)
]


@pytest.mark.parametrize(("family", "quant", "release", "verdict"), CELLS)
def test_scan_says_what_the_engine_does(family: str, quant: str, release: str, verdict: str, pristine: Make) -> None:
    assert scan(pristine(family, quant), release).verdict == verdict


@pytest.mark.parametrize("family", [f for f in MEASURED if f != "moe26b"])
@pytest.mark.parametrize("quant", ["all", "partial", "storage-bf16", "single"])
@pytest.mark.parametrize("target", [*RELEASES, "portable"])
def test_a_repaired_checkpoint_scans_clean_and_a_second_repair_has_nothing_to_do(
    family: str, quant: str, target: str, pristine: Make, tmp_path: Path
) -> None:
    if family == "unified12b" and target == "0.22.1":
        with pytest.raises(bnbfix.Unrepairable, match="Generation is unknown to the release"):
            bnbfix.plan_repair(pristine(family, quant), target)
        return
    result = bnbfix.repair(pristine(family, quant), tmp_path / "out", target)
    out = result.out or pristine(family, quant)
    assert scan(out, target).ok
    assert bnbfix.plan_repair(out, target).nothing_to_do
    assert not any(e.action == "quantize" for e in result.plan.edits)


@pytest.mark.parametrize("quant", ["all", "fp4", "single", "int8", "storage-bf16"])
@pytest.mark.parametrize("family", ["dense31b", "e4b-noshared", "moe26b", "unified12b"])
def test_bf16_leaves_nothing_quantized_and_verifies(family: str, quant: str, pristine: Make, tmp_path: Path) -> None:
    source, out = pristine(family, quant), tmp_path / "out"
    result = bnbfix.repair(source, out, "0.27.1", bf16=True, max_shard_size=400_000)
    assert len(result.plan.shards) > 1
    for shard in result.plan.shards:
        assert len(shard.tensors) == 1 or sum(t.info.nbytes for t in shard.tensors) <= 400_000
    verified = bnbfix.verify(out, source)
    assert verified.ok and verified.decoded > 0
    with pytest.raises(bnbfix.NotApplicable, match="unquantized"):
        bnbfix.scan(out)


@pytest.mark.parametrize(("release", "prefix"), [("0.27.1", "moe.experts"), ("0.32.0", "experts")])
@pytest.mark.parametrize("quant", ["all", "single", "fp4"])
def test_experts_are_split_under_the_prefix_of_the_release_and_joined_again(
    release: str, prefix: str, quant: str, pristine: Make, tmp_path: Path
) -> None:
    source, split, full = pristine("moe26b", quant), tmp_path / "split", tmp_path / "full"
    result = bnbfix.repair(source, split, release)
    names = {t.info.name for s in result.plan.shards for t in s.tensors}
    assert f"model.language_model.layers.0.{prefix}.3.gate_proj.weight" in names
    assert not any("gate_up_proj" in n for n in names)
    assert bnbfix.verify(split, source).ok
    assert scan(split, release).ok
    other = "0.32.0" if release == "0.27.1" else "0.27.1"
    assert "BNB403" in {f.code.value for f in scan(split, other).findings if f.counts}
    renamed = bnbfix.plan_repair(split, other)
    assert {e.action for e in renamed.edits} == {"rename"}
    joined = bnbfix.repair(split, full, release, bf16=True)
    shapes = {t.info.name: t.info.shape for s in joined.plan.shards for t in s.tensors}
    assert shapes["model.language_model.layers.0.experts.gate_up_proj"] == (4, 128, 128)
    assert bnbfix.verify(full, split).ok


def test_a_mixture_of_experts_has_no_portable_form(pristine: Make) -> None:
    with pytest.raises(bnbfix.Unrepairable, match="BNB401"):
        bnbfix.plan_repair(pristine("moe26b", "skip"), "portable")


@pytest.mark.parametrize("target", [*RELEASES, "portable"])
def test_partial_groups_quantize_quantizes_the_unquantized_members(target: str, pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("e4b", "partial"), tmp_path / "out"
    result = bnbfix.repair(source, out, target, partial_groups="quantize")
    quantized = {e.name for e in result.plan.edits if e.action == "quantize"}
    assert quantized == {
        "model.language_model.layers.1.self_attn.q_proj.weight",
        "model.language_model.layers.3.mlp.gate_proj.weight",
    }
    assert not any(e.action == "dequantize" for e in result.plan.edits)
    assert bnbfix.verify(out, source).ok
    assert scan(out, target).ok


@pytest.mark.parametrize("family", ["dense31b", "e4b", "unified12b"])
def test_the_newer_config_form_is_written_in_the_older_where_it_is_not_read(
    family: str, pristine: Make, tmp_path: Path
) -> None:
    source = pristine(family, "all", per_layer_config=True)
    assert "BNB302" not in {f.code.value for f in scan(source, "0.32.0").findings}
    assert "BNB302" in {f.code.value for f in scan(source, "0.27.1").findings}
    result = bnbfix.repair(source, tmp_path / "out", "portable")
    text = result.plan.texts["config.json"]
    assert "per_layer_config" not in text and "axial" not in text
    assert '"global_head_dim": 64' in text
    assert scan(tmp_path / "out").ok


def test_no_finding_is_worse_than_its_explanation_says(pristine: Make) -> None:
    seen = {}
    for family, quants in MEASURED.items():
        for quant in quants:
            for f in scan(pristine(family, quant), "portable").findings:
                assert f.severity <= f.code.explanation.severity, f
                seen[f.code] = max(seen.get(f.code, f.severity), f.severity)
    assert sum(seen[code] == code.explanation.severity for code in seen) > 8, "and as bad as it says"
