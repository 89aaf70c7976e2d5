"""The command line as its users see it: what goes where, in which width, and the exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bnbfix
from bnbfix.checkpoint.checkpoint import open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.vllm import probe as installed
from bnbfix.engines.vllm import releases as vllm_releases
from bnbfix.engines.vllm.parameters import parameters, projections
from bnbfix.engines.vllm.releases import Installed
from bnbfix.models.gemma4 import read_model
from bnbfix.rules.rule import Code
from bnbfix.writer import staging as destination
from tests.support.build import Make
from tests.support.command_line import EVIL, Cli, Run, harmless, process
from tests.support.folders import LAYERS, hostile, large_checkpoint, rename

# Scan


@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=["short", "verbose"])
@pytest.mark.parametrize(("family", "quant"), [("dense31b", "partial"), ("e4b", "all"), ("moe26b", "all")])
def test_a_scan_fits_80_columns(run: Cli, pristine: Make, family: str, quant: str, verbose: list[str]) -> None:
    done = run("scan", pristine(family, quant, shards=2), "--vllm", "portable", *verbose)
    assert done.err == "" and done.code == 1
    assert len(done.out.splitlines()) > 10
    assert max(map(len, done.out.splitlines())) <= 80
    assert not any(line.endswith(" ") for line in done.out.splitlines())
    assert harmless(done.out)


def test_a_piped_scan_fits_80_columns_too(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    done = process("scan", source, "--vllm", "portable")
    assert (done.code, done.err) == (1, "")
    assert max(map(len, done.out.splitlines())) <= 80
    assert harmless(done.out)


def test_a_width_that_is_no_number_is_not_heeded(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("scan", pristine("e4b", "all"))
    monkeypatch.setenv("COLUMNS", "\u00b2\u00b2")  # digits, but no number
    assert run("scan", pristine("e4b", "all")) == shown


def test_the_scan_table_says_what_each_range_of_releases_does(run: Cli, pristine: Make) -> None:
    lines = run("scan", pristine("dense31b", "partial", shards=2), "--vllm", "portable").out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:2] == "0."}
    assert rows == {
        "0.19.0-0.22.1": ["fails", "7", "BNB103", "BNB104"],
        "0.23.0-0.27.1": ["fails", "21", "BNB102", "BNB103"],
        "0.28.0-0.33.0": ["wrong", "21", "BNB102", "BNB103"],
    }


def test_a_scan_names_tensors_the_fix_and_the_command_that_fixes(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("dense31b", "partial", shards=2), "--vllm", "0.22.1")
    assert "BNB104 fails: K serves as V, but V has no quant state" in done.words
    assert "model.language_model.layers.N.self_attn.k_proj.weight x2" in done.words
    assert "Fix: " in done.words
    assert "Does not load in vLLM 0.22.1." in done.words
    assert "Repair it: bnbfix repair MODEL --out DIR --vllm 0.22.1" in done.words


def test_verbose_names_every_tensor_and_the_notes(run: Cli, pristine: Make) -> None:
    source = pristine("e4b", "all", shards=2)
    short, long = (run("scan", source, "--vllm", "portable", *v) for v in ([], ["--verbose"]))
    hidden = "model.vision_tower.encoder.layers.1.self_attn.q_proj.linear.weight"
    assert hidden not in short.words and "shown with --verbose" in short.words
    flat = "".join(long.out.split())
    assert hidden in flat and "shownwith--verbose" not in flat
    names = {t for f in bnbfix.scan(source, "portable").findings for t in f.tensors}
    assert all(name in flat for name in names)


def test_a_class_that_some_releases_do_not_know_is_no_failure_of_all(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("unified12b", "skip"), "--vllm", "portable")
    assert "in every release that knows the model." in done.words and "in every release." not in done.words
    assert "in every release." in run("scan", pristine("dense31b", "partial", shards=2), "--vllm", "portable").words


def test_a_clean_scan_says_so(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("e4b", "all", shards=2), "--vllm", "0.32.0")
    assert (done.code, done.err) == (0, "")
    assert done.words.endswith("Loads in vLLM 0.32.0.")


SCAN_KEYS = {"schema", "model", "target", "verdict", "releases", "findings"}
FINDING_KEYS = {"code", "severity", "tensors", "releases", "message", "fix", "reason"}


@pytest.mark.parametrize(
    ("family", "quant", "target"),
    [
        ("dense31b", "partial", "portable"),
        ("dense31b", "skip", "0.32.0"),
        ("e4b", "all", "0.32.0"),
        ("moe26b", "all", "portable"),
        ("unified12b", "all", "0.22.1"),
        ("dense31b", "int8", "portable"),
    ],
)
def test_the_json_of_a_scan_has_its_shape(run: Cli, pristine: Make, family: str, quant: str, target: str) -> None:
    source = pristine(family, quant, shards=2)
    done = run("scan", source, "--vllm", target, "--format", "json")
    doc, result = done.json, bnbfix.scan(source, target)
    assert done.err == "" and done.out.startswith("{\n") and done.out.endswith("}\n")
    assert set(doc) >= SCAN_KEYS
    assert (doc["schema"], doc["model"], doc["target"]) == (1, str(source), target)
    assert doc["verdict"] == result.verdict
    assert done.code == (doc["verdict"] != "loads")
    table = [{"first": r.first, "last": r.last} for r in vllm_releases.ranges()]
    assert [{k: r[k] for k in ("first", "last")} for r in doc["releases"]] == table
    for r in doc["releases"]:
        assert set(r) >= {"first", "last", "verdict", "codes"}
        assert r["verdict"] in ("loads", "degraded", "wrong", "fails")
        assert {Code(c) for c in r["codes"]} <= set(Code)
        assert (r["verdict"] == "loads") == (r["codes"] == [])
    assert len(doc["findings"]) == len(result.findings)
    for f, found in zip(doc["findings"], result.findings, strict=True):
        assert set(f) >= FINDING_KEYS
        assert f["severity"] in ("fails", "wrong", "degraded", "note")
        assert (f["code"], f["severity"]) == (found.code.value, found.severity)
        assert (f["tensors"], f["message"]) == (list(found.tensors), found.message)
        assert f["releases"] and all(r in table for r in f["releases"])
        assert (f["fix"] is None) == (f["reason"] is not None)


def test_the_installed_vllm_is_the_target_where_none_is_named(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pristine("dense31b", "skip")
    assert run("scan", source, "--format", "json").json["target"] == "portable"
    monkeypatch.setattr("bnbfix.engines.vllm.releases.find_installed", lambda: Installed("0.22.1", None))
    assert run("scan", source, "--format", "json").json["target"] == "0.22.1"
    assert run("scan", source, "--format", "json", "--vllm", "0.32.0").json["target"] == "0.32.0"
    monkeypatch.setattr("bnbfix.engines.vllm.releases.find_installed", lambda: Installed("0.32.0", None))
    done = run("scan", pristine("e4b", "all"))
    assert done.code == 1 and "BNB304" in done.words


# Exit codes


def test_exit_code_0_clean(run: Cli, pristine: Make) -> None:
    assert run("scan", pristine("e4b", "all"), "--vllm", "0.32.0").code == 0


def test_exit_code_1_findings_remain_and_exit_zero(run: Cli, pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    plain, zero = (run("scan", source, "--vllm", "portable", *o) for o in ([], ["--exit-zero"]))
    assert (plain.code, zero.code) == (1, 0)
    assert plain.out == zero.out
    assert run("scan", source, "--vllm", "portable", "--exit-zero", "--format", "json").code == 0


def test_exit_code_1_for_what_no_repair_can_fix(run: Cli, pristine: Make, tmp_path: Path) -> None:
    done = run("repair", pristine("moe26b", "all"), "--vllm", "0.22.1", "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: cannot be made to load in 0.22.1: ") and "BNB401" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["scan"], ["repair", "--dry-run"]], ids=["scan", "repair"])
@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ("bf16", "is an unquantized Gemma4ForConditionalGeneration"),
        ("adapter", "is a PEFT adapter"),
        ("empty", "has no safetensors files"),
        ("llama", "is 'LlamaForCausalLM', not a Gemma4 model"),
    ],
)
def test_exit_code_3_nothing_here_to_check(
    run: Cli, checkpoint: Make, tmp_path: Path, command: list[str], quant: str, words: str
) -> None:
    source = tmp_path / "source"
    if quant == "bf16":
        source = checkpoint("dense31b", "bf16")
    else:
        source.mkdir()
        config = "{}" if quant == "empty" else '{"architectures": ["LlamaForCausalLM"]}'
        (source / ("adapter_config.json" if quant == "adapter" else "config.json")).write_text(config)
    if quant == "llama":
        (source / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = run(*command, source)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: ") and words in done.err
    assert run("scan", source, "--exit-zero").code == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "nowhere"], "error: nowhere: no such folder"),
        (["scan", "pyproject.toml"], "is a file; name the folder it is in"),
        (["scan", "examples"], "config.json: is missing"),
        (["scan", "examples", "--vllm", "0.1.0"], "is not a vLLM release that bnbfix knows"),
        (["scan"], "Missing argument 'MODEL'"),
        (["scan", ".", "--format", "yaml"], "yaml"),
        (["scan", ".", "--nonsense"], "--nonsense"),
        (["frobnicate"], "frobnicate"),
        (["repair", "nowhere"], "repair needs --out DIR, or --dry-run to see the plan alone"),
        (["repair", "nowhere", "--out", "x"], "error: nowhere: no such folder"),
        (["verify", "nowhere"], "error: nowhere: no such folder"),
        (["explain"], "Missing argument 'CODE'"),
        (["explain", "BNB999"], "'BNB999' is not a finding's code"),
    ],
)
def test_exit_code_2_bad_usage(run: Cli, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert words in done.err and "Traceback" not in done.err
    assert done.out == ""


def test_exit_code_2_a_revision_of_nothing(run: Cli, tmp_path: Path) -> None:
    done = run("verify", tmp_path, "--revision", "main")
    assert (done.code, done.out, done.err) == (2, "", "error: --revision belongs to a --source on the Hub\n")


def test_exit_code_2_an_unknown_release(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("dense31b", "skip"), "--vllm", "0.1.0")
    assert (done.code, done.out) == (2, "")
    assert "error: --vllm '0.1.0' is not a vLLM release that bnbfix knows" in done.err
    assert "Name a release from 0.19.0 to " in done.err


def test_exit_code_2_a_truncated_shard(run: Cli, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    for command in (["scan"], ["repair", "--out", tmp_path / "out"]):
        done = run(*command, source)
        assert (done.code, done.out) == (2, "")
        assert "error: model.safetensors: truncated" in done.err
        assert "  Download or copy the file again." in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["table", "json"])
def test_exit_code_2_a_damaged_quant_state_even_with_exit_zero(run: Cli, checkpoint: Make, format: str) -> None:
    source = checkpoint("dense31b", "single")
    shard = source / "model.safetensors"
    data = shard.read_bytes()
    assert b'"blocksize": 64' in data
    shard.write_bytes(data.replace(b'"blocksize": 64', b'"blocksize": 32', 1))
    done = run("scan", source, "--vllm", "0.32.0", "--exit-zero", "--format", format)
    assert done.code == 2 and "BNB201" in done.out
    assert "absmax is F32" in done.err and "Quantize the model again" in done.err
    if format == "json":
        assert done.json["verdict"] == "fails"


def test_an_error_of_the_system_ends_with_exit_code_2(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/models/x")

    monkeypatch.setattr("bnbfix.report.outcome.scan_checkpoint", refuse)
    done = run("scan", pristine("dense31b", "skip"))
    assert (done.code, done.out, done.err) == (2, "", "error: /models/x: Permission denied\n")


def test_a_bug_is_not_dressed_up_as_an_error_of_the_user(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("bnbfix.report.outcome.scan_checkpoint", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("scan", pristine("dense31b", "skip"))


def test_a_reader_that_goes_away_is_no_traceback(pristine: Make) -> None:
    runner = (
        "import os, sys\nfrom bnbfix.cli.main import main\nr, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
        "sys.argv[0] = 'bnbfix'\nmain()"
    )
    done = process("scan", pristine("dense31b", "skip"), "--vllm", "portable", runner=("-c", runner))
    assert done.code == 1 and done.err == ""


@pytest.mark.parametrize("arguments", [["releases"], ["explain", "BNB101"], ["releases", "--format", "json"]], ids=str)
@pytest.mark.parametrize("what", ["gone", "full"])
def test_a_stdout_that_takes_nothing_ends_in_a_line_at_most(arguments: list[str], what: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    if what == "full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "bnbfix", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    words = {"gone": (1, ""), "full": (2, "error: input/output: No space left on device\n")}
    assert (done.returncode, done.stderr) == words[what]


# Repair


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
    assert max(map(len, done.out.splitlines())) <= 80
    plan = bnbfix.plan_repair(source, "portable")
    for shard in plan.shards:
        size = source.joinpath(shard.name).stat().st_size
        row = next(line for line in done.out.splitlines() if line.startswith(shard.name))
        assert row.split()[1] == "rewritten" and f"{size / 1e6:.1f} > {shard.size / 1e6:.1f}" in row
    for line in plan.config_diff().splitlines():
        assert f"  {line}".rstrip() in done.out.splitlines()
    assert '  +      "language_model.model.layers.1.self_attn.qkv_proj",' in done.out.splitlines()
    costs = f"Reads {plan.bytes_read / 1e6:.1f} MB, writes {plan.bytes_written / 1e6:.1f} MB; needs "
    assert costs in done.words and "MB of disk" in done.words and "MB are free." in done.words
    assert "7 weights dequantized" in done.words and "1 key of config.json changed" in done.words


def test_a_dry_run_tells_copied_shards_from_rewritten_ones(run: Cli, pristine: Make) -> None:
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
    assert (done.code, done.err, done.words) == (0, "", "Nothing to do: loads in 0.32.0 as it is.")


def test_repair_verify_scan_and_repair_again(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source, out = pristine("dense31b", "partial", shards=2), tmp_path / "out"
    done = run("repair", source, "--vllm", "portable", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert f"Wrote{out}," in "".join(done.out.split()) and "for portable." in done.words
    assert max(map(len, done.out.splitlines())) <= 80
    done = run("verify", out, "--source", source)
    assert (done.code, done.err) == (0, "")
    words = r"10 files match their hashes, 263 tensors equal the source's, 7 equal an independent decode"
    assert words in done.words and done.words.endswith("scan for portable: clean.")
    done = run("verify", out)
    assert done.code == 0 and "10 files match their hashes; scan for portable: clean." in done.words
    done = run("scan", out, "--vllm", "portable")
    assert done.code == 0 and done.words.endswith("Loads in every release.")
    done = run("repair", out, "--vllm", "portable", "--out", tmp_path / "again")
    assert (done.code, done.words) == (0, "Nothing to do: loads in portable as it is.")
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


def test_repair_refuses_a_folder_that_is_not_empty_unless_told(run: Cli, pristine: Make, tmp_path: Path) -> None:
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
    assert (done.code, done.out) == (2, "") and "--device" in done.err
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--device", "auto").code == 0


def test_a_full_disk_is_told_before_anything_is_written(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "SLACK", 1 << 60)
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

    monkeypatch.setattr("bnbfix.planner.plan.plan_checkpoint", stop)
    done = run("repair", pristine("text", "single", shards=2), "--dry-run", "--bf16", "--max-shard-size", text)
    assert (done.code, seen) == (1, [size])


def test_a_size_beyond_all_bounds_is_a_usage_error_too(run: Cli, pristine: Make) -> None:
    done = run("repair", pristine("text", "single", shards=2), "--dry-run", "--max-shard-size", "9" * 400)
    assert (done.code, done.out) == (2, "") and "is not a size like" in done.err


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "five", "5 apples", "5TB", "1e9", "0.1", "5GB5", "GB"])
def test_what_is_no_size_is_a_usage_error(run: Cli, pristine: Make, text: str) -> None:
    done = run("repair", pristine("text", "single", shards=2), "--dry-run", f"--max-shard-size={text}")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: --max-shard-size {text!r} is not a size like 5GB or 500MB\n"


def test_bf16_on_the_command_line(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source = pristine("text", "single", shards=2)
    flags = ["--bf16", "--max-shard-size", "300KB", "--vllm", "0.32.0"]
    done = run("repair", source, *flags, "--dry-run", "--format", "json")
    sizes = [s["size"] for s in done.json["shards"]]
    assert (done.code, done.err) == (0, "") and len(sizes) > 4
    done = run("repair", source, *flags, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert "of config.json changed" in done.words and max(map(len, done.out.splitlines())) <= 80
    assert [p.stat().st_size for p in sorted((tmp_path / "out").glob("*.safetensors"))] == sizes
    assert run("verify", tmp_path / "out", "--source", source).code == 0
    done = run("scan", tmp_path / "out")
    assert done.code == 3 and "is an unquantized Gemma4ForCausalLM" in done.err


def test_a_dry_run_of_bf16_fits_80_columns(run: Cli, pristine: Make) -> None:
    done = run("repair", pristine("dense31b", "partial", shards=2), "--bf16", "--dry-run", "--max-shard-size", "1MB")
    rows = [line.split() for line in done.out.splitlines() if line.startswith("model-0")]
    assert (done.code, done.err) == (0, "")
    assert len(rows) > 2 and max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(("flag", "action"), [("dequantize", "dequantize"), ("quantize", "quantize")])
def test_partially_quantized_on_the_command_line(run: Cli, pristine: Make, flag: str, action: str) -> None:
    source = pristine("e4b", "partial")
    done = run("repair", source, "--vllm", "0.32.0", "--partial-groups", flag, "--dry-run", "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert {e["action"] for e in done.json["edits"]} == {action, "config"}
    words = run("repair", source, "--vllm", "0.32.0", "--partial-groups", flag, "--dry-run").words
    assert ("quantized to NF4, which loses precision" in words) == (flag == "quantize")


def test_there_is_no_progress_where_stderr_is_no_terminal(pristine: Make, tmp_path: Path) -> None:
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
    assert done.code == 0 and "comparing" in done.err and harmless(done.out)
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
    beside = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if staging not in (p, *p.parents)]
    assert beside == (["out", "out/old.txt"] if overwrite else [])
    kept = f"  Finished files are kept in {staging}; the same command goes on from there.\n" if staging.exists() else ""
    assert done.err == "error: interrupted; nothing was published\n" + kept
    again = run(*command)
    assert again.code == 0
    if kept:
        assert "finished files of an interrupted repair were taken up" in again.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "old.txt").exists()


def test_an_interrupted_scan_ends_with_130(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnbfix.report.outcome.scan_checkpoint", interrupted)
    done = run("scan", pristine("dense31b", "skip"))
    assert (done.code, done.out) == (130, "")
    assert "interrupted" in done.err and "Traceback" not in done.err


# The other commands


def test_releases_has_a_row_for_each_range_and_fits_80_columns(run: Cli) -> None:
    done = run("releases")
    assert (done.code, done.err) == (0, "")
    rows = [line.split()[0] for line in done.out.splitlines() if line.startswith("0.")]
    assert rows == [r.name for r in vllm_releases.ranges()]
    assert max(map(len, done.out.splitlines())) <= 80
    assert "No vLLM is installed here." in done.words


def test_releases_names_the_installed_vllm(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnbfix.engines.vllm.releases.find_installed", lambda: Installed("0.27.1", None))
    assert "Installed here: vLLM 0.27.1." in run("releases").words


def test_releases_in_json_is_the_table(run: Cli) -> None:
    done = run("releases", "--format", "json")
    assert (done.code, done.err, done.json["schema"]) == (0, "", 1)
    path = Path(vllm_releases.__file__).with_name("releases.json")
    want = [row | {"quantized": sorted(row["quantized"])} for row in json.loads(path.read_text())["ranges"]]
    assert done.json["ranges"] == want


@pytest.mark.parametrize("code", list(Code), ids=lambda c: c.value)
def test_every_code_is_explained(run: Cli, code: Code) -> None:
    done = run("explain", code.value)
    assert (done.code, done.err) == (0, "")
    assert done.words.startswith(f"{code.value}: {code.explanation.title}")
    assert code.explanation.why in done.words and f"Changes: {code.explanation.fix}" in done.words
    assert all(url in done.words for url in code.explanation.upstream)
    assert max(map(len, done.out.splitlines())) <= 80
    assert run("explain", code.value.lower()).out == done.out


def test_explaining_an_unknown_code_lists_the_known_ones(run: Cli) -> None:
    done = run("explain", "bnb1")
    assert (done.code, done.out) == (2, "")
    assert all(c.value in done.err for c in Code)


def test_version(run: Cli) -> None:
    assert run("--version") == Run(0, f"bnbfix {bnbfix.__version__}\n", "")
    assert process("--version") == Run(0, f"bnbfix {bnbfix.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["nothing", "--help"])
def test_without_arguments_there_is_help(run: Cli, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code in ((0,) if arguments else (0, 2))  # what no arguments are is up to the option parser
    text = done.out + done.err
    assert "Usage: " in text
    assert all(command in text for command in ("scan", "repair", "verify", "releases", "explain"))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("scan", ["MODEL", "--vllm", "--format", "--verbose", "--exit-zero"]),
        ("repair", ["MODEL", "--out", "--vllm", "--device", "--dry-run", "--overwrite", "--format"]),
        ("verify", ["DIR", "--source", "--format"]),
        ("releases", ["--format"]),
        ("explain", ["CODE"]),
    ],
)
def test_every_command_has_help(run: Cli, command: str, options: list[str]) -> None:
    done = run(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert all(option in done.out for option in options)


# The vLLM installed here. No test has one: what its process would answer is put in its place.


@pytest.mark.parametrize("command", [["releases", "--probe"], ["verify", "--load"]], ids=["probe", "load"])
def test_without_a_vllm_there_is_nothing_to_ask(run: Cli, pristine: Make, tmp_path: Path, command: list[str]) -> None:
    source = pristine("text", "single", shards=2)
    bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu")
    done = run(*command, tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "error: no vLLM is installed beside bnbfix",
        "  Run bnbfix from the environment that serves the model.",
    ]


VERSIONS = {"vllm": "0.32.0", "transformers": "5.14.1", "torch": "2.13.0", "vllm-bnb-plugin": None}


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Puts an answer in the place of the process that runs vLLM 0.32.0."""

    def put(given: dict[str, Any]) -> None:
        monkeypatch.setattr(installed, "find_installed", lambda: Installed("0.32.0", None))
        monkeypatch.setattr(installed, "ask", lambda *_: {"versions": VERSIONS, "error": None} | given)

    return put


