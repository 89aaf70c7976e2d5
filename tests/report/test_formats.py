"""The documents that `scan --format` writes, and which findings count."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from markdown_it import MarkdownIt

from bnbfix.engines.targets import resolve_target
from bnbfix.engines.vllm.releases import ranges
from bnbfix.errors import InputError, NotApplicable, UsageError
from bnbfix.report import github as report_github
from bnbfix.report import html as report_html
from bnbfix.report import json as report_json
from bnbfix.report import markdown as report_markdown
from bnbfix.report import sarif as report_sarif
from bnbfix.report.outcome import ScanOutcome, read_names, scan_models
from bnbfix.report.scan_table import render_table
from bnbfix.report.terminal import TableOptions
from bnbfix.rules.rule import Code, Severity
from bnbfix.rules.scan import Finding
from bnbfix.rules.selection import Selection, findings_code, worst
from tests.support.build import Make, scan
from tests.support.outcomes import EVIL, evil, outcomes

SCHEMA = Path(__file__).parents[1] / "schemas" / "sarif-2.1.0-rtm.5.json"


def finding(code: Code, severity: Severity) -> Finding:
    return Finding(code, severity, (), ranges(), "message", None, "reason")


# Selection and exit codes


def test_codes_are_selected_by_their_beginnings_and_ignored() -> None:
    found = [finding(c, Severity.FAILS) for c in Code]
    assert Selection().of(found) == tuple(found)
    chosen = Selection.parse(["bnb2,BNB3"], ["BNB301", "BNB204"]).of(found)
    assert [f.code.value for f in chosen] == [
        *("BNB201", "BNB202", "BNB203", "BNB205", "BNB206", "BNB207", "BNB208", "BNB209"),
        *("BNB302", "BNB303", "BNB304", "BNB305", "BNB306", "BNB307", "BNB308", "BNB309", "BNB310"),
    ]
    assert Selection.parse(ignore=["BNB"]).of(found) == ()


@pytest.mark.parametrize("given", ["BNB9", "", "X", "BNB101,", "101"])
@pytest.mark.parametrize("option", ["select", "ignore"])
def test_an_unknown_code_prefix_is_a_usage_error(option: str, given: str) -> None:
    with pytest.raises(UsageError, match=f"--{option} '.*' begins no finding's code"):
        Selection.parse(**{option: [given]})


@pytest.mark.parametrize("severity", Severity)
def test_fail_on_is_the_least_severity_that_counts(severity: Severity) -> None:
    found = [finding(Code.INDEX, severity)]
    for level in Severity:
        assert findings_code(found, level) == (1 if severity >= level else 0)
    assert findings_code(found, None) == 0
    assert findings_code(found) == (1 if severity.counts else 0)


def test_a_damaged_quant_state_is_2_whatever_fails() -> None:
    assert findings_code([finding(Code.QUANT_STATE, Severity.FAILS)], None) == 2


@pytest.mark.parametrize(
    ("codes", "want"), [([0], 0), ([0, 1], 1), ([1, 2, 0], 2), ([3, 2], 2), ([3, 1], 1), ([3, 0], 0), ([3, 3], 3)]
)
def test_the_exit_code_of_several(codes: list[int], want: int) -> None:
    assert worst(codes) == want


def test_a_list_of_models_has_comments_and_blank_lines() -> None:
    assert read_names("# mine\n\n a/b \norg/x@main\n  # no\n", "f") == ["a/b", "org/x@main"]
    with pytest.raises(UsageError, match="f: names no model"):
        read_names("# nothing\n", "f")


def test_a_selection_does_not_change_the_verdicts(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    (o,) = scan_models([str(source)], resolve_target("portable"), Selection.parse(ignore=["BNB"]))
    whole = scan(source)
    assert o.result is not None and o.result.findings == () and o.left_out == len(whole.findings) > 0
    assert (o.result.verdict, o.result.releases) == (whole.verdict, whole.releases)
    assert o.exit_code() == 0


def test_one_that_fails_does_not_stop_the_rest(pristine: Make, tmp_path: Path) -> None:
    source = pristine("e4b", "all", shards=2)
    a, b, c = outcomes(tmp_path / "nowhere", source, pristine("dense31b", "bf16"))
    assert isinstance(a.error, UsageError) and a.exit_code() == 2 and a.result is None
    assert b.error is None and b.result is not None
    assert isinstance(c.error, NotApplicable) and c.exit_code() == 3


# JSON


def test_json_of_several_and_json_lines(pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "partial", shards=2)
    found = outcomes(source, tmp_path / "nowhere")
    whole = json.loads("".join(report_json.render(found, several=True)))
    assert whole["schema"] == 1
    assert whole["models"][0] == scan(source).to_dict()
    assert whole["models"][1] == {
        "schema": 1,
        "model": str(tmp_path / "nowhere"),
        "error": {
            "kind": "UsageError",
            "message": f"{tmp_path}/nowhere: no such folder",
            "exit_code": 2,
            "hint": "A model is a folder, or a repo on the Hub: org/name[@revision].",
        },
    }
    lines = list(report_json.render_lines(found))
    assert [json.loads(line) for line in lines] == whole["models"]
    assert all(line.count("\n") == 1 for line in lines)
    assert json.loads("".join(report_json.render(found[:1], several=False))) == whole["models"][0]


def as_table(found: list[ScanOutcome]) -> Iterator[str]:
    for line in render_table(found, TableOptions(width=1000), several=False, with_map=False):
        yield "".join(part.text for part in line)


@pytest.mark.parametrize(
    "render",
    [as_table, report_markdown.render, report_html.render, report_sarif.render, report_github.render],
    ids=["table", "markdown", "html", "sarif", "github"],
)
def test_neighbouring_ranges_are_joined_in_every_format(
    pristine: Make, render: Callable[[list[ScanOutcome]], Iterable[str]]
) -> None:
    found = outcomes(pristine("dense31b", "partial", shards=2))
    (result,) = (o.result for o in found)
    assert result is not None and max(len(f.releases) for f in result.findings) > 3
    text = "".join(render(found))
    assert "vLLM 0.19.0-0.27.1" in text and "vLLM 0.28.0-0.33.0" in text
    assert not re.search(r"0\.22\.1,|0\.31\.0, ", text)


# SARIF


def sarif(found: list[ScanOutcome], here: Path = Path("/")) -> dict[str, Any]:
    doc = report_sarif.document(found, here)
    jsonschema.Draft4Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(doc)
    return doc


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("dense31b", "partial"),
        ("e4b", "all"),
        ("moe26b", "all"),
        ("unified12b", "all"),
        ("dense31b", "int8"),
        ("e4b-noshared", "skip"),
        ("text", "fp4"),
        ("dense31b", "storage-bf16"),
    ],
)
def test_sarif_follows_the_schema_and_has_every_finding(pristine: Make, family: str, quant: str) -> None:
    source = pristine(family, quant, shards=2)
    (run,) = sarif(outcomes(source))["runs"]
    rules, findings = run["tool"]["driver"]["rules"], scan(source).findings
    assert [r["ruleId"] for r in run["results"]] == [f.code.value for f in findings]
    for r, f in zip(run["results"], findings, strict=True):
        assert rules[r["ruleIndex"]]["id"] == r["ruleId"]
        assert r["level"] == {"fails": "error", "wrong": "error", "degraded": "warning", "note": "note"}[f.severity]
        named = [x["fullyQualifiedName"] for at in r["locations"] for x in at.get("logicalLocations", ())]
        assert sorted(named) == sorted(f.tensors)
    for rule in rules:
        e = Code(rule["id"]).explanation
        assert e.why in rule["help"]["text"] and e.fix in rule["help"]["markdown"]
        assert rule.get("helpUri") == (e.upstream[0] if e.upstream else None)
    prints = [r["partialFingerprints"]["primaryLocationLineHash"] for r in run["results"]]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("code", Code, ids=str)
def test_sarif_describes_every_code(pristine: Make, code: Code) -> None:
    (o,) = outcomes(pristine("text", "all"))
    assert o.result is not None
    e = code.explanation
    for severity in {Severity.NOTE, e.severity}:
        result = replace(o.result, findings=(finding(code, Severity.NOTE), finding(code, severity)))
        (run,) = sarif([replace(o, result=result)])["runs"]
        (rule,) = run["tool"]["driver"]["rules"]
        level = {"fails": "error", "wrong": "error", "degraded": "warning", "note": "note"}[severity]
        assert rule["defaultConfiguration"]["level"] == level, "of the worst finding"
        assert [r["level"] for r in run["results"]] == ["note", level]
        assert (rule["shortDescription"]["text"], rule["fullDescription"]["text"]) == (e.title, e.why)
        assert re.fullmatch(r"([A-Z][a-z0-9]*)+", rule["name"]) and rule["help"]["text"].startswith(e.why)


def test_sarif_names_files_of_the_model(pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pristine("dense31b", "partial", shards=2)
    shards = [p.name for p in source.glob("*.safetensors")]

    def uris(here: Path) -> tuple[set[str], set[str | None], dict[str, Any]]:
        (run,) = sarif(outcomes(source), here)["runs"]
        found = [at["physicalLocation"]["artifactLocation"] for r in run["results"] for at in r["locations"]]
        assert all(at["uri"] for at in found)
        bases = run.get("originalUriBaseIds", {})
        return {at["uri"] for at in found}, {at.get("uriBaseId") for at in found}, bases

    names = {"config.json", *shards}
    assert uris(source) == (names, {None}, {})
    assert uris(source.parent) == ({f"{source.name}/{n}" for n in names}, {None}, {})
    assert uris(Path("/usr")) == (
        names,
        {"MODEL"},
        {"MODEL": {"uri": source.as_uri() + "/", "description": {"text": str(source)}}},
    )


def test_fingerprints_do_not_depend_on_layers_shards_and_releases(pristine: Make) -> None:
    def prints(source: Path, target: str) -> set[str]:
        (run,) = sarif(outcomes(source, target=target), source)["runs"]
        return {r["partialFingerprints"]["bnbfix/v1"] for r in run["results"] if r["ruleId"] == "BNB104"}

    one, two = (pristine("dense31b", "skip", shards=n) for n in (2, 3))
    assert prints(one, "portable") == prints(two, "0.22.1") != set()


def test_sarif_notes_models_that_could_not_be_scanned(pristine: Make, tmp_path: Path) -> None:
    (run,) = sarif(outcomes(tmp_path / "nowhere", pristine("dense31b", "bf16")))["runs"]
    assert run["results"] == [] and run["tool"]["driver"]["rules"] == []
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    assert [n["level"] for n in invocation["toolExecutionNotifications"]] == ["error", "note"]
    (run,) = sarif(outcomes(pristine("dense31b", "bf16")))["runs"]
    assert run["invocations"][0]["executionSuccessful"] is True


def test_sarif_of_hostile_names_is_harmless(pristine: Make) -> None:
    doc = sarif([evil(o) for o in outcomes(pristine("dense31b", "partial", shards=2))])
    texts = list(strings(doc))
    assert all(text.replace("\n", "").isprintable() for text in texts)
    assert r"model.\x1b[31m\x07\r\n<script>" in "".join(texts) and any("%1B" in text for text in texts)


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.items() if isinstance(value, dict) else value:
            for part in item if isinstance(item, tuple) else (item,):
                yield from strings(part)


# GitHub's annotations


def test_annotations_are_escaped_as_github_reads_them() -> None:
    line = report_github.command("error", "a,b:c%\n.json", "t: x, y%", "100%\r\nnext: a, b")
    want = "::error file=a%2Cb%3Ac%25\\n.json,title=t%3A x%2C y%25::100%25%0D%0Anext: a, b\n"
    assert line == want


def test_every_finding_is_one_annotation_in_one_line(pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "partial", shards=2)
    found = outcomes(source, tmp_path / "nowhere", pristine("dense31b", "bf16"))
    for case in (found, [evil(found[0])]):
        text = "".join(report_github.render(case))
        lines = text.splitlines()
        assert all(re.match(r"::(error|warning|notice) file=[^,:]+,title=[^,:]+::\S", line) for line in lines)
        assert text.replace("\n", "").isprintable()
    levels = [line.split()[0] for line in report_github.render(found)]
    want = {Severity.FAILS: "::error", Severity.WRONG: "::error", Severity.NOTE: "::notice"}
    assert levels == [want[f.severity] for f in scan(source).findings] + ["::error", "::notice"]


# Markdown


def test_markdown_has_the_matrix_the_findings_and_the_command(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    text = "".join(report_markdown.render(outcomes(source)))
    assert "| 0.19.0-0.22.1 | \u274c fails | 7 | BNB103 BNB104 |" in text
    assert "### BNB104 fails: K serves as V, but V has no quant state" in text
    assert "- `model.language_model.layers.{2,5}.self_attn.k_proj.weight x2`" in text
    assert f"Repair it:\n\n    bnbfix repair {source} --out {source}-repaired --vllm portable\n" in text
    assert "## Summary" not in text
    text = "".join(report_markdown.render(outcomes(source, "/nowhere", pristine("e4b", "all"), target="0.32.0")))
    assert "| `/nowhere` | \u26d4 error | no such folder |" in text
    assert text.endswith("\n3 models: 1 loads, 1 wrong, 1 error\n")


def test_markdown_of_hostile_names_is_text(pristine: Make) -> None:
    found = outcomes(pristine("dense31b", "partial", shards=2))
    bad = replace(found[0], result=None, error=InputError(EVIL, where=EVIL))
    for case in ([evil(found[0])], [bad, bad]):
        text = "".join(report_markdown.render(case))
        assert text.replace("\n", "").replace("\ufe0f", "").replace("\u200b", "").isprintable()
        tokens = MarkdownIt().enable("table").parse(text)
        inner = [t for token in tokens for t in token.children or ()]
        assert {t.type for t in inner} <= {"text", "strong_open", "strong_close", "code_inline", "text_special"}
        blocks = {t.content.strip() for t in tokens if t.type == "html_block"}
        assert all(re.fullmatch(r"</?details>(<summary>\d+ names?</summary>)?", block) for block in blocks)
        assert "@user" not in "".join(t.content for t in inner if t.type != "code_inline")
        for row in (line for line in text.splitlines() if line.startswith("|")):
            assert len(re.findall(r"(?<!\\)\|", row)) in (4, 5)


@pytest.mark.parametrize(
    ("text", "want"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("", "`  `"), ("a``b`", "``` a``b` ```")]
)
def test_code_spans_hold_any_text(text: str, want: str) -> None:
    assert report_markdown.code(text) == want
