"""What config.json and the weights say against each other, and what a repair writes about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.checkpoint import checkpoint as checkpoints
from bnbfix.checkpoint.checkpoint import CONFIG, open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.targets import resolve_target
from bnbfix.models.inspection import inspect_checkpoint
from bnbfix.planner.plan import Plan
from bnbfix.planner.plan_repair import plan_checkpoint
from bnbfix.rules.rule import Code, Severity
from tests.support.build import Make, Raw, copy_weight, dequantize_weight, json_of, scan, tensors_of, zeros

HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"


def plan(source: Path, target: str) -> Plan:
    return plan_checkpoint(LocalSource.open(source), resolve_target(target))


def written(made: Plan) -> Any:
    return json.loads(made.texts[CONFIG])


def add_lm_head(source: Path, **changes: Any) -> None:
    """An lm_head next to tied embeddings: a copy of them, or with other bytes."""
    with tensors_of(source) as tensors:
        embeddings = tensors[EMBEDDINGS]
        tensors[HEAD] = Raw(
            **({"dtype": embeddings.dtype, "shape": embeddings.shape, "data": embeddings.data} | changes)
        )


def verdicts(source: Path) -> dict[str, Severity]:
    return {v.release.first: v.verdict for v in scan(source).releases}


# lm_head next to tied embeddings


def test_an_lm_head_that_differs_is_wrong_where_it_is_ignored_and_used_after_a_repair(checkpoint: Make) -> None:
    source = checkpoint("text", "all")
    with tensors_of(source) as tensors:
        embeddings = tensors["model.embed_tokens.weight"]
        tensors[HEAD] = Raw(embeddings.dtype, embeddings.shape, embeddings.data[:-1] + b"\x01")
    before = verdicts(source)
    assert before["0.28.0"] == Severity.WRONG, "one byte, the last one, is enough"
    assert before["0.29.0"] == before["0.32.0"] == Severity.LOADS
    made = plan(source, "0.27.1")
    assert [(e.name, e.code, e.detail) for e in made.edits] == [("tie_word_embeddings", Code.TIED_LM_HEAD, "false")]
    assert plan(source, "0.32.0").nothing_to_do


def test_both_levels_of_a_multimodal_config_are_untied(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "all")
    add_lm_head(source, data=bytes(len(tensor_data(source))))
    result = bnbfix.repair(source, tmp_path / "out", "0.27.1")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert {str(e.action) for e in result.plan.edits} == {"config"}, "no tensor changes"
    assert scan(tmp_path / "out", "0.27.1").verdict == Severity.LOADS


def tensor_data(source: Path) -> bytes:
    with tensors_of(source) as tensors:
        return tensors[EMBEDDINGS].data


@pytest.mark.parametrize(
    ("changes", "severity"),
    [
        ({}, Severity.NOTE),
        ({"dtype": "F32", "data": bytes(4 * 512 * 128)}, Severity.NOTE),
        ({"shape": (512, 64), "data": bytes(2 * 512 * 64)}, Severity.WRONG),
    ],
    ids=["a copy", "another dtype", "another shape"],
)
def test_what_the_comparison_comes_to(changes: dict[str, Any], severity: Severity, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        assert tensors[EMBEDDINGS].shape == (512, 128)
    add_lm_head(source, **changes)
    assert [f.severity for f in scan(source, "0.27.1").findings if f.code is Code.TIED_LM_HEAD] == [severity]


def test_a_quantized_lm_head_is_left_alone_where_it_is_ignored(checkpoint: Make) -> None:
    source = checkpoint("text", "all")
    with tensors_of(source) as tensors:
        copy_weight(tensors, "model.layers.1.mlp.up_proj.weight", HEAD)
        tensors["model.embed_tokens.weight"] = zeros(256, 128)
    with json_of(source) as config:
        config["vocab_size"] = 256
    assert plan(source, "0.28.0").nothing_to_do and scan(source, "0.28.0").ok
    for target in ("0.29.0", "portable"):
        edits = {(e.name, e.code) for e in plan(source, target).edits}
        assert {(HEAD, Code.QUANTIZED_LM_HEAD), ("tie_word_embeddings", Code.TIED_LM_HEAD)} <= edits


@pytest.mark.parametrize("target", ["0.27.1", "0.32.0", "portable"])
def test_embeddings_that_are_dequantized_are_another_weight_than_lm_head(target: str, checkpoint: Make) -> None:
    source = checkpoint("text", "all")
    with tensors_of(source) as tensors:
        del tensors["model.embed_tokens.weight"]
        copy_weight(tensors, "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight")
        tensors[HEAD] = zeros(256, 128)
    with json_of(source) as config:
        config["vocab_size"] = 256
    made = plan(source, target)
    assert {"model.embed_tokens.weight", "tie_word_embeddings"} <= {e.name for e in made.edits}


@dataclass(frozen=True)
class Remote(LocalSource):
    """A folder that says that it is a repo, and how much is read of it."""

    seen: list[int] = field(default_factory=list)

    @property
    def origin(self) -> Any:
        return {"repo": "org/name", "revision": "0" * 40}

    def read(self, file: str, ranges: Any) -> list[bytes]:
        self.seen.extend(length for _, length in ranges)
        return super().read(file, ranges)


@pytest.mark.parametrize(("at", "same"), [(None, None), (0, False), (-1, None)])
def test_of_a_repo_only_the_beginning_is_compared(
    at: int | None, same: bool | None, checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("dense31b", "all")
    data = bytearray(tensor_data(source))
    if at is not None:
        data[at] ^= 1
    add_lm_head(source, data=bytes(data))
    monkeypatch.setattr(checkpoints, "COMPARED_CHUNK", 1000)
    local = open_checkpoint(LocalSource.open(source))
    assert inspect_checkpoint(local).lm_head_is_copy is (at is None), "of a folder, all is"
    remote = Remote(source, LocalSource.open(source).stats)
    inspection = inspect_checkpoint(open_checkpoint(remote))
    remote.seen.clear()
    assert inspection.lm_head_is_copy is same
    assert remote.seen == [1000, 1000]


# quantization_config


def missing(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def empty(config: dict[str, Any]) -> None:
    config["quantization_config"] = {}


def in_text_config(config: dict[str, Any]) -> None:
    config["text_config"]["quantization_config"] = config.pop("quantization_config")


def no_method(config: dict[str, Any]) -> None:
    del config["quantization_config"]["quant_method"]


def eight_bits(config: dict[str, Any]) -> None:
    config["quantization_config"] |= {"load_in_8bit": True, "load_in_4bit": False}


@pytest.mark.parametrize("change", [missing, empty, in_text_config, no_method, eight_bits])
@pytest.mark.parametrize("quant", ["all", "skip", "single"])
def test_a_quantization_config_that_vllm_does_not_see_is_put_right(
    change: Any, quant: str, checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("dense31b", quant)
    with json_of(source) as config:
        right = dict(config["quantization_config"])
        change(config)
    assert {v.verdict for v in scan(source).releases} == {Severity.FAILS}
    result = bnbfix.repair(source, tmp_path / "out", "0.32.0", device="cpu")
    assert result.written and scan(tmp_path / "out", "0.32.0").ok
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    quantization = config["quantization_config"]
    same = ("quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    assert {k: quantization[k] for k in same} == {k: right[k] for k in same}
    assert not quantization.get("load_in_8bit") and "quantization_config" not in config["text_config"]
    assert bnbfix.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("change", [missing, in_text_config, no_method, eight_bits])
def test_bf16_removes_it_from_wherever_it_is(change: Any, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "all")
    with json_of(source) as config:
        change(config)
    bnbfix.repair(source, tmp_path / "out", "0.32.0", bf16=True, device="cpu")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert "quantization_config" not in config and "quantization_config" not in config["text_config"]
    assert bnbfix.verify(tmp_path / "out", source).ok


def test_int8_weights_under_a_config_that_says_4_bits(checkpoint: Make) -> None:
    source = checkpoint("e4b", "int8")
    with json_of(source) as config:
        config["quantization_config"] |= {"load_in_8bit": False, "load_in_4bit": True}
    (found,) = [f for f in scan(source, "0.22.1").findings if f.code is Code.QUANTIZATION_CONFIG]
    assert found.message == "config.json says load_in_4bit, but the weights are quantized to 8 bits"
    quantization = written(plan(source, "0.22.1"))["quantization_config"]
    assert quantization["load_in_8bit"] is True and quantization["load_in_4bit"] is False


def test_an_unquantized_model_without_a_quant_method_has_nothing_to_check(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "bf16")
    with json_of(source) as config:
        config["quantization_config"] = {"load_in_4bit": True}
    with pytest.raises(bnbfix.NotApplicable, match="is an unquantized Gemma4ForConditionalGeneration"):
        bnbfix.scan(source)


# A text-only class over a multimodal config


@pytest.mark.parametrize("quant", ["all", "skip"])
def test_towers_do_not_count_under_the_text_only_class(quant: str, checkpoint: Make) -> None:
    source = checkpoint("e4b", quant)
    with json_of(source) as config:
        config["architectures"] = ["Gemma4ForCausalLM"]
    assert verdicts(source)["0.27.0"] == Severity.LOADS, "whatever the towers are"
    (found,) = [f for f in scan(source, "0.27.1").findings if f.code is Code.OTHER_CLASS]
    assert found.reason == "to serve images, set architectures to Gemma4ForConditionalGeneration"


def test_the_newer_form_of_its_config_is_written_where_the_text_config_is(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all", per_layer_config=True)
    with json_of(source) as config:
        config["architectures"] = ["Gemma4ForCausalLM"]
    config = written(plan(source, "0.27.1"))
    assert "per_layer_config" not in config["text_config"] and "global_head_dim" in config["text_config"]
    assert "global_head_dim" not in config


def test_an_older_prefix_changes_nothing(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all", prefix="language_model.model.")
    with tensors_of(source) as tensors:
        tensors["language_model.lm_head.weight"] = zeros(512, 128)
    assert scan(source, "0.27.1").verdict == Severity.WRONG


def test_a_model_whose_weights_were_merged_loses_a_config_that_is_inside_text_config(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        for name in [n for n in tensors if f"{n}.absmax" in tensors]:
            dequantize_weight(tensors, name)
    with json_of(source) as config:
        in_text_config(config)
    config = written(plan(source, "0.32.0"))
    assert "quantization_config" not in config and "quantization_config" not in config["text_config"]


# Gemma4Unified and float16


@pytest.mark.parametrize("said", [False, True], ids=["missing", "null"])
def test_num_soft_tokens_is_the_number_that_transformers_reads(said: bool, checkpoint: Make) -> None:
    source = checkpoint("unified12b", "all")
    with json_of(source) as config:
        vision = config["vision_config"]
        del vision["num_soft_tokens"]
        vision["default_output_length"] = 77
        if said:
            vision["num_soft_tokens"] = None
    (found,) = [f for f in scan(source, "0.32.0").findings if f.code is Code.SOFT_TOKENS]
    assert found.reason is None
    made = plan(source, "0.32.0")
    assert written(made)["vision_config"]["num_soft_tokens"] == 77
    edits = [(e.name, e.detail) for e in made.edits if e.code is Code.SOFT_TOKENS]
    assert edits == [("vision_config.num_soft_tokens", "77")]


def test_float16_does_not_count_where_only_text_is_served(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with json_of(source) as config:
        config["dtype"] = "float16"
        config["vision_config"]["standardize"] = True
    assert Code.FLOAT16 in {f.code for f in scan(source, "0.27.1").findings}
    with json_of(source) as config:
        config["architectures"] = ["Gemma4ForCausalLM"]
    assert Code.FLOAT16 not in {f.code for f in scan(source, "0.27.1").findings}
