"""Exit codes, help, broken pipes, and what the command line imports."""

from __future__ import annotations

import gc
import importlib.abc
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bnbfix
from bnbfix.__main__ import main
from tests.support.build import Make
from tests.support.command_line import EVIL, Cli, Run, harmless, process
from tests.support.folders import LAYERS, large_checkpoint


def test_exit_code_0_clean(run: Cli, pristine: Make) -> None:
    assert run("scan", pristine("e4b", "all"), "--vllm", "0.32.0").code == 0


def test_exit_code_1_findings_remain_and_exit_zero(run: Cli, pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    usual, zero = (run("scan", source, "--vllm", "portable", *o) for o in ([], ["--exit-zero"]))
    assert (usual.code, zero.code) == (1, 0)
    assert usual.out == zero.out
    assert run("scan", source, "--vllm", "portable", "--exit-zero", "--format", "json").code == 0


@pytest.mark.parametrize("command", [["scan"], ["repair", "--dry-run"]], ids=["scan", "repair"])
@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ("bf16", "is an unquantized Gemma4ForConditionalGeneration"),
        ("adapter", "is a PEFT adapter"),
        ("empty", "has no safetensors files"),
        ("mamba", "is an unquantized MambaForCausalLM"),
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
        config = "{}" if quant == "empty" else '{"architectures": ["MambaForCausalLM"]}'
        (source / ("adapter_config.json" if quant == "adapter" else "config.json")).write_text(config)
    if quant == "mamba":
        (source / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = run(*command, source)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error: ") and words in done.err
    assert run("scan", source, "--exit-zero").code == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "nowhere"], "error: nowhere: no such folder"),
        (["scan", "pyproject.toml"], "is a file; "),
        (["scan", "examples"], "config.json: is missing"),
        (["scan", "examples", "--vllm", "0.1.0"], "is not a vLLM release that bnbfix knows"),
        (["scan"], "missing argument 'MODEL'"),
        (["scan", ".", "--format", "yaml"], "yaml"),
        (["scan", ".", "--nonsense"], "--nonsense"),
        (["frobnicate"], "frobnicate"),
        (["repair", "nowhere"], "repair needs --out DIR, --in-place, or --dry-run to only see the plan"),
        (["repair", "nowhere", "--out", "x"], "error: nowhere: no such folder"),
        (["verify", "nowhere"], "error: nowhere: no such folder"),
        (["repair"], "missing argument 'MODEL'"),
        (["repair", ".", "--in-place", "--out", "x"], "--in-place writes no copy"),
        (["schema", "everything"], "everything"),
        (["explain", "BNB999"], "'BNB999' is not a finding's code"),
    ],
)
def test_exit_code_2_bad_usage(run: Cli, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert words in done.error and done.out == ""
    assert len(done.commands) == 1 and done.err.endswith(f"  {done.commands[0]}\n")


def test_errors_of_the_option_parser_are_written_like_others(run: Cli) -> None:
    for arguments in (
        ["scan", ".", "--format", "yaml"],
        ["scan", ".", "--nope"],
        ["nope"],
        ["verify"],
        ["schema", "x"],
    ):
        words = run(*arguments).error.removeprefix("error: ")
        assert words[0].islower() and "Value error" not in words and not words.endswith(".")


def test_exit_code_2_a_revision_of_nothing(run: Cli, tmp_path: Path) -> None:
    done = run("verify", tmp_path, "--revision", "main")
    assert (done.code, done.out, done.error) == (2, "", "error: a revision needs a source on the Hub")
    assert done.commands == ["bnbfix verify --help"]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["fleet"], "fleet"), (["fleet", "scna"], "fleet"), (["fleet", "scan"], "fleet scan"), (["scan"], "scan")],
)
def test_the_help_that_an_error_names_is_that_of_the_command(run: Cli, arguments: list[str], command: str) -> None:
    done = run(*arguments)
    assert done.code == 2 and done.error and done.commands == [f"bnbfix {command} --help"]


def test_exit_code_2_an_unknown_release(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("dense31b", "skip"), "--vllm", "0.1.0")
    assert (done.code, done.out) == (2, "")
    assert "error: '0.1.0' is not a vLLM release that bnbfix knows" in done.err
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
    assert (done.code, done.out, done.error) == (2, "", "error: /models/x: Permission denied")