def loaded(**changes: Any) -> dict[str, Any]:
    """What the engine answers of two parameters, one of them quantized."""
    found = [
        {"name": "a.weight", "quantized": True, "states": 1},
        {"name": "b.weight", "quantized": False, "states": 0},
    ]
    return {"parameters": found, "finite": True, "forward": True} | changes


UNBOUND = [{"name": "x.7.weight\x1b[31m", "quantized": True, "states": 0}]
K_PLAIN = [{"name": "model.layers.1.self_attn.qkv_proj.weight", "quantized": True, "states": 3}]


@pytest.mark.parametrize(
    ("given", "ok", "words"),
    [
        (loaded(), True, "loads it: 2 parameters came in, 1 of them quantized; it ran forward."),
        (loaded(parameters=UNBOUND), False, r"have no quant state: x.N.weight\x1b[31m vLLM 0.32.0"),
        (loaded(parameters=K_PLAIN), False, "were quantized while loading: model.layers.N.self_attn.qkv_proj.weight"),
        (loaded(finite=False), False, "does not run it: the forward pass gave no finite numbers"),
        ({"error": "KeyError: '\x1b[31m'"}, False, r"does not run it: KeyError: '\x1b[31m'"),
    ],
    ids=["ok", "unbound", "requantized", "not finite", "error"],
)
def test_load_tells_what_the_engine_did(
    run: Cli,
    pristine: Make,
    tmp_path: Path,
    answer: Callable[[dict[str, Any]], None],
    given: dict[str, Any],
    ok: bool,
    words: str,
) -> None:
    bnbfix.repair(pristine("text", "partial", shards=2), tmp_path / "out", "0.32.0", device="cpu")
    answer(given)
    done = run("verify", tmp_path / "out", "--load")
    assert (done.code, done.err) == (0 if ok else 1, "")
    assert "vLLM 0.32.0, transformers 5.14.1" in done.words and words in done.words
    assert "scan for 0.32.0: clean." in done.words
    assert harmless(done.out) and max(map(len, done.out.splitlines())) <= 80
    done = run("verify", tmp_path / "out", "--load", "--format", "json")
    assert (done.code, done.err, done.json["load"]["ok"]) == (0 if ok else 1, "", ok)
    assert done.json["ok"] is True and done.json["load"]["versions"] == VERSIONS


