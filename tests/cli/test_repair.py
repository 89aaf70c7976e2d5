"""`bnbfix repair`: plans, options, progress and interrupts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bnbfix
from bnbfix.report.text import format_growth, format_size
from bnbfix.writer import staging
from tests.support.build import Make
from tests.support.command_line import Cli, harmless, process


def test_exit_code_1_for_what_no_repair_can_fix(run: Cli, pristine: Make, tmp_path: Path) -> None:
    done = run("repair", pristine("moe26b", "all"), "--vllm", "0.22.1", "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: cannot be repaired for vLLM 0.22.1: ") and "BNB401" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [True, False], ids=["with --out", "without"])
def test_a_dry_run_shows_shards_config_and_costs_and_writes_nothing(
    run: Cli, checkpoint: Make, tmp_path: Path, out: bool
) -> None:
    source = checkpoint("dense31b", "partial", shards=2)
    before = {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.rglob("*")]}
    options = ["--out", tmp_path / "out"] if out else []
    done = run("repair", source, "--vllm", "portable", "--dry-run", *options)
    assert before == {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.rglob("*")]}
    assert (done.code, done.err) == (0, "")
    assert done.width <= 80
    plan = bnbfix.plan_repair(source, "portable")
    for shard in plan.shards:
        size = source.joinpath(shard.name).stat().st_size
        row = next(line for line in done.out.splitlines() if line.startswith(shard.name))
        assert row.split()[1] == "rewritten" and format_growth(size, shard.size) in row
    for line in plan.config_diff().splitlines():
        assert f"  {line}".rstrip() in done.out.splitlines()
    assert '  +      "language_model.model.layers.1.self_attn.qkv_proj",' in done.out.splitlines()
    costs = f"Reads {format_size(plan.bytes_read)}, writes {format_size(plan.bytes_written)}; needs "
    assert costs in done.words and "MB of disk" in done.words and "GB are free." in done.words
    target = tmp_path / "out" if out else f"{source}-repaired"
    assert sorted(done.commands[0].split()) == sorted(f"bnbfix repair {source} --vllm portable --out {target}".split())
    assert "7 weights dequantized" in done.words and "1 key of config.json changed" in done.words


def test_a_dry_run_distinguishes_copied_and_rewritten_shards(run: Cli, pristine: Make) -> None:
    lines = run("repair", pristine("text", "single", shards=2), "--vllm", "0.22.1", "--dry-run").out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("model-0")] == ["copied", "rewritten"]


def test_a_dry_run_names_what_else_is_written_if_anything(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("text", "single")
    command = ("repair", source, "--dry-run", "--vllm", "0.22.1")
    assert "Written as well: README.md." in run(*command).words
    (source / "README.md").write_bytes(b"#" * 4_000_001)  # no card
    done = run(*command)
    assert done.code == 0 and "rewritten" in done.words and "Written as well" not in done.words


def test_a_dry_run_in_json_is_the_plan(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "partial", shards=2)
    done = run("repair", source, "--vllm", "portable", "--dry-run", "--format", "json")
    plan = bnbfix.plan_repair(source, "portable")
    assert (done.code, done.err) == (0, "")
    assert done.json["edits"] == [
        {"action": e.action, "name": e.name, "code": e.code.value, "detail": e.detail} for e in plan.edits
    ]
    assert [s["size"] for s in done.json["shards"]] == [s.size for s in plan.shards]
    assert done.json["config_diff"] == plan.config_diff() != ""
    assert (done.json["bytes_read"], done.json["bytes_written"]) == (plan.bytes_read, plan.bytes_written)
    assert done.json["disk_needed"] >= plan.bytes_written and done.json["disk_free"] > 0


def test_a_dry_run_with_nothing_to_do_says_so(run: Cli, pristine: Make) -> None:
    done = run("repair", pristine("e4b", "all"), "--vllm", "0.32.0", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.words.startswith("Nothing to do: loads unchanged in vLLM 0.32.0.")
    assert done.commands[-1] == f"vllm serve {pristine('e4b', 'all')}"


def test_repair_verify_scan_and_repair_again(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("dense31b", "partial", shards=2), tmp_path / "out"
    done = run("repair", source, "--vllm", "portable", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert f"Wrote{out}," in "".join(done.out.split()) and "for every vLLM release." in done.words
    assert done.width <= 80
    done = run("verify", out, "--source", source)
    assert (done.code, done.err) == (0, "")
    words = r"Hashes match (10 files), 263 tensors equal the source's, 7 equal an independent decode"
    assert words in done.words and "scan for every vLLM release: clean." in done.words
    assert done.commands == ["pip install vllm==0.33.0 vllm-bnb-plugin", f"vllm serve {out}"]
    done = run("verify", out)
    assert done.code == 0 and "Hashes match (10 files); scan for every vLLM release: clean." in done.words
    done = run("scan", out, "--vllm", "portable")
    assert done.code == 0 and "Loads in every vLLM release." in done.words
    done = run("repair", out, "--vllm", "portable", "--out", tmp_path / "again")
    assert done.code == 0 and done.words.startswith("Nothing to do: loads unchanged in every vLLM release.")
    assert not (tmp_path / "again").exists()


def test_a_repair_in_json_is_pure_json(run: Cli, pristine: Make, tmp_path: Path) -> None:
    done = run("repair", pristine("dense31b", "skip"), "--vllm", "portable", "-o", tmp_path / "out", "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert done.json["out"] == str(tmp_path / "out")
    assert set(done.json["sha256"]) | {"bnbfix.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    assert done.json["edits"] != [] and done.json["nothing_to_do"] is False
    done = run("verify", tmp_path / "out", "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert done.json["ok"] is True and done.json["problems"] == []
    done = run("repair", tmp_path / "out", "--vllm", "portable", "-o", tmp_path / "again", "--format", "json")
    assert done.json["out"] is None and done.json["nothing_to_do"] is True


def test_repair_refuses_a_folder_that_is_not_empty_without_overwrite(run: Cli, pristine: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    arguments = ["repair", pristine("dense31b", "skip"), "--vllm", "portable", "--out", out]
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert f"error: {out}: exists and is not empty" in done.err and "--overwrite" in done.err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert run(*arguments, "--overwrite").code == 0
    assert (out / "bnbfix.json").exists() and not (out / "mine.txt").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "tpu"])
def test_repair_refuses_a_device_that_is_not_there(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["repair", pristine("dense31b", "skip"), "--vllm", "portable", "--out", tmp_path / "out"]
    done = run(*arguments, "--device", device)
    assert (done.code, done.out) == (2, "") and done.err.startswith("error: device ")
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--device", "auto").code == 0


def test_a_full_disk_is_reported_before_anything_is_written(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "SLACK_BYTES", 1 << 60)
    done = run("repair", pristine("dense31b", "skip"), "--vllm", "portable", "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "") and "not enough disk" in done.err
    assert list(tmp_path.iterdir()) == []


SIZES = {
    "5GB": 5_000_000_000,
    "500MB": 500_000_000,
    "2GiB": 2 << 30,
    "1000000": 1_000_000,
    "1.5 kb": 1500,
    " 3mib ": 3 << 20,
    "1": 1,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_shard_sizes_are_read_as_people_write_them(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    seen: list[int] = []

    def stop(source: object, target: object, options: Any) -> None:
        seen.append(options.max_shard_size)
        raise bnbfix.Unrepairable("seen enough")

    monkeypatch.setattr("bnbfix.planner.plan_repair.plan_checkpoint", stop)
    done = run("repair", pristine("text", "single", shards=2), "--dry-run", "--bf16", "--max-shard-size", text)
    assert (done.code, seen) == (1, [size])


def test_a_size_beyond_all_bounds_is_a_usage_error_too(run: Cli, pristine: Make) -> None:
    done = run("repair", pristine("text", "single", shards=2), "--dry-run", "--max-shard-size", "9" * 400)
    assert (done.code, done.out) == (2, "") and "is not a size like" in done.err


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "five", "5 apples", "5TB", "1e9", "0.1", "5GB5", "GB"])
def test_an_invalid_size_is_a_usage_error(run: Cli, pristine: Make, text: str) -> None:
    done = run("repair", pristine("text", "single", shards=2), "--dry-run", f"--max-shard-size={text}")
    assert (done.code, done.out) == (2, "")
    assert done.error == f"error: --max-shard-size {text!r} is not a size like 5GB or 500MB"


def test_bf16_on_the_command_line(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source = pristine("text", "single", shards=2)
    flags = ["--bf16", "--max-shard-size", "300KB", "--vllm", "0.32.0"]
    done = run("repair", source, *flags, "--dry-run", "--format", "json")
    sizes = [s["size"] for s in done.json["shards"]]
    assert (done.code, done.err) == (0, "") and len(sizes) > 4
    done = run("repair", source, *flags, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert "of config.json changed" in done.words and done.width <= 80
    assert [p.stat().st_size for p in sorted((tmp_path / "out").glob("*.safetensors"))] == sizes
    assert run("verify", tmp_path / "out", "--source", source).code == 0
    done = run("scan", tmp_path / "out")
    assert done.code == 3 and "is an unquantized Gemma4ForCausalLM" in done.err


def test_a_dry_run_of_bf16_fits_80_columns(run: Cli, pristine: Make) -> None:
    done = run("repair", pristine("dense31b", "partial", shards=2), "--bf16", "--dry-run", "--max-shard-size", "1MB")
    rows = [line.split() for line in done.out.splitlines() if line.startswith("model-0")]
    assert (done.code, done.err) == (0, "")
    assert len(rows) > 2 and done.width <= 80


@pytest.mark.parametrize(("flag", "action"), [("dequantize", "dequantize"), ("quantize", "quantize")])
def test_partially_quantized_on_the_command_line(run: Cli, pristine: Make, flag: str, action: str) -> None:
    source = pristine("e4b", "partial")
    done = run("repair", source, "--vllm", "0.32.0", "--partial-groups", flag, "--dry-run", "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert {e["action"] for e in done.json["edits"]} == {action, "config"}
    words = run("repair", source, "--vllm", "0.32.0", "--partial-groups", flag, "--dry-run").words
    assert ("quantized to NF4, which loses precision" in words) == (flag == "quantize")


def test_there_is_no_progress_without_a_terminal(pristine: Make, tmp_path: Path) -> None:
    done = process("repair", pristine("text", "single", shards=2), "--vllm", "0.22.1", "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert harmless(done.out) and f"Wrote{tmp_path / 'out'}," in "".join(done.out.split())


def test_progress_goes_to_a_terminal_on_stderr_and_never_to_stdout(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    source = pristine("dense31b", "skip")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = run("repair", source, "--vllm", "portable", "--out", tmp_path / "a")
    assert done.code == 0 and "writing" in done.err and harmless(done.out)
    done = run("verify", tmp_path / "a")
    assert done.code == 0 and "hashing" in done.err and harmless(done.out)
    done = run("repair", source, "--vllm", "portable", "--out", tmp_path / "b", "--format", "json")
    assert (done.code, done.err) == (0, "") and done.json["out"] == str(tmp_path / "b")


@pytest.mark.parametrize("at", [1, 4, 7], ids=["first write", "in a shard", "last files"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_an_interrupted_repair_ends_with_130_in_clear_words_and_without_output(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, at: int
) -> None:
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old.txt").write_text("old")

    calls, pwrite = 0, os.pwrite

    def interrupted(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return pwrite(fd, data, offset)

    options = ["--overwrite"] if overwrite else []
    command = ("repair", pristine("dense31b", "skip"), "--vllm", "portable", "--out", tmp_path / "out", *options)
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", interrupted)
        done = run(*command)
    assert calls == at
    assert (done.code, done.out) == (130, "")
    staging = tmp_path / ".out.bnbfix-partial"
    outside = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if staging not in (p, *p.parents)]
    assert outside == (["out", "out/old.txt"] if overwrite else [])
    kept = f"  Finished files are kept in {staging}; the same command resumes:\n" if staging.exists() else ""
    words = f"error: interrupted; {tmp_path / 'out'} was not written\n"
    assert done.err == f"{words}{kept}  bnbfix {' '.join(map(str, command))}\n"
    again = run(*command)
    assert again.code == 0
    if kept:
        assert "resumed an interrupted repair: " in again.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "old.txt").exists()
