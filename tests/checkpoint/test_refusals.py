"""What is not a checkpoint that bnbfix can repair is called by its name, with the next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make, json_of
from tests.support.command_line import Cli

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 32169626\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("command", ["scan", "repair"])
def test_a_git_lfs_pointer(run: Cli, checkpoint: Make, tmp_path: Path, name: str, command: str) -> None:
    source = checkpoint("dense31b", "skip")
    (source / name).write_text(POINTER)
    done = run(command, source, *(["--out", tmp_path / "out"] if command == "repair" else []))
    assert done.code == 2 and f"error: {name}: is a Git LFS pointer, not the file itself\n" in done.err
    assert "git lfs pull" in done.err and not (tmp_path / "out").exists()


def test_a_git_lfs_pointer_that_a_repair_would_copy(run: Cli, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    (source / "tokenizer.json").write_text(POINTER)
    assert run("scan", source, "--vllm", "0.32.0").code == 1, "the weights are there"
    done = run("repair", source, "--vllm", "0.32.0", "--out", tmp_path / "out")
    assert done.code == 2 and done.err.startswith("error: tokenizer.json: is a Git LFS pointer")


@pytest.mark.parametrize("inside", ["checkpoint-500", "snapshots/0123abcd"])
def test_a_folder_whose_subfolder_is_the_model(run: Cli, pristine: Make, tmp_path: Path, inside: str) -> None:
    shutil.copytree(pristine("text", "all"), tmp_path / "parent" / inside)
    done = run("scan", tmp_path / "parent")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: config.json: is missing")
    assert done.err.splitlines()[1] == f"  Is it one of these? {tmp_path / 'parent' / inside}"


def test_checkpoints_of_a_trainer_are_listed_in_their_order(run: Cli, pristine: Make, tmp_path: Path) -> None:
    for step in (1000, 50, 500):
        shutil.copytree(pristine("text", "all"), tmp_path / f"checkpoint-{step}")
    hint = run("scan", tmp_path).err.splitlines()[1]
    assert [part.rsplit("-", 1)[1] for part in hint.split(", ")] == ["50", "500", "1000"]


def test_half_of_the_shards_without_an_index(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=3)
    (source / "model.safetensors.index.json").unlink()
    assert run("scan", source, "--vllm", "0.32.0").code == 1, "all are there"
    (source / "model-00002-of-00003.safetensors").unlink()
    done = run("scan", source)
    assert done.code == 2 and "shard model-00002-of-00003.safetensors is missing" in done.err


def test_numbers_that_make_no_sense_are_no_reason_to_count_for_ever(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    (source / "model.safetensors").rename(source / "model-00001-of-99999.safetensors")
    assert run("scan", source, "--vllm", "0.32.0").code == 1


@pytest.mark.parametrize("keys", [("quantization",), ("quantization", "quantization_config")])
def test_an_mlx_checkpoint(run: Cli, checkpoint: Make, keys: tuple[str, ...]) -> None:
    source = checkpoint("dense31b", "bf16")
    with json_of(source) as config:
        config |= {key: {"group_size": 64, "bits": 4} for key in keys}
    done = run("scan", source)
    assert (
        done.code == 3 and "is a Gemma4ForConditionalGeneration quantized by MLX (4 bits in groups of 64)" in done.err
    )


def test_an_adapter_next_to_the_model_is_refused_with_the_next_step(checkpoint: Make, tmp_path: Path) -> None:
    source, other = checkpoint("dense31b", "skip"), checkpoint("text", "all")
    raw = (other / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {
        f"base_model.model.{k}" if k != "__metadata__" else k: v for k, v in json.loads(raw[8 : 8 + length]).items()
    }
    text = json.dumps(header).encode()
    (source / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(bnbfix.Unrepairable, match="BNB207") as caught:
        bnbfix.repair(source, tmp_path / "out", "0.32.0")
    hint = caught.value.hint or ""
    assert "merge_and_unload" in hint and "move adapter_model.safetensors out of the folder" in hint
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_nothing_quantized_loses_its_quantization_config(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "bf16")
    with json_of(source) as config:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for skip in (None, ["model", "vision_tower", "embed_vision", "language_model", "lm_head"]):
        with json_of(source) as config:
            config["quantization_config"]["llm_int8_skip_modules"] = skip
        for target in ("0.22.1", "0.32.0", "portable"):
            result = bnbfix.repair(source, tmp_path / "out", target, overwrite=True, device="cpu")
            assert result.written and result.plan.drops_quantization
            config = json.loads((tmp_path / "out" / "config.json").read_text())
            assert "quantization_config" not in config and config["architectures"]
            assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
            assert bnbfix.verify(tmp_path / "out", source).ok
