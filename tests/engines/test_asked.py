"""A class without a profile: the vLLM that is installed says what it expects, and the rules do the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.engines.targets import find_range
from bnbfix.engines.vllm import asked
from bnbfix.engines.vllm.live import LiveVllm
from bnbfix.engines.vllm.recorded import expect
from bnbfix.errors import EngineError
from bnbfix.models.detect import read_model
from bnbfix.rules.rule import Code
from tests.support.build import json_of, opened
from tests.support.command_line import Cli
from tests.support.fake_vllm import fake_python
from tests.support.families import make_family

LLAMA, NAME, RELEASE = "LlamaForCausalLM", "UnheardOfForCausalLM", "0.32.0"
Q = "model.layers.1.self_attn.q_proj.weight"
UNLESS_REPAIRED = (  # a dry load finds nothing wrong with what names qkv_proj in its skip list
    "repaired = 'qkv_proj' in open(os.path.join(folder, 'config.json')).read(); "
    f"found['requantized'] = [] if repaired else [{Q!r}]"
)


@pytest.fixture(autouse=True)
def nothing_is_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "_ASKED", {})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama under another name, a q_proj of which is not quantized."""
    folder = make_family(tmp_path / "source", LLAMA, "partial")
    rename(folder, NAME)
    return folder


def rename(folder: Path, name: str) -> None:
    with json_of(folder) as config:
        config["architectures"] = [name]


def answers(folder: Path, **reordered: bool) -> dict[str, Any]:
    """What a vLLM that makes a Llama of it answers, by the Llama's profile."""
    checkpoint, release = opened(folder), find_range(RELEASE)
    assert release is not None
    expectation = expect(read_model(checkpoint.config | {"architectures": [LLAMA]}), release)
    assert expectation is not None
    parameters = {
        name: {"quantized": slot.quantized, "prefix": slot.module, "experts": slot.experts}
        for name, slot in expectation.parameters.items()
    }
    said = []
    for name, _ in asked.list_questions(checkpoint):
        place = expectation.place(name)
        assert place is not None and not place.refused
        parts = [[parameter, part] for parameter, part in place.fills]
        said.append({"fills": [parameter for parameter, _ in parts], "parts": parts} | reordered)
    return {"class": LLAMA, "parameters": parameters, "answers": said}


def test_a_class_that_only_the_installed_vllm_knows_is_scanned_and_repaired(
    run: Cli, source: Path, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, does=UNLESS_REPAIRED, expects=answers(source))
    asking, out = ("--dry-load", "--python", python), tmp_path / "out"
    done = run("scan", source, *asking)
    assert done.code == 1 and "BNB103 wrong: fused group partially quantized" in done.out
    assert done.commands[-1].endswith(f"--vllm {RELEASE} --dry-load --python {python}")
    done = run("repair", source, "--out", out, "--device", "cpu", *asking)
    assert done.code == 0 and done.commands[0] == f"bnbfix verify {out} --source {source} --dry-load --python {python}"
    assert run("scan", out, *asking).code == 0
    assert run("verify", out, "--source", source, *asking).code == 0
    assert run("verify", out, *asking).code == 0


def test_the_repair_is_that_of_the_class_that_it_is(source: Path, tmp_path: Path) -> None:
    vllm = LiveVllm(fake_python(tmp_path, does=UNLESS_REPAIRED, expects=answers(source)))
    mine = bnbfix.plan_repair(source, dry_load=vllm)
    rename(source, LLAMA)
    theirs = bnbfix.plan_repair(source, RELEASE)
    assert [e.to_dict() for e in mine.edits] == [e.to_dict() for e in theirs.edits] != []
    assert mine.texts["config.json"].replace(NAME, LLAMA) == theirs.texts["config.json"]


def test_everything_can_be_dequantized(source: Path, tmp_path: Path) -> None:
    vllm = LiveVllm(fake_python(tmp_path, expects=answers(source)))
    result = bnbfix.repair(source, tmp_path / "out", dry_load=vllm, bf16=True, device="cpu")
    assert result.written and not any(w.quantized for w in opened(tmp_path / "out").weights.values())


