"""`bnbfix scan` with several models, in every format, and which findings make which exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnbfix.errors import InputError, OutputError
from bnbfix.report.json import render_lines
from bnbfix.report.outcome import ScanOutcome
from bnbfix.report.scan_table import render_table
from bnbfix.report.terminal import StyledText, TableOptions, write_file, write_lines
from tests.support.build import Make
from tests.support.command_line import Cli, Run, harmless, in_terminal, process
from tests.support.folders import hostile, large_checkpoint
from tests.support.surgery import add_tensor

FISH = "_TYPER_COMPLETE_FISH_ACTION"
FORMATS = ("table", "json", "jsonl", "markdown", "github", "sarif", "html")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    return folder


# Several models


def test_one_that_fails_does_not_stop_the_rest(run: Cli, pristine: Make, broken: Path) -> None:
    bad, good, other = pristine("dense31b", "partial", shards=2), pristine("e4b", "all"), pristine("dense31b", "bf16")
    done = run("scan", broken, bad, other, good, "--vllm", "0.32.0")
    assert done.code == 2
    assert done.out.splitlines()[-3:-1] == ["4 models: 1 loads, 1 wrong, 1 skipped, 1 error", "Repair it:"]
    assert done.commands[-1] == f"bnbfix repair {bad} --out {bad}-repaired --vllm 0.32.0"
    assert "error: config.json: is not valid JSON" in done.words and "Loads in vLLM 0.32.0." in done.words
    assert done.err.splitlines()[0].startswith(f"error: {broken}: config.json: is not valid JSON")
    assert "is an unquantized" in done.err
    assert done.width <= 80 and harmless(done.out)


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["good"], 0),
        (["good", "bad"], 1),
        (["bad", "broken"], 2),
        (["good", "other"], 0),
        (["other"], 3),
        (["bad", "other"], 1),
        (["other", "broken"], 2),
        (["good", "good"], 0),
    ],
)
def test_the_exit_code_of_several(
    run: Cli, pristine: Make, broken: Path, tmp_path: Path, names: list[str], code: int
) -> None:
    models = {
        "good": pristine("e4b", "all"),
        "bad": pristine("dense31b", "partial", shards=2),
        "broken": broken,
        "other": pristine("dense31b", "bf16"),
    }
    lines = (f"{models[n]}  # {n} # is its name\n\n" for n in names)
    (tmp_path / "list").write_text("# models\n" + "".join(lines))
    assert run("scan", "--from", tmp_path / "list", "--vllm", "0.32.0", "--quiet").code == code


def test_the_error_of_a_single_model_is_reported_once(run: Cli) -> None:
    for options in ([], ["--quiet"]):
        hint = "  A model is a folder, or a repo on the Hub: org/name[@revision].\n  bnbfix scan --help\n"
        assert run("scan", "nowhere", *options) == Run(2, "", "error: nowhere: no such folder\n" + hint)
    assert run("scan", "nowhere", "there", "-q").out.startswith("nowhere: error no such folder\nthere: error ")


def test_models_come_from_stdin_too_each_once(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pristine("e4b", "all"), pristine("dense31b", "partial", shards=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{a}\n  # {a}\n{b}\n{a}\n"))
    done = run("scan", b, "--from", "-", "--vllm", "0.32.0", "--quiet")
    assert done.out == f"{b}: wrong BNB102 BNB103\n{a}: loads\n2 models: 1 loads, 1 wrong\n"


@pytest.mark.parametrize(
    ("text", "words"), [(None, "--from cannot be read (No such file"), ("# none\n", "names no model")]
)
def test_a_list_that_cannot_be_read_is_a_usage_error(run: Cli, tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "list").write_text(text)
    done = run("scan", "--from", tmp_path / "list")
    assert (done.code, done.out) == (2, "") and words in done.err


def test_lines_come_as_they_are_known() -> None:
    def outcomes() -> Iterator[ScanOutcome]:
        yield ScanOutcome("first", error=InputError("no"))
        raise RuntimeError("asked for more")

    assert json.loads(next(render_lines(outcomes())))["model"] == "first"
    lines = render_table(outcomes(), TableOptions(), several=True, with_map=False)
    assert next(lines)[0].text == "first" and next(lines)[0].text == "error: no"


# Formats


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shows_hostile_names_harmless(run: Cli, checkpoint: Make, format: str) -> None:
    source = hostile(checkpoint("dense31b", "skip"))
    for options in ([], ["--verbose", "--map"], ["--quiet"]):
        done = run("scan", source, "--vllm", "portable", "--format", format, *options)
        assert (done.code, done.err) == (1, "")
        assert harmless(done.out.replace("\ufe0f", "").replace("\u200b", ""))
    if format not in ("table", "json", "jsonl"):
        return
    assert r"\x1b[31m\x07" in done.out or format == "table" or r"\u001b[31m\u0007" in done.out


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_writes_to_an_ascii_stdout(checkpoint: Make, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    source = checkpoint("dense31b", "skip")
    config = (source / "config.json").read_text("utf-8")
    (source / "config.json").write_text(config.replace('"lm_head"', '"\u4e2d"'), "utf-8")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = process("scan", source, "--vllm", "portable", "--format", format, "--map")
    assert (done.code, done.err) == (1, "") and done.out.isascii()
    assert "\\u2500" not in done.out  # a rule is drawn, not spelled


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "table"])
def test_output_writes_the_document_to_a_file_and_the_table_to_stdout(
    run: Cli, pristine: Make, tmp_path: Path, format: str
) -> None:
    source, out = pristine("dense31b", "partial", shards=2), tmp_path / "out"
    arguments = ("scan", source, "--vllm", "portable")
    done = run(*arguments, "--format", format, "--output", out)
    assert (done.code, done.err) == (1, "")
    assert done.out == run(*arguments).out
    assert out.read_text("utf-8") == run(*arguments, "--format", format).out
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_replaces_a_file_and_nothing_else(run: Cli, pristine: Make, tmp_path: Path) -> None:
    arguments = ("scan", pristine("e4b", "all"), "--vllm", "0.32.0", "--format", "jsonl", "--output")
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    assert run(*arguments, tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "old").read_text())["verdict"] == "loads"
    for bad, words in ((tmp_path, "is not a regular file"), (tmp_path / "no" / "x", "cannot be written (No such file")):
        done = run(*arguments, bad)
        assert done.code == 2 and words in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "old"]
    done = run("scan", ".", "--output", tmp_path / "x")
    assert done.code == 2 and "--output needs a --format" in done.err
    assert done.commands == [f"bnbfix scan . --output {tmp_path / 'x'} --format json"]


def test_several_formats_each_go_to_a_file_of_their_own(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source, json_file, sarif_file = pristine("dense31b", "partial", shards=2), tmp_path / "a", tmp_path / "b"
    arguments = ("scan", source, "--vllm", "portable")
    pairs = ("--format", "json", "--output", json_file, "--format", "sarif", "--output", sarif_file)
    done = run(*arguments, *pairs)
    assert done == run(*arguments)
    assert json_file.read_text("utf-8") == run(*arguments, "--json").out
    assert sarif_file.read_text("utf-8") == run(*arguments, "--format", "sarif").out
    done = run(*arguments, *pairs, "--format", "markdown")
    assert done == run(*arguments, "--format", "markdown")
    for dash in ("--json --output -", "--format json --output -"):
        assert run(*arguments, *dash.split()) == run(*arguments, "--json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("format", ["html", "markdown"])
def test_documents_for_people_state_what_a_repair_costs(run: Cli, pristine: Make, tmp_path: Path, format: str) -> None:
    arguments = ("scan", pristine("dense31b", "skip"), "--vllm", "0.32.0", "--format", format)
    for more in ([], ["--output", tmp_path / "x", "--quiet"]):
        done = run(*arguments, *more)
        text = (tmp_path / "x").read_text("utf-8") if more else done.out
        assert "Repair it (only config.json changes):" in text and "--in-place --vllm 0.32.0" in text


@pytest.mark.parametrize(
    "options",
    ["--json --format sarif", "--json --output - --format sarif", "--json --output x --format sarif --output x"],
)
def test_two_formats_for_one_place_are_a_usage_error(run: Cli, options: str) -> None:
    done = run("scan", ".", *options.split())
    assert done.code == 2 and "each --format needs an --output of its own" in done.error


@pytest.mark.parametrize("format", ["json", "jsonl", "sarif", "github", "markdown", "html"])
def test_an_error_is_in_the_document_too(run: Cli, broken: Path, format: str) -> None:
    done = run("scan", broken, "--format", format)
    assert done.code == 2 and "is not valid JSON" in done.out and "error: config.json: is not" in done.err


def test_the_map_in_the_terminal(run: Cli, pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    done = run("scan", source, "--vllm", "portable", "--map")
    lines = done.out.splitlines()
    assert "  q      Q!QQQQ" in lines and "  v      Q!=QQ=" in lines and "  ! in conflict; a repair fixes it" in lines
    assert done.width <= 80
    assert "Q!QQQQ" not in run("scan", source, "--vllm", "portable", "--format", "html").out
    assert "Q!QQQQ" not in run("scan", source, "--vllm", "portable", "--verbose").out


# Which findings count


def test_select_ignore_and_fail_on(run: Cli, pristine: Make) -> None:
    source = pristine("e4b", "all", shards=2)

    def code(*options: str) -> int:
        return run("scan", source, "--vllm", "0.28.0", *options).code

    assert code() == 1  # BNB107, degraded, and a note
    assert (code("--fail-on", "wrong"), code("--fail-on", "never"), code("--exit-zero")) == (0, 0, 0)
    assert (code("--fail-on", "degraded"), code("--fail-on", "note")) == (1, 1)
    assert (code("--ignore", "BNB107"), code("--ignore", "BNB107", "--fail-on", "note")) == (0, 1)
    assert (code("--select", "BNB2,BNB3"), code("--select", "bnb1"), code("--ignore", "BNB3,BNB1")) == (0, 1, 0)
    done = run("scan", source, "--vllm", "0.28.0", "--ignore", "BNB107")
    assert "Degraded in vLLM 0.28.0. 1 finding left out by --select or --ignore." in done.words
    assert "Repair it" not in done.words and "BNB107 degraded" not in done.words
    assert run("scan", source, "--select", "XYZ").err.startswith("error: --select 'XYZ' begins no finding's code")


def test_an_invalid_quant_state_can_only_be_ignored_by_its_code(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "single")
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"blocksize": 64', b'"blocksize": 32', 1))
    for options in ([], ["--fail-on", "never"], ["--select", "BNB2"]):
        assert run("scan", source, "--vllm", "0.22.1", *options).code == 2
    assert run("scan", source, "--vllm", "0.22.1", "--ignore", "BNB201", "--fail-on", "never").code == 0


def test_the_environment_sets_options_and_the_command_line_wins(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pristine("dense31b", "partial", shards=2)
    monkeypatch.setenv("BNBFIX_VLLM", "0.32.0")
    monkeypatch.setenv("BNBFIX_FORMAT", "jsonl")
    monkeypatch.setenv("BNBFIX_IGNORE", "BNB3,BNB103")
    monkeypatch.setenv("BNBFIX_FAIL_ON", "fails")
    done = run("scan", source)
    assert done.code == 0  # wrong is less than fails
    assert (done.json["target"], [f["code"] for f in done.json["findings"]]) == ("0.32.0", ["BNB102"])
    done = run("scan", source, "--vllm", "0.22.1", "--format", "table", "--fail-on", "degraded", "--ignore", "BNB3")
    assert done.code == 1 and "BNB103 fails" in done.words


def test_quiet_says_nothing_where_all_is_well(run: Cli, pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip")
    quiet = ("--quiet",)
    assert run("repair", source, "--vllm", "portable", "--out", tmp_path / "out", *quiet) == Run(0, "", "")
    assert run("verify", tmp_path / "out", "--source", source, *quiet) == Run(0, "", "")
    (tmp_path / "out" / "more.txt").touch()
    done = run("verify", tmp_path / "out", *quiet)
    assert done.code == 1 and "is not in the record" in done.out


# The terminal


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = (StyledText("[red]fails", "bold red"), StyledText(" x"))
    write_lines([line])
    assert capsys.readouterr().out == "[red]fails x\n"
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    write_lines([line])
    out = capsys.readouterr().out
    assert "\x1b[1;31m[red]fails\x1b[0m x" in out
    monkeypatch.setenv("NO_COLOR", "1")
    write_lines([line])
    assert "\x1b[1;31m" not in capsys.readouterr().out


def test_long_names_are_broken_in_the_summary() -> None:
    long = ScanOutcome("x/" * 60, error=InputError("y " * 60, where="z" * 100))
    for width in (40, 80, 200):
        lines = [
            "".join(s.text for s in line)
            for line in render_table([long], TableOptions(width), several=True, with_map=False)
        ]
        assert max(len(line.rstrip()) for line in lines) <= width


@pytest.mark.parametrize(
    ("shell", "environment", "want"),
    [
        ("bash", {"COMP_WORDS": "bnbfix sc", "COMP_CWORD": "1"}, "scan"),
        ("bash", {"COMP_WORDS": "bnbfix scan --fail", "COMP_CWORD": "2"}, "--fail-on"),
        ("bash", {"COMP_WORDS": "bnbfix scan --vllm 0.32", "COMP_CWORD": "3"}, "0.32.0"),
        ("bash", {"COMP_WORDS": "bnbfix repair --vllm l", "COMP_CWORD": "3"}, "latest"),
        ("bash", {"COMP_WORDS": "bnbfix scan --select BNB101,BNB10", "COMP_CWORD": "3"}, "BNB101,BNB102"),
        ("bash", {"COMP_WORDS": "bnbfix explain BNB2", "COMP_CWORD": "2"}, "BNB205"),
        ("fish", {"_TYPER_COMPLETE_ARGS": "bnbfix scan --format sa", FISH: "get-args"}, "sarif"),
    ],
)
def test_shells_complete_commands_options_and_values(
    monkeypatch: pytest.MonkeyPatch, shell: str, environment: dict[str, str], want: str
) -> None:
    for name, value in (environment | {"_BNBFIX_COMPLETE": f"complete_{shell}"}).items():
        monkeypatch.setenv(name, value)
    runner = ("-c", "import sys; sys.argv[0] = 'bnbfix'; from bnbfix.cli.main import main; main()")
    assert want in process(runner=runner).out.split()


PROBE = """
import sys
from bnbfix.cli.main import main
try:
    main()
