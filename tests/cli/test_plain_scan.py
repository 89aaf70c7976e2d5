"""The command line of a scan is read without typer where that is possible, and then as typer reads it."""

from __future__ import annotations

from typing import Any

import pytest

from bnbfix.cli.plain_scan import parse_plain_scan
from bnbfix.cli.run_scan import ScanOptions
from tests.support.build import Make
from tests.support.command_line import Cli, process

PLAIN = (
    "a",
    "a b --vllm 0.32.0",
    "--vllm=portable a -v --map",
    "a -vv b -q",
    "a -qv --exit-zero",
    "a --json",
    "a --format sarif --output x --format json --output - --json --output y",
    "a --verbose --verbose -- b",
    "a --output=x --format=html",
)
OTHER = (
    "",
    "-h",
    "a --help",
    "a --from list",
    "a --select BNB1",
    "a --fail-on never",
    "a --revision main",
    "a --dry-load",
    "a --format yaml",
    "a --vllm",
    "a --verb",
    "a --map=yes",
)


@pytest.mark.parametrize("line", PLAIN)
def test_it_reads_what_typer_reads(run: Cli, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    seen: list[ScanOptions] = []

    def note(options: ScanOptions) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr("bnbfix.cli.main.run_scan", note)
    monkeypatch.setattr("bnbfix.cli.scan.run_scan", note)
    assert run("scan", *line.split()).code == 0
    monkeypatch.setenv("BNBFIX_VERBOSE", "0")  # typer reads the environment
    assert run("scan", *line.split()).code == 0
    assert parse_plain_scan(["scan", *line.split()]) is None
    plain, typers = map(comparable, seen)
    assert plain == typers and plain["models"] == [m for m in line.split() if m in "ab"]


def comparable(options: ScanOptions) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in options._asdict().items()}


@pytest.mark.parametrize("line", OTHER)
def test_it_leaves_the_rest_to_typer(line: str) -> None:
    assert parse_plain_scan(["scan", *line.split()]) is None
    assert parse_plain_scan(line.split()) is None


def test_a_plain_scan_imports_no_option_parser(pristine: Make) -> None:
    code = (
        "import sys\nfrom bnbfix.cli.main import main\ntry:\n    main()\n"
        "finally:\n    print(sorted({'typer', 'click', 'pydantic', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    for options in ([], ["--json"], ["-v", "--format", "sarif"]):
        source = pristine("dense31b", "partial", shards=2)
        done = process("scan", source, "--vllm", "portable", *options, runner=("-c", code))
        assert (done.code, done.err) == (1, "[]\n")