def test_a_machine_that_is_too_small_is_told(
    run: Cli, pristine: Make, tmp_path: Path, answer: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bnbfix.repair(pristine("text", "single", shards=2), tmp_path / "out", "0.22.1", device="cpu")
    answer(loaded())
    monkeypatch.setattr(installed, "_free_memory", lambda: 1000)
    if Path("/dev/nvidia0").exists():
        pytest.skip("a GPU is there, whose memory counts instead")
    done = run("verify", tmp_path / "out", "--load")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: the machine is too small to load it: ")


def probed(source: Path, release: str, **changes: bool) -> dict[str, Any]:
    """The answer of a vLLM that does what the table says, but for `changes`."""
    checkpoint = open_checkpoint(LocalSource.open(source))
    model = read_model(checkpoint.config)
    row = vllm_releases.find_range(release)
    assert row is not None
    found = {p.module: p.quantized for p in parameters(projections(checkpoint), model, row, checkpoint.skip_modules)}
    modules = [{"name": name, "quantized": quantized} for name, quantized in (found | changes).items()]
    return {"modules": modules, "skips": {"lm_head": ["lm_head"], "no\x1bsuch": []}}


def test_probe_agrees_with_the_table(run: Cli, pristine: Make, answer: Callable[[dict[str, Any]], None]) -> None:
    source = pristine("dense31b", "all")
    answer(probed(source, "0.32.0"))
    done = run("releases", "--probe", source)
    assert (done.code, done.err) == (0, "")
    assert "vLLM 0.32.0, transformers 5.14.1; the table's row is 0.32.0-" in done.words
    assert "skip entry lm_head: names 1 module" in done.words
    assert r"skip entry no\x1bsuch: not wrap_errors" in done.words
    assert done.words.endswith("The table agrees with this vLLM.")
    assert max(map(len, done.out.splitlines())) <= 80 and harmless(done.out)
    doc = run("releases", "--probe", source, "--format", "json").json
    assert doc["disagreements"] == [] and len(doc["modules"]) > 20 and doc["release"]["first"] == "0.32.0"


def test_probe_tells_where_the_table_is_wrong(
    run: Cli, pristine: Make, answer: Callable[[dict[str, Any]], None]
) -> None:
    source = pristine("dense31b", "all")
    name = next(m["name"] for m in probed(source, "0.32.0")["modules"] if m["quantized"])
    answer(probed(source, "0.32.0", **{name: False}))
    done = run("releases", "--probe", source)
    assert (done.code, done.err) == (1, "")
    assert f"{name}: the table says quantized, vLLM an ordinary parameter" in done.words
    assert done.words.endswith("The table disagrees with this vLLM; its row needs fix_text.")
    doc = run("releases", "--probe", source, "--format", "json").json
    assert doc["disagreements"] == [{"module": name, "table": "quantized", "vllm": "an ordinary parameter"}]


def test_a_vllm_that_cannot_build_the_model_is_an_error(
    run: Cli, pristine: Make, answer: Callable[[dict[str, Any]], None]
) -> None:
    answer({"error": "ValueError: no such architecture"})
    done = run("releases", "--probe", pristine("dense31b", "all"))
    assert (done.code, done.out) == (2, "")
    assert done.err.rstrip().endswith("vLLM cannot build the model: ValueError: no such architecture")


def test_a_vllm_that_is_broken_or_slow_is_an_error_in_one_line(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process itself is started; it finds no vLLM, or has no time to.
    source = pristine("text", "single", shards=2)
    monkeypatch.setattr(installed, "find_installed", lambda: Installed("0.32.0", None))
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(source))
    done = run("releases", "--probe", source)
    assert (done.code, done.out) == (2, "")
    if not vllm_releases.find_installed():
        assert "vLLM cannot build the model: ModuleNotFoundError: No module named 'vllm'" in done.err
    monkeypatch.setattr(installed, "PROBE_SECONDS", 0.01)
    done = run("releases", "--probe", source)
    assert (done.code, done.out, done.err) == (2, "", f"error: {source}: vLLM gave no answer within 0 s\n")


@pytest.mark.parametrize(
    ("does", "words", "hint"),
    [
        ("echo one; echo two >&2; exit 3", "vLLM ended with status 3 and no answer", "two"),
        ("exit 0", "vLLM ended with status 0 and no answer", None),
        ("kill -9 $$", "vLLM ended with status -9 and no answer", "It was killed; was there too little memory?"),
    ],
)
def test_a_vllm_that_ends_without_an_answer_is_told_with_its_last_words(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, words: str, hint: str | None
) -> None:
    source = pristine("text", "single", shards=2)
    (tmp_path / "python").write_text(f"#!/bin/sh\n{does}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(installed, "find_installed", lambda: Installed("0.32.0", None))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    done = run("releases", "--probe", source)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {source}: {words}\n" + (f"  {hint}\n" if hint else "")


@pytest.mark.parametrize(
    ("meminfo", "ok"),
    [("MemTotal: 1 kB\nMemAvailable: 1 kB\n", False), ("MemTotal: 1 kB\n", True), (None, True)],
    ids=["too little", "not told", "no such file"],
)
def test_memory_that_is_not_known_refuses_nothing(
    run: Cli,
    pristine: Make,
    tmp_path: Path,
    answer: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    meminfo: str | None,
    ok: bool,
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("a GPU is there, whose memory counts instead")
    bnbfix.repair(pristine("text", "single", shards=2), tmp_path / "out", "0.22.1", device="cpu")
    answer(loaded())
    read_text = Path.read_text

    def read(self: Path, *args: Any, **options: Any) -> str:
        if str(self) != "/proc/meminfo":
            return read_text(self, *args, **options)
        if meminfo is None:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return meminfo

    monkeypatch.setattr(Path, "read_text", read)
    done = run("verify", tmp_path / "out", "--load")
    assert done.code == (0 if ok else 2)
    assert ok or done.err.startswith("error: the machine is too small to load it: 0.0 GB of weights, 0.0 GB")


def test_an_unquantized_output_may_have_nothing_quantized_in_the_engine(
    run: Cli, pristine: Make, tmp_path: Path, answer: Callable[[dict[str, Any]], None]
) -> None:
    bnbfix.repair(pristine("text", "single", shards=2), tmp_path / "out", "0.32.0", device="cpu", bf16=True)
    answer(loaded())
    done = run("verify", tmp_path / "out", "--load")
    assert done.code == 1 and "were quantized while loading: a.weight" in done.words
    answer(loaded(parameters=[{"name": "a.weight", "quantized": False, "states": 0}]))
    assert run("verify", tmp_path / "out", "--load").code == 0


@pytest.mark.parametrize(
    ("release", "name", "quantized", "table", "vllm"),
    [
        ("0.32.0", "model.layers.0.experts", True, None, None),
        ("0.32.0", "model.layers.0.experts", False, "quantized", "an ordinary parameter"),
        ("0.32.0", "model.layers.0.moe.experts", True, "experts under experts", "another prefix"),
        ("0.27.1", "model.layers.0.moe.experts", True, None, None),
        ("0.27.1", "model.layers.0.experts", True, "experts under moe.experts", "another prefix"),
    ],
)
def test_probe_tells_where_experts_lie_otherwise(
    run: Cli,
    pristine: Make,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    name: str,
    quantized: bool,
    table: str | None,
    vllm: str | None,
) -> None:
    source = pristine("moe26b", "all")
    told = probed(source, release, **{name: quantized})
    told["modules"] = [m for m in told["modules"] if ".experts" not in m["name"] or m["name"] == name]
    monkeypatch.setattr(installed, "find_installed", lambda: Installed(release, None))
    monkeypatch.setattr(installed, "ask", lambda *_: {"versions": VERSIONS, "error": None} | told)
    done = run("releases", "--probe", source, "--format", "json")
    expected = [{"module": name, "table": table, "vllm": vllm}] if table else []
    assert (done.code, done.json["disagreements"]) == (1 if table else 0, expected)


# Hostile names


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
        assert done.code in (0, 1) and done.err == ""
        assert harmless(done.out), arguments
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


def test_a_terminal_that_knows_ascii_alone_gets_ascii(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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


# A large checkpoint, and what is imported for it


IMPORTED = """
import sys
from bnbfix.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "bitsandbytes", "numpy", "pydantic", "safetensors", "transformers"} & set(sys.modules)
    print(*sorted(heavy), file=sys.stderr)
"""


def test_a_scan_of_2000_tensors_imports_neither_torch_nor_bitsandbytes_nor_numpy(tmp_path: Path) -> None:
    assert large_checkpoint(tmp_path / "large") > 2000
    for format in ("table", "json"):
        arguments = ("scan", tmp_path / "large", "--vllm", "portable", "--format", format)
        done = process(*arguments, runner=("-c", IMPORTED))
        assert (done.code, done.err) == (0, "\n")
    assert done.json["weights"] == {"nf4": 7 * LAYERS, "F32": 4 * LAYERS}


def test_a_dry_run_imports_neither_torch_nor_bitsandbytes_nor_numpy(pristine: Make) -> None:
    arguments = ("repair", pristine("dense31b", "partial", shards=2), "--vllm", "portable", "--dry-run")
    done = process(*arguments, runner=("-c", IMPORTED))
    assert (done.code, done.err) == (0, "\n") and "dequantized" in done.out


def test_a_scan_reads_headers_and_quant_states_alone(
    pristine: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large_checkpoint(tmp_path / "large")
    shard = tmp_path / "large" / "model.safetensors"
    read, pread = 0, os.pread

    def count(fd: int, n: int, offset: int) -> bytes:
        nonlocal read
        data = pread(fd, n, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", count)
    bnbfix.scan(tmp_path / "large", "portable")
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    texts = (tmp_path / "large" / "config.json").stat().st_size
    assert 0 < read - header - texts < 200 * 7 * LAYERS