finally:
    ours = {m.removeprefix("bnbfix.") for m in sys.modules if m.startswith("bnbfix.")}
    seen = {"report.layer_map", "report.results", "planner.plan", "writer.write", "report.html", "report.sarif"}
    print(*sorted(ours & seen | {"rich"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("options", "imported"),
    [
        ([], ""),
        (["--format", "json"], ""),
        (["--map"], "planner.plan report.layer_map"),
        (["--format", "sarif"], "report.sarif"),
        (["--format", "html"], "planner.plan report.html report.layer_map"),
    ],
)
def test_a_format_is_imported_when_it_is_asked_for(tmp_path: Path, options: list[str], imported: str) -> None:
    large_checkpoint(tmp_path / "large")
    done = process("scan", tmp_path / "large", "--vllm", "portable", *options, runner=("-c", PROBE))
    assert (done.code, done.err.strip()) == (0, imported)


# What to run next


def test_what_has_no_fix_is_explained_and_not_what_has_one(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    add_tensor(source / "model.safetensors", "score.weight", "BF16", [2, 1], bytes(4))
    done = run("scan", source, "--vllm", "portable")
    assert "BNB101 fails" in done.words and "No repair is known:" in done.words
    assert done.commands == ["bnbfix explain BNB113"]
    done = run("repair", source, "--vllm", "portable", "--out", source.parent / "out")
    assert done.code == 1 and "score.weight: the release has no parameter for it (BNB113)" in done.error
    assert done.commands == [f"bnbfix scan {source} --vllm portable"]


def test_a_target_that_has_no_repair_is_followed_by_the_nearest_that_has(run: Cli, pristine: Make) -> None:
    source = pristine("moe26b", "skip")
    done = run("scan", source, "--vllm", "portable")
    assert "No repair in 4 bits serves every vLLM release. The nearest is vLLM 0.33.0 (" in done.words
    assert done.commands == [f"bnbfix repair {source} --out {source}-repaired --vllm 0.33.0"]
    done = run("repair", source, "--vllm", "portable", "--out", source.parent / "out")
    assert done.commands == [f"bnbfix repair {source} --out {source}-repaired --vllm 0.33.0"]


def test_names_of_tensors_are_not_broken(run: Cli, checkpoint: Make) -> None:
    source, name = checkpoint("dense31b", "all"), f"{'part.' * 20}weight"
    add_tensor(source / "model.safetensors", name, "BF16", [2, 1], bytes(4))
    assert f"    {name}" in run("scan", source, "--vllm", "0.32.0").out.splitlines()


# Terminals and files


@pytest.mark.parametrize("columns", [60, 100])
def test_a_table_is_as_wide_as_its_terminal(pristine: Make, columns: int) -> None:
    done = in_terminal(columns, "scan", pristine("dense31b", "partial", shards=2), "--vllm", "0.22.1")
    lines = done.out.splitlines()
    assert done.code == 1 and len(lines) > 10
    assert columns - 12 < max(len(line) for line in lines if not line.startswith(("  bnbfix ", "    "))) <= columns


def test_errors_and_warnings_are_folded_between_words(pristine: Make, tmp_path: Path) -> None:
    source, name = pristine("dense31b", "partial", shards=2), tmp_path / ("n" * 100)
    name.mkdir()
    (name / "file").touch()
    done = in_terminal(60, "repair", source, "--out", name, "--vllm", "9.9")
    plain = process("repair", source, "--out", name, "--vllm", "9.9")
    assert done.code == plain.code == 2
    assert [*map(len, plain.err.splitlines()[:2])] > [60, 60] and done.out.split() == plain.err.split()
    assert all(len(line) <= 60 or str(name) in line for line in done.out.splitlines())
    assert done.out.splitlines()[-1] == plain.err.splitlines()[-1], "the command is in one line"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_document_that_breaks_off_leaves_the_file_as_it_was(tmp_path: Path, error: BaseException) -> None:
    def parts() -> Iterator[str]:
        yield "new"
        raise error

    (tmp_path / "file").write_text("old")
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_file(tmp_path / "file", parts())
    assert not isinstance(error, OSError) or str(caught.value) == (
        f"{tmp_path / 'file'}: cannot be written (No space left on device)"
    )
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_file(tmp_path / "file", ["n", "ew"])
    assert (tmp_path / "file").read_text() == "new" and os.listdir(tmp_path) == ["file"]
