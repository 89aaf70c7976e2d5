"""What `bnbfix scan` prints for people, and the same as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

import bnbfix
from bnbfix.engines.vllm import releases as vllm_releases
from bnbfix.report.text import SHOWN
from bnbfix.rules.rule import Code
from tests.support.build import Make
from tests.support.command_line import Cli, harmless, install_vllm, process


@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=["short", "verbose"])
@pytest.mark.parametrize(("family", "quant"), [("dense31b", "partial"), ("e4b", "all"), ("moe26b", "all")])
def test_a_scan_fits_80_columns(run: Cli, pristine: Make, family: str, quant: str, verbose: list[str]) -> None:
    done = run("scan", pristine(family, quant, shards=2), "--vllm", "portable", *verbose)
    assert done.err == "" and done.code == 1
    assert len(done.out.splitlines()) > 10
    assert done.width <= 80
    assert not any(line.endswith(" ") for line in done.out.splitlines())
    assert harmless(done.out)


def test_a_piped_scan_fits_80_columns_too(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    done = process("scan", source, "--vllm", "portable")
    assert (done.code, done.err) == (1, "")
    assert done.width <= 80
    assert harmless(done.out)


def test_a_width_that_is_not_a_number_is_ignored(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "model.language_model.layers.{2,5}.self_attn.k_proj.weight x2" in done.words
    assert "Fix: " in done.words
    assert "Fails in vLLM 0.22.1." in done.words
    assert "Repair it (" in done.words and " -> 1.1 MB):" in done.words
    assert done.commands[0].startswith("bnbfix repair ") and done.commands[0].endswith("-repaired --vllm 0.22.1")


def test_verbose_names_every_tensor_and_the_notes(run: Cli, pristine: Make) -> None:
    source = pristine("e4b", "all", shards=2)
    short, long = (run("scan", source, "--vllm", "portable", *v) for v in ([], ["--verbose"]))
    hidden = "model.vision_tower.encoder.layers.1.self_attn.q_proj.linear.weight"
    assert hidden not in short.words and "shown with --verbose" in short.words
    flat = "".join(long.out.split())
    assert hidden in flat and "shownwith--verbose" not in flat
    names = {t for f in bnbfix.scan(source, "portable").findings for t in f.tensors}
    assert all(name in flat for name in names)


def test_releases_that_do_not_know_the_class_do_not_count(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("unified12b", "skip"), "--vllm", "portable")
    assert "Fails in 4 of 9 release ranges (0.23.0-0.27.1)." in done.words  # the tenth does not know the class
    assert "Loads with wrong weights in 5 of 9 release ranges (0.28.0-0.33.0)." in done.words
    words = run("scan", pristine("dense31b", "partial", shards=2), "--vllm", "portable").words
    assert "Fails in 5 of 10 release ranges (0.19.0-0.27.1)." in words


def test_a_clean_scan_says_so(run: Cli, pristine: Make) -> None:
    done = run("scan", pristine("e4b", "all", shards=2), "--vllm", "0.32.0")
    assert (done.code, done.err) == (0, "")
    assert "Loads in vLLM 0.32.0. Serve it:" in done.words
    install, serve = done.commands
    assert install == "pip install vllm==0.32.0 vllm-bnb-plugin"
    assert done.out.endswith(f"  {serve}\n") and serve == f"vllm serve {pristine('e4b', 'all', shards=2)}"


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
    install_vllm(monkeypatch, "0.22.1")
    assert run("scan", source, "--format", "json").json["target"] == "0.22.1"
    assert run("scan", source, "--format", "json", "--vllm", "0.32.0").json["target"] == "0.32.0"
    install_vllm(monkeypatch, "0.32.0")
    done = run("scan", pristine("e4b", "all"))
    assert done.code == 1 and "BNB304" in done.words


def test_of_many_repairs_the_first_are_named(run: Cli, pristine: Make, tmp_path: Path) -> None:
    models = [tmp_path / f"m{n}" for n in range(SHOWN + 2)]
    for model in models:
        model.symlink_to(pristine("dense31b", "skip"))
    done = run("scan", *models, "--vllm", "0.22.1")
    assert done.code == 1 and done.out.endswith("\n  # and 2 more\n")
    last = done.out[done.out.rindex("Repair them:") :].splitlines()[1:-1]
    assert [line.split()[2] for line in last] == [str(m) for m in models[:SHOWN]]
