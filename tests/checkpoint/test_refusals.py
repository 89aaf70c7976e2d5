"""What is not a checkpoint that bnbfix can repair is called by its name, with the next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from tests.support.build import Make, json_of, opened, scan, state_tensors, tensors_of, zeros
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


# What no repair makes load, with and without --bf16


def refused(source: Path, out: Path, target: str = "0.32.0") -> set[tuple[str, str]]:
    """The (code, hint) of the refusal of each kind of repair."""
    seen = set()
    for bf16 in (False, True):
        with pytest.raises(bnbfix.Unrepairable) as caught:
            bnbfix.repair(source, out, target, bf16=bf16)
        assert not out.exists()
        seen.add((str(caught.value)[-7:-1], caught.value.hint or ""))
    return seen


MERGE = "merge the adapter and save the model itself (PEFT: merge_and_unload, save_pretrained)"
LAYER = "model.language_model.layers.0."


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{LAYER}self_attn.q_proj.lora_A.default.weight", (4, 128)),
        (f"{LAYER}self_attn.o_proj.base_layer.weight", (128, 128)),
        ("model.language_model.embed_tokens.modules_to_save.default.weight", (512, 128)),
        ("model.language_model.embed_tokens.original_module.weight", (512, 128)),
        (f"base_model.model.{LAYER}self_attn.q_proj.lora_B.weight", (128, 4)),
    ],
)
def test_names_of_an_adapter(name: str, shape: tuple[int, ...], checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        tensors[name] = zeros(*shape)
    assert refused(source, tmp_path / "out") == {("BNB207", MERGE)}


def test_a_prefix_before_every_name_is_not_an_adapter(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        renamed = {f"base_model.model.{name}": t for name, t in tensors.items()}
        tensors.clear()
        tensors |= renamed
    assert "BNB207" not in {str(f.code) for f in scan(source).findings}


@pytest.mark.parametrize(("count", "words"), [(1, "1 weight is missing"), (3, "3 weights are missing")])
def test_quant_states_whose_weights_are_lost(count: int, words: str, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        for layer in range(count):
            del tensors[f"model.language_model.layers.{layer}.mlp.up_proj.weight"]
    (found,) = [f for f in scan(source, "0.32.0").findings if str(f.code) == "BNB202"]
    assert found.message == f"{words}, of which the quant states are there"
    ((code, hint),) = refused(source, tmp_path / "out")
    assert code == "BNB202" and "download or copy the checkpoint again" in hint


def test_quant_states_of_a_weight_that_the_model_does_not_use_are_not_lost(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        states = state_tensors(tensors, f"{LAYER}mlp.up_proj.weight")
        for weight in (
            "model.language_model.layers.2.self_attn.v_proj.weight",  # where K serves as V
            "model.language_model.layers.9.mlp.up_proj.weight",  # of six layers
            "model.audio_tower.output_proj.weight",
        ):
            tensors |= {weight + suffix: t for suffix, t in states.items()}
    assert scan(source, "0.32.0").verdict == "loads"


def test_experts_in_a_list_of_linear_modules_that_are_no_matrices(checkpoint: Make) -> None:
    source = checkpoint("moe26b", "skip")
    with tensors_of(source) as tensors:
        tensors[f"{LAYER}experts.gate_up_projs.0.weight"] = zeros(128)
    with pytest.raises(bnbfix.Unrepairable, match=r"layers\.0\.experts\.gate_up_projs\.0\.weight.*BNB407") as caught:
        bnbfix.plan_repair(source, "0.32.0")
    assert caught.value.hint and "not whole matrices" in caught.value.hint


STACK = f"{LAYER}experts.gate_up_proj"


@pytest.mark.parametrize(
    ("stack", "absmax", "config", "words"),
    [
        ((4, 8192), None, {}, "without its scales, which bitsandbytes names gate_up_absmax"),
        ((4, 8192), ("gate_up_proj_absmax", 4, 256), {}, "without its scales, which bitsandbytes names gate_up_absmax"),
        ((4, 8192), ("gate_up_absmax", 1024), {}, "but U8 [4, 8192] with F32 [1024], not U8 [experts, bytes]"),
        ((4, 8192), ("gate_up_absmax", 2, 512), {}, "but U8 [4, 8192] with F32 [2, 512], not"),
        ((32768,), ("gate_up_absmax", 4, 256), {}, "but U8 [32768] with F32 [4, 256], not"),
        ((4, 8192), ("gate_up_absmax", 4, 300), {}, "but its 32,768 bytes and 1,200 blocks are not 4 matrices of 128"),
        (
            (4, 8192),
            ("gate_up_absmax", 4, 64),
            {},
            "but its 32,768 bytes and 256 blocks are not",
        ),  # two rows in a block
        ((4, 4096), ("gate_up_absmax", 4, 128), {}, "but its 16,384 bytes and 512 blocks are not"),
        ((4, 0), ("gate_up_absmax", 4, 0), {}, "but its 0 bytes and 0 blocks are not"),
        ((0, 8192), ("gate_up_absmax", 0, 256), {}, "but its 0 bytes and 0 blocks are not"),
        (
            (4, 8192),
            ("gate_up_absmax", 4, 256),
            {"quantization_config.bnb_4bit_quant_type": None},
            "does not say all of",
        ),
        ((4, 8192), ("gate_up_absmax", 4, 256), {"text_config.hidden_size": -128}, "does not say all of"),
        ((4, 8192), ("gate_up_absmax", 4, 256), {"text_config.moe_intermediate_size": [64]}, "does not say all of"),
        ((4, 8192), ("gate_up_absmax", 4, 256), {"text_config.dtype": ["bfloat16"]}, "does not say all of"),
    ],
)
def test_a_stack_of_experts_that_is_not_as_bitsandbytes_saves_it(
    run: Cli,
    checkpoint: Make,
    tmp_path: Path,
    stack: tuple[int, ...],
    absmax: tuple[Any, ...] | None,
    config: dict[str, Any],
    words: str,
) -> None:
    source = checkpoint("moe26b", "skip")
    with tensors_of(source) as tensors:
        tensors[STACK] = zeros(*stack, dtype="U8")
        if absmax is not None:
            tensors[f"{LAYER}experts.{absmax[0]}"] = zeros(*absmax[1:], dtype="F32")
    with json_of(source) as doc:
        for path, value in config.items():
            part, key = path.split(".")
            doc[part][key] = value
    for bf16 in ([], ["--bf16"]):
        done = run("repair", source, "--vllm", "0.32.0", "--out", tmp_path / "out", *bf16)
        assert done.code == 2 and not (tmp_path / "out").exists()
        assert "is a stack of experts in 4 bits, " in done.err and words in done.err and "in bfloat16" in done.err


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_scales_of_a_stack_in_another_dtype(checkpoint: Make, dtype: str) -> None:
    source = checkpoint("moe26b", "skip")
    with tensors_of(source) as tensors:
        tensors |= {STACK: zeros(4, 8192, dtype="U8"), f"{LAYER}experts.gate_up_absmax": zeros(4, 256, dtype=dtype)}
    (damaged,) = opened(source).damaged
    assert f"with {dtype} [4, 256], not" in str(damaged) and scan(source, "0.32.0").verdict == "fails"


def test_a_config_that_the_older_keys_cannot_express_is_refused_in_full_precision_too(
    checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("dense31b", "all", per_layer_config=True)
    with json_of(source) as config:
        for layer in config["text_config"]["per_layer_config"].values():
            layer["sliding_window"] = 64
    assert refused(source, tmp_path / "out", "0.27.1") == {("BNB302", "it says more than the older keys can")}


@pytest.mark.parametrize("target", ["0.22.1", "0.32.0"])
def test_what_only_4_bits_cannot_do_is_done_in_full_precision(target: str, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("moe26b", "int8")
    with pytest.raises(bnbfix.Unrepairable, match=r"BNB40[15]"):
        bnbfix.repair(source, tmp_path / "out", target)
    assert bnbfix.repair(source, tmp_path / "out", target, bf16=True, device="cpu").written


# What is not a model to serve


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Gemma4Model", "is Gemma4Model, the inner model of a Gemma4ForConditionalGeneration, saved without the rest"),
        ("Gemma4TextModel", "is Gemma4TextModel, the text part of a Gemma4ForConditionalGeneration, saved without"),
        ("Gemma4UnifiedModel", "the inner model of a Gemma4UnifiedForConditionalGeneration, saved without the rest"),
        ("Gemma4AssistantForCausalLM", "is Gemma4AssistantForCausalLM, a drafter for speculative decoding"),
        ("Gemma4DSparkModel", "is Gemma4DSparkModel, a drafter for speculative decoding"),
    ],
)
def test_a_part_of_a_model(name: str, words: str, run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with json_of(source) as config:
        config["architectures"] = [name]
    done = run("scan", source)
    assert done.code == 3 and words in done.err
    assert ("save_pretrained" in done.err) != ("--speculative-config" in done.err), "the next step"


# Two sets of weights


def test_a_second_set_of_weights_is_left_out(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    for name in ("model.safetensors", "consolidated.safetensors", "model-00001-of-00009.safetensors"):
        (source / name).write_bytes(b"not even read")
    (source / "voice.safetensors").write_bytes(b"something else")
    result = bnbfix.repair(source, tmp_path / "out", "0.32.0", device="cpu")
    assert result.written
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "voice.safetensors"}
    assert bnbfix.verify(tmp_path / "out", source).ok


def test_an_index_of_an_older_save(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    shutil.copy(source / "model-00001-of-00002.safetensors", source / "model.safetensors")
    for shard in source.glob("model-*.safetensors"):
        shard.unlink()
    done = run("scan", source)
    assert done.code == 2 and "shard model-00001-of-00002.safetensors is missing; the index names it" in done.err
    assert "delete model.safetensors.index.json" in done.err


def test_quantized_bytes_without_any_quant_state_are_not_of_bitsandbytes(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    with tensors_of(source) as tensors:
        for name in [n for n in tensors if ".quant_state." in n]:
            del tensors[name]
    with json_of(source) as config:
        del config["quantization_config"]
    done = run("scan", source)
    assert (done.code, done.out) == (3, "")
    assert "with quantized bytes, but without quant states of bitsandbytes" in done.error
