"""Names in a checkpoint never act on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make
from tests.support.command_line import EVIL, Cli, harmless, process
from tests.support.folders import hostile, rename


def test_control_characters_of_a_checkpoint_never_reach_the_terminal(
    run: Cli, checkpoint: Make, tmp_path: Path
) -> None:
    source = hostile(checkpoint("dense31b", "skip"))
    shown = []
    for arguments in (
        ["scan", source, "--vllm", "portable"],
        ["scan", source, "--vllm", "portable", "--verbose"],
        ["scan", source, "--vllm", "portable", "--format", "json"],
        ["repair", source, "--vllm", "portable", "--dry-run"],
        ["repair", source, "--vllm", "portable", "--dry-run", "--format", "json"],
        ["repair", source, "--vllm", "portable", "--out", tmp_path / "out"],
    ):
        done = run(*arguments)
        assert done.code in (0, 1)
        assert harmless(done.out) and harmless(done.err), arguments
        shown.append("".join(done.out.split()))
    assert r"model.vision_tower.\x1b[31m\x07\r\x7f\x9b2J\u202e.weight" in shown[1]
    assert bnbfix.scan(source, "portable").findings  # and the API hands names out as they are
    name = f"model.vision_tower.{EVIL}.weight"
    assert any(name in f.tensors for f in bnbfix.scan(source, "portable").findings)


def test_names_are_shown_as_they_are_and_not_taken_for_markup(run: Cli, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    name = "model.vision_tower.[red]x[/].:smile:.weight"
    rename(source / "model.safetensors", {"model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight": name})
    folder = source.rename(tmp_path / "[bold]models")
    done = run("scan", folder, "--vllm", "portable", "--verbose")
    assert done.code == 1 and done.err == ""
    flat = "".join(done.out.split())
    assert name in flat and flat.startswith(str(folder))
    done = run("scan", tmp_path / "[red]nowhere[/]")
    assert done.err.startswith(f"error: {tmp_path}/[red]nowhere[/]: no such folder\n")


def test_an_ascii_terminal_gets_ascii(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("dense31b", "skip")
    names = {"model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight": "model.vision_tower.\u4e2d.weight"}
    rename(source / "model.safetensors", names)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for format in ("json", "table"):
        done = process("scan", source, "--vllm", "portable", "--verbose", "--format", format)
        assert (done.code, done.err) == (1, "") and done.out.isascii(), format
        assert r"model.vision_tower.\u4e2d.weight" in done.out


@pytest.mark.parametrize("place", ["architecture", "method", "shard", "tensor", "folder", "state"])
def test_control_characters_in_errors_never_reach_the_terminal(
    run: Cli, checkpoint: Make, tmp_path: Path, place: str
) -> None:
    source = checkpoint("dense31b", "single", shards=2)
    config, index = source / "config.json", source / "model.safetensors.index.json"
    doc = json.loads((index if place == "shard" else config).read_text())
    if place == "architecture":
        doc["architectures"] = [EVIL]
    elif place == "method":
        doc["quantization_config"]["quant_method"] = EVIL
    elif place == "shard":
        doc["weight_map"]["x"] = f"{EVIL}.safetensors"
    elif place == "tensor":
        rename(source / "model-00001-of-00002.safetensors", {"model.language_model.norm.weight": "x"})
        shard = source / "model-00001-of-00002.safetensors"
        rename(shard, {"model.language_model.embed_tokens.weight": f"{EVIL}.quant_state.bitsandbytes__nf4"})
        shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"EVIL"', 1))
    elif place == "folder":
        source = tmp_path / EVIL
    else:
        shard = source / "model-00001-of-00002.safetensors"
        data = shard.read_bytes()
        at = data.index(b'"quant_type": "nf4"')
        spoilt = '"quant_type": "\x9b1"'.encode()
        assert len(spoilt) == len(b'"quant_type": "nf4"')
        shard.write_bytes(data[:at] + spoilt + data[at + len(spoilt) :])
    if place in ("architecture", "method", "shard"):
        (index if place == "shard" else config).write_text(json.dumps(doc))
    done = run("scan", source, "--vllm", "portable")
    assert done.code in (2, 3) and done.err.startswith("error: ")
    assert harmless(done.err) and harmless(done.out)


def test_control_characters_in_file_names_of_an_output_never_reach_the_terminal(
    run: Cli, pristine: Make, tmp_path: Path
) -> None:
    assert run("repair", pristine("dense31b", "skip"), "--vllm", "portable", "--out", tmp_path / "out").code == 0
    (tmp_path / "out" / f"{EVIL}.txt").touch()
    done = run("verify", tmp_path / "out")
    assert done.code == 1 and harmless(done.out)
    assert r"\x1b[31m\x07\r\x7f\x9b2J\u202e.txt: is not in the record" in done.words
