"""The GitHub action, whose steps run as GitHub runs them; the workflows and the issue forms."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import bnbfix
from tests.support.build import Make

ROOT = Path(bnbfix.__file__).parent.parent
ACTION = ROOT / "action.yml"
WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").glob("*.yml")), ROOT / "examples" / "github-actions.yml"]


def load(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("schema", "path"),
    [("vendor.github-actions", ACTION), *(("vendor.github-workflows", path) for path in WORKFLOWS)],
    ids=lambda v: v.name if isinstance(v, Path) else v,
)
def test_it_meets_githubs_schema(schema: str, path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [ACTION, *WORKFLOWS[:-1]], ids=lambda p: p.name)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    uses = re.findall(r"uses: (\S+)(.*)", path.read_text("utf-8"))
    remote = [(name, rest) for name, rest in uses if not name.startswith("./")]
    assert remote
    for name, rest in remote:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) and re.match(r" # v\d", rest), name


def test_issue_forms_ask_for_a_scan_in_json() -> None:
    forms = [p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = load(path)
        assert {"name", "description", "body"} <= set(form) and len({part["id"] for part in form["body"]}) > 2
        assert "--format json" in str(form["body"])


def test_the_example_gives_inputs_that_exist() -> None:
    (step,) = load(WORKFLOWS[-1])["jobs"]["scan"]["steps"]
    assert set(step["with"]) <= set(load(ACTION)["inputs"])
    assert "lfs: true" in WORKFLOWS[-1].read_text("utf-8") and "with" in step


def scan(tmp_path: Path, models: str, **inputs: str) -> tuple[int, str, dict[str, Path], str]:
    """Runs the step "Scan" as GitHub does: (exit code, stdout, outputs, job summary)."""
    (step,) = [s for s in load(ACTION)["runs"]["steps"] if s.get("id") == "scan"]
    given = {name: i.get("default", "") for name, i in load(ACTION)["inputs"].items()} | inputs | {"models": models}
    environment = {k: given[re.fullmatch(r"\$\{\{ inputs\.(\S+) \}\}", v)[1]] for k, v in step["env"].items()}  # type: ignore[index]
    program = tmp_path / "bnbfix" / "bin" / "bnbfix"  # in the place of what the step "Install bnbfix" installs
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bnbfix "$@"\n')
    program.chmod(0o755)
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    environment |= {"RUNNER_TEMP": str(tmp_path), "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in files.items()}
    files["GITHUB_STEP_SUMMARY"].write_text("before\n")
    files["GITHUB_OUTPUT"].write_text("")
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]  # as `shell: bash` means
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    summary = files["GITHUB_STEP_SUMMARY"].read_text("utf-8")
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, {k: Path(v) for k, v in outputs.items()}, summary


def test_one_run_annotates_summarizes_and_writes_sarif(pristine: Make, tmp_path: Path) -> None:
    bad, good = pristine("dense31b", "partial", shards=2), pristine("e4b", "all")
    code, out, outputs, summary = scan(tmp_path, f"{bad}\n{good}\n", vllm="0.32.0")
    assert code == 1
    assert out.startswith("::error file=") and "BNB103" in out
    assert summary.startswith("before\n## bnbfix: ") and "2 models: 1 loads, 1 wrong" in summary
    sarif, document = (json.loads(outputs[name].read_text("utf-8")) for name in ("sarif", "json"))
    assert {r["ruleId"] for r in sarif["runs"][0]["results"] if r["level"] == "error"} == {"BNB102", "BNB103"}
    assert [m["verdict"] for m in document["models"]] == ["wrong", "loads"]


@pytest.mark.parametrize(("level", "code"), [("fails", 0), ("wrong", 1), ("never", 0), ("nonsense", 2)])
def test_the_inputs_reach_the_scan(pristine: Make, tmp_path: Path, level: str, code: int) -> None:
    found, _, outputs, _ = scan(tmp_path, str(pristine("dense31b", "partial")), **{"vllm": "0.32.0", "fail-on": level})
    assert found == code and set(outputs) == (set() if level == "nonsense" else {"sarif", "json"})


def test_sarif_is_uploaded_where_the_scan_wrote_it() -> None:
    (step,) = [s for s in load(ACTION)["runs"]["steps"] if s.get("name") == "Upload SARIF"]
    assert step["with"]["sarif_file"] == "${{ steps.scan.outputs.sarif }}"
    assert "steps.scan.outputs.sarif != ''" in step["if"]
    assert "hashFiles" not in step["if"], "it sees no file outside the workspace, and this one is in RUNNER_TEMP"


def test_a_name_is_not_a_command(tmp_path: Path) -> None:
    code, out, _, _ = scan(tmp_path, f'$(touch {tmp_path}/x); "`touch {tmp_path}/x`"')
    assert code == 2 and "no such folder" in out and not (tmp_path / "x").exists()


def test_a_release_names_the_repository_that_makes_it(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    (tmp_path / "examples").mkdir()
    for name in ("pyproject.toml", "README.md", "examples/github-actions.yml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    build = load(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["build"]
    (step,) = [s for s in build["steps"] if s.get("name", "").startswith("Links lead to")]
    github = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "me/fork", "GITHUB_REF_NAME": "v0.1.0"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", step["run"]], cwd=tmp_path, env=os.environ | github, check=True)
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    assert urls["Source"] == "https://github.com/me/fork" and set(urls) == {"Source", "Issues", "Changelog"}
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "OWNER" not in text and "uses: me/fork@v0.1.0" in text and "https://github.com/me/fork\n" in text
    example = (tmp_path / "examples" / "github-actions.yml").read_text("utf-8")
    assert "OWNER" not in example and "uses: me/fork@v0.1.0" in example
    assert example.splitlines()[1:] == [
        line.replace("OWNER", "me").replace("bnbfix@", "fork@")
        for line in (ROOT / "examples" / "github-actions.yml").read_text("utf-8").splitlines()[1:]
    ]
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 3 and all(link.startswith("https://") for link in links)