def test_a_bug_is_not_dressed_up_as_an_error_of_the_user(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("bnbfix.report.outcome.scan_checkpoint", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("scan", pristine("dense31b", "skip"))


def test_a_closed_pipe_gives_no_traceback(pristine: Make) -> None:
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
    again = f"  bnbfix {' '.join(arguments)}\n"
    words = {"gone": (1, ""), "full": (2, f"error: input/output: No space left on device\n{again}")}
    assert (done.returncode, done.stderr) == words[what]


def test_an_interrupted_scan_ends_with_130(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnbfix.report.outcome.scan_checkpoint", interrupted)
    done = run("scan", pristine("dense31b", "skip"))
    assert (done.code, done.out) == (130, "")
    assert "interrupted" in done.err and "Traceback" not in done.err


def test_version(run: Cli) -> None:
    assert run("-V") == Run(0, f"bnbfix {bnbfix.__version__}\n", "")
    assert run("--version") == Run(0, f"bnbfix {bnbfix.__version__}\n", "")
    assert process("--version") == Run(0, f"bnbfix {bnbfix.__version__}\n", "")


@pytest.mark.parametrize(
    ("options", "logged", "detailed"), [([], False, False), (["-v"], True, False), (["-vv"], True, True)]
)
def test_verbose_logs_to_stderr(run: Cli, pristine: Make, options: list[str], logged: bool, detailed: bool) -> None:
    command = ("repair", pristine("e4b", "all"), "--vllm", "0.32.0", "--dry-run")
    quiet, done = run(*command), run(*command, *options)
    assert (done.code, done.out) == (quiet.code, quiet.out) and quiet.err == ""
    assert ("info: bnbfix.api: target: vLLM 0.32.0" in done.err) == logged
    assert logging.getLogger("bnbfix").getEffectiveLevel() == (
        logging.DEBUG if detailed else logging.INFO if logged else logging.WARNING
    )
    assert run(*command).err == ""  # and no handler is left


def test_a_scan_logs_from_vv_on(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("scan", pristine("e4b", "all"), "--vllm", "0.32.0")
    assert run(*command, "-v").err == ""
    done = run(*command, "-vv")
    assert done.out == run(*command, "--verbose").out != run(*command).out
    assert "info: bnbfix.report.outcome: " in done.err and harmless(done.err)
    monkeypatch.setenv("BNBFIX_VERBOSE", "1")
    assert run(*command) == run(*command, "-v")


def test_names_in_the_log_are_harmless(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pristine("e4b", "all"), tmp_path / EVIL)
    done = run("scan", tmp_path / EVIL, "--vllm", "0.32.0", "-vv")
    assert r"\x1b[31m" in done.err and harmless(done.err)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_without_arguments_there_is_help(run: Cli, arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.code, done.err) == (0, "")
    text = done.out
    assert "Usage: " in text and "HF_TOKEN" in text and "Exit codes" in text and "<bool>" not in text
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
    assert (done.code, done.err) == (0, "") and done == run(command, "-h")
    assert f"Example: bnbfix {command}" in done.out
    assert all(option in done.out for option in options)
    assert "<bool>" not in done.out


@pytest.mark.parametrize(("command", "default"), [("scan", "one per core"), ("repair", "1")])
def test_the_help_of_a_fleet_gives_one_default_for_each_option(run: Cli, command: str, default: str) -> None:
    words = re.sub(r"[\s│]+", " ", run("fleet", command, "--help").out)
    assert f"Processes here. Default: {default}. --rate" in words
    assert f"not done again. Default: fleet-{command}.jsonl." in words


IMPORTED = """
import sys
from bnbfix.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "bitsandbytes", "numpy", "safetensors", "transformers"} & set(sys.modules)
    print(*sorted(heavy), file=sys.stderr)
"""


def test_a_scan_of_2000_tensors_imports_neither_torch_nor_bitsandbytes_nor_numpy(tmp_path: Path) -> None:
    assert large_checkpoint(tmp_path / "large") > 2000
    for format in ("table", "json"):
        arguments = ("scan", tmp_path / "large", "--vllm", "portable", "--format", format)
        done = process(*arguments, runner=("-c", IMPORTED))
        assert (done.code, done.err) == (0, "\n")
    assert done.json["weights"] == {"nf4": 7 * LAYERS, "F32": 6 * LAYERS + 2}


def test_a_dry_run_imports_neither_torch_nor_bitsandbytes_nor_numpy(pristine: Make) -> None:
    arguments = ("repair", pristine("dense31b", "partial", shards=2), "--vllm", "portable", "--dry-run")
    done = process(*arguments, runner=("-c", IMPORTED))
    assert (done.code, done.err) == (0, "\n") and "dequantized" in done.out


def test_a_scan_only_reads_headers_and_quant_states(
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


def test_an_interrupt_of_the_last_words_ends_with_130_too(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnbfix.cli.main.print_error", interrupted)
    assert run("repair", "nowhere", "--out", "x") == Run(130, "", "")


def test_an_interrupt_of_the_imports_ends_with_130_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "bnbfix.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "bnbfix.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    try:
        with pytest.raises(SystemExit, match="130"):
            main()
    finally:
        gc.enable()
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_garbage_is_collected_while_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    monkeypatch.setattr("bnbfix.cli.main.main", lambda: found.append(gc.isenabled()))
    try:
        main()
    finally:
        gc.unfreeze()
    assert found == [True]


def test_a_release_that_is_newer_than_the_table_is_warned_of_before_a_repair(run: Cli, pristine: Make) -> None:
    done = run("repair", pristine("e4b", "all"), "--vllm", "0.99.0", "--dry-run")
    assert done.code == 0 and done.words.startswith("Nothing to do")
    assert done.err.startswith("warning: ") and "0.99.0" in done.err and done.err.count("\n") == 1
