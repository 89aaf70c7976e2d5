"""`bnbfix.check_before_upload`: what it raises, what it returns, and what it leaves to others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bnbfix
from bnbfix.errors import BnbfixError
from tests.support.build import Make
from tests.support.command_line import install_vllm


def test_a_check_before_upload_raises_with_the_findings(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    with pytest.raises(bnbfix.FindingsRemain) as caught:
        bnbfix.check_before_upload(source, "portable")
    e = caught.value
    assert e.exit_code == 1 and isinstance(e, BnbfixError)
    assert e.findings == tuple(f for f in bnbfix.scan(source, "portable").findings if f.counts)
    titles = [f"{c} {bnbfix.Code(c).explanation.title}" for c in ("BNB102", "BNB103", "BNB104")]
    words = f"{titles[0]} (16 tensors), {titles[1]} (5 tensors), {titles[2]} (2 tensors)"
    assert str(e) == f"{source}: is not fit for every vLLM release: {words}"
    assert e.command == f"bnbfix repair {source} --out {source}-repaired --vllm portable"


def test_a_check_before_upload_proposes_no_repair_where_there_is_none(pristine: Make) -> None:
    source = pristine("moe26b", "all")
    with pytest.raises(bnbfix.FindingsRemain) as caught:
        bnbfix.check_before_upload(source, "0.22.1")
    assert caught.value.command == f"bnbfix scan {source} --vllm 0.22.1"
    assert "is not fit for vLLM 0.22.1: " in str(caught.value) and "BNB401" in str(caught.value)


def test_a_check_before_upload_returns_the_scan_of_what_loads(pristine: Make) -> None:
    source = pristine("e4b", "all", shards=2)
    assert bnbfix.check_before_upload(source, "0.32.0") == bnbfix.scan(source, "0.32.0")


def test_a_check_before_upload_does_not_hold_the_machine_against_the_checkpoint(
    pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm(monkeypatch, "0.32.0")
    source = pristine("e4b", "all", shards=2)
    assert not bnbfix.scan(source).ok and bnbfix.check_before_upload(source) is not None


def test_a_check_before_upload_passes_what_is_not_its_business(pristine: Make, tmp_path: Path) -> None:
    assert bnbfix.check_before_upload(pristine("dense31b", "bf16"), "portable") is None
    for name, files in {
        "empty": {},
        "no weights": {"config.json": "{"},
        "no config": {"x.safetensors": ""},
        "adapter": {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
        "below": {"config.json": "{", "unet/model.safetensors": ""},
    }.items():
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        (tmp_path / name).mkdir(exist_ok=True)
        assert bnbfix.check_before_upload(tmp_path / name, "portable") is None


def test_a_check_before_upload_refuses_quantized_weights_without_quantization_config(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(bnbfix.FindingsRemain, match="BNB307"):
        bnbfix.check_before_upload(source, "portable")
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(bnbfix.NotApplicable, match="quantized with gptq, not bitsandbytes"):
        bnbfix.check_before_upload(source, "portable")
    config["architectures"] = ["MambaForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    assert bnbfix.check_before_upload(source, "portable") is None


def test_a_check_before_upload_raises_what_a_scan_raises(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "all")
    (source / "config.json").write_text("{")
    with pytest.raises(bnbfix.InputError, match="is not valid JSON"):
        bnbfix.check_before_upload(source, "portable")
    with pytest.raises(bnbfix.UsageError, match="no such folder"):
        bnbfix.check_before_upload(tmp_path / "nowhere", "portable")
    with pytest.raises(bnbfix.UsageError, match=r"0\.1\.0"):
        bnbfix.check_before_upload(source, "0.1.0")