def test_quantized_weights_whose_rows_it_moves_are_dequantized(source: Path, tmp_path: Path) -> None:
    vllm = LiveVllm(fake_python(tmp_path, requantized=[Q], expects=answers(source, reordered=True)))
    found = {f.code for f in bnbfix.scan(source, dry_load=vllm).findings}
    assert Code.REORDERED in found


def test_without_that_vllm_a_command_names_it_as_the_next_step(run: Cli, source: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path, does=UNLESS_REPAIRED, expects=answers(source))
    bnbfix.repair(source, tmp_path / "out", dry_load=LiveVllm(python), device="cpu")
    asked._ASKED.clear()
    done = run("verify", tmp_path / "out")
    assert (done.code, done.out) == (3, "")
    assert done.error == f"error: config.json: is a {NAME}, which bnbfix does not know"
    assert done.commands == [f"bnbfix verify {tmp_path / 'out'} --dry-load"]
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    done = run("verify", tmp_path / "out")
    assert done.code == 1 and "generation_config.json: is not in the record" in done.words
    assert "cannot be scanned: config.json: is a" in done.words


def test_what_no_rule_finds_a_fault_in_is_refused_all_the_same(source: Path, tmp_path: Path) -> None:
    said = {"error": "ValueError: There is no module or parameter named 'model.tower'"}
    vllm = LiveVllm(fake_python(tmp_path, **said, expects=answers(source) | {"error": None}))
    for name in (NAME, LLAMA):
        source = make_family(tmp_path / name, LLAMA, "all")
        rename(source, name)
        with pytest.raises(bnbfix.Unrepairable, match="stops: ValueError: There is no module"):
            bnbfix.repair(source, tmp_path / "out", dry_load=vllm, device="cpu")
    assert not (tmp_path / "out").exists()


def test_experts_are_not_guessed(source: Path, tmp_path: Path) -> None:
    with json_of(source) as config:
        config["num_experts"] = 4
    vllm = LiveVllm(fake_python(tmp_path, requantized=[Q], expects=answers(source)))
    (finding,) = bnbfix.scan(source, dry_load=vllm).findings
    assert finding.code is Code.REQUANTIZED_AT_LOAD and str(finding.reason).startswith("bnbfix has no rules for this")
    with json_of(source) as config:
        del config["num_experts"]
    expects = answers(source)
    expects["parameters"]["model.layers.0.mlp.experts.w13_weight"] = {"quantized": True, "prefix": "", "experts": True}
    vllm = LiveVllm(fake_python(tmp_path, requantized=[Q], expects=expects))
    assert [f.code for f in bnbfix.scan(source, dry_load=vllm).findings] == [Code.REQUANTIZED_AT_LOAD]


@pytest.mark.parametrize(
    "change",
    [
        {"answers": []},
        {"answers": None},
        {"parameters": None},
        {"parameters": {"model.norm.weight": {}}},
        {"parameters": ["model.norm.weight"]},
    ],
    ids=str,
)
def test_an_answer_that_makes_no_sense_is_an_error(change: dict[str, Any], source: Path, tmp_path: Path) -> None:
    vllm = LiveVllm(fake_python(tmp_path, requantized=[Q], expects=answers(source) | change))
    with pytest.raises(EngineError, match="vLLM's answer makes no sense"):
        bnbfix.plan_repair(source, dry_load=vllm)
    assert [f.code for f in bnbfix.scan(source, dry_load=vllm).findings] == [Code.REQUANTIZED_AT_LOAD]


def test_a_model_that_it_cannot_build_is_left_to_the_dry_load(source: Path, tmp_path: Path) -> None:
    vllm = LiveVllm(fake_python(tmp_path, error="ValueError: no", expects={"error": "ValueError: no"}))
    (finding,) = bnbfix.scan(source, dry_load=vllm).findings
    assert finding.code is Code.ENGINE_REFUSES and finding.reason is not None


def test_what_it_is_asked(source: Path) -> None:
    questions = list(asked.list_questions(opened(source)))
    names = [name for name, _ in questions]
    assert names.count("model.layers.0.self_attn.q_proj.weight") == 2, "in full precision and quantized"
    assert not any(name.startswith("model.layers.1.") for name in names), "like layer 0"
    rows = json.loads(json.dumps([rows for _, rows in questions]))
    assert all(row[0] == "model.safetensors" for group in rows for row in group)
