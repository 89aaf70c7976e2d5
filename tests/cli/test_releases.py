"""`bnbfix releases`, with --probe, and `bnbfix explain`. No test has a vLLM: its answers are made up."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.checkpoint.checkpoint import open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.manifest import parameters
from bnbfix.engines.targets import find_range
from bnbfix.engines.vllm import probe
from bnbfix.engines.vllm import releases as vllm_releases
from bnbfix.engines.vllm.profiles import known_classes
from bnbfix.engines.vllm.recorded import expect
from bnbfix.models.inspection import inspect_checkpoint
from bnbfix.rules.rule import Code
from tests.cli.conftest import VERSIONS, Answer
from tests.support.build import Make
from tests.support.command_line import Cli, Run, harmless, install_vllm


def test_releases_has_a_row_for_each_range_and_fits_80_columns(run: Cli) -> None:
    done = run("releases")
    assert (done.code, done.err) == (0, "")
    rows = [line.split()[0] for line in done.out.splitlines() if line.startswith("0.")]
    assert rows == [r.name for r in vllm_releases.ranges()]
    for name in known_classes():
        assert name in done.out
    assert done.width <= 80
    assert "\u2026" not in done.out  # nothing is cut off
    assert "No vLLM is installed here." in done.words


def test_releases_names_the_installed_vllm(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(monkeypatch, "0.27.1")
    assert "Installed here: vLLM 0.27.1." in run("releases").words


def test_releases_in_json_is_the_table(run: Cli) -> None:
    done = run("releases", "--format", "json")
    assert (done.code, done.err, done.json["schema"]) == (0, "", 1)
    path = Path(vllm_releases.__file__).with_name("releases.json")
    for row, wanted in zip(done.json["ranges"], json.loads(path.read_text())["ranges"], strict=True):
        assert "Gemma4ForConditionalGeneration" in row["classes"]
        assert row == wanted | {"engine": "vLLM", "classes": row["classes"]}


@pytest.mark.parametrize("code", list(Code), ids=lambda c: c.value)
def test_every_code_is_explained(run: Cli, code: Code) -> None:
    done = run("explain", code.value)
    assert (done.code, done.err) == (0, "")
    assert done.words.startswith(f"{code.value} {code.explanation.severity}: {code.explanation.title}")
    assert code.explanation.why in done.words and f"Fix: {code.explanation.fix}" in done.words
    assert all(url in done.words for url in code.explanation.upstream)
    assert done.width <= 80
    assert run("explain", code.value.lower()).out == done.out


def test_without_a_code_all_are_listed_with_their_severity(run: Cli) -> None:
    done = run("explain")
    assert (done.code, done.err) == (0, "") and done.width <= 80 and done.commands == ["bnbfix explain BNB101"]
    rows = {line.split()[0]: line.split()[1] for line in done.out.splitlines() if line.startswith("BNB")}
    assert rows == {c.value: str(c.explanation.severity) for c in Code}
    doc = run("explain", "--json").json
    assert [c["code"] for c in doc["codes"]] == [c.value for c in Code]
    assert run("explain", "bnb205", "--json").json == doc["codes"][list(Code).index(Code.PICKLES)]


def test_explaining_an_unknown_code_leads_to_the_list(run: Cli) -> None:
    assert run("explain", "bnb1") == Run(2, "", "error: 'bnb1' is not a finding's code\n  bnbfix explain\n")


@pytest.mark.parametrize("command", [["releases", "--probe"], ["verify", "--load"]], ids=["probe", "load"])
def test_without_a_vllm_there_is_nothing_to_ask(run: Cli, pristine: Make, tmp_path: Path, command: list[str]) -> None:
    source = pristine("text", "single", shards=2)
    bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu")
    done = run(*command, tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith("error: no vLLM is installed")
    assert "  Run bnbfix in the environment that serves the model.\n" in done.err
    assert done.commands == ["pip install vllm"]


def probed(source: Path, release: str, **changes: bool) -> dict[str, Any]:
    """The answer of a vLLM that does what the table says, but for `changes`."""
    inspection = inspect_checkpoint(open_checkpoint(LocalSource.open(source)))
    skip = inspection.checkpoint.skip_modules
    row = find_range(release)
    assert row is not None
    expectation = expect(inspection.model, row)
    assert expectation is not None
    found = {p.module: p.quantized for p in parameters(inspection.linears, expectation, skip)}
    modules = [{"name": name, "quantized": quantized} for name, quantized in (found | changes).items()]
    return {"modules": modules, "skips": {"lm_head": ["lm_head"], "no\x1bsuch": []}}


def test_probe_agrees_with_the_table(run: Cli, pristine: Make, answer: Answer) -> None:
    source = pristine("dense31b", "all")
    answer(probed(source, "0.32.0"))
    done = run("releases", "--probe", source)
    assert (done.code, done.err) == (0, "")
    assert "vLLM 0.32.0, transformers 5.14.1; the table's row is 0.32.0-" in done.words
    assert "skip entry lm_head: matches 1 module" in done.words
    assert r"skip entry no\x1bsuch: matches nothing" in done.words
    assert done.words.endswith("The table agrees with this vLLM.")
    assert done.width <= 80 and harmless(done.out)
    doc = run("releases", "--probe", source, "--format", "json").json
    assert doc["disagreements"] == [] and len(doc["modules"]) > 20 and doc["release"]["first"] == "0.32.0"


def test_probe_reports_where_the_table_is_wrong(run: Cli, pristine: Make, answer: Answer) -> None:
    source = pristine("dense31b", "all")
    name = next(m["name"] for m in probed(source, "0.32.0")["modules"] if m["quantized"])
    answer(probed(source, "0.32.0", **{name: False}))
    done = run("releases", "--probe", source)
    assert (done.code, done.err) == (1, "")
    assert f"{name}: the table says quantized, vLLM unquantized" in done.words
    assert done.words.endswith("The table disagrees with this vLLM; its row needs a fix.")
    doc = run("releases", "--probe", source, "--format", "json").json
    assert [(d["module"], d["table"]) for d in doc["disagreements"]] == [(name, "quantized")]


def test_a_vllm_that_cannot_build_the_model_is_an_error(run: Cli, pristine: Make, answer: Answer) -> None:
    answer({"error": "ValueError: no such architecture"})
    done = run("releases", "--probe", pristine("dense31b", "all"))
    assert (done.code, done.out) == (2, "")
    assert done.error.endswith("vLLM cannot build the model: ValueError: no such architecture")


def test_a_vllm_that_is_broken_or_slow_is_an_error_in_one_line(
    run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process itself is started; it finds no vLLM, or has no time to.
    source = pristine("text", "single", shards=2)
    install_vllm(monkeypatch, "0.32.0")
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(source))
    done = run("releases", "--probe", source)
    assert (done.code, done.out) == (2, "")
    if find_spec("vllm") is None:
        assert "vLLM cannot build the model: ModuleNotFoundError: No module named 'vllm'" in done.err
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.01)
    done = run("releases", "--probe", source)
    assert (done.code, done.out, done.error) == (2, "", f"error: {source}: vLLM gave no answer within 0 s")
    assert done.commands == [f"bnbfix releases --probe {source}"]


@pytest.mark.parametrize(
    ("does", "words", "hint"),
    [
        ("echo one; echo two >&2; exit 3", "vLLM ended with status 3 and no answer", "two"),
        ("exit 0", "vLLM ended with status 0 and no answer", None),
        ("kill -9 $$", "vLLM ended with status -9 and no answer", "It was killed; was there too little memory?"),
    ],
)
def test_a_vllm_that_ends_without_an_answer_is_reported_with_its_last_line(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, words: str, hint: str | None
) -> None:
    source = pristine("text", "single", shards=2)
    (tmp_path / "python").write_text(f"#!/bin/sh\n{does}\n")
    (tmp_path / "python").chmod(0o755)
    install_vllm(monkeypatch, "0.32.0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    done = run("releases", "--probe", source)
    assert (done.code, done.out) == (2, "")
    hints = [hint, f"bnbfix releases --probe {source}"] if hint else [f"bnbfix releases --probe {source}"]
    assert done.err == f"error: {source}: {words}\n" + "".join(f"  {line}\n" for line in hints)


@pytest.mark.parametrize(
    ("release", "name", "quantized", "table"),
    [
        ("0.32.0", "model.layers.0.experts", True, None),
        ("0.32.0", "model.layers.0.experts", False, "quantized"),
        ("0.32.0", "model.layers.0.moe.experts", True, "experts under experts"),
        ("0.27.1", "model.layers.0.moe.experts", True, None),
        ("0.27.1", "model.layers.0.experts", True, "experts under moe.experts"),
    ],
)
def test_probe_reports_where_experts_are_elsewhere(
    run: Cli,
    pristine: Make,
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    name: str,
    quantized: bool,
    table: str | None,
) -> None:
    source = pristine("moe26b", "all")
    found = probed(source, release, **{name: quantized})
    found["modules"] = [m for m in found["modules"] if ".experts" not in m["name"] or m["name"] == name]
    install_vllm(monkeypatch, release)
    monkeypatch.setattr(probe, "run_worker", lambda *_, **__: [{"versions": VERSIONS, "error": None} | found])
    done = run("releases", "--probe", source, "--format", "json")
    disagreements = [(d["module"], d["table"]) for d in done.json["disagreements"]]
    assert (done.code, disagreements) == ((1, [(name, table)]) if table else (0, []))
