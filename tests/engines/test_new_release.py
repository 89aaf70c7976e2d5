"""tests/conformance/new_release.py without a vLLM: what it makes of answers, and how it words what changed."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bnbfix.engines.engine import version_key
from bnbfix.engines.vllm.profiles import FOLDER
from bnbfix.engines.vllm.releases import ranges
from tests.conformance import new_release, survey, venvs

RELEASES = list(venvs.PINS["releases"])
PROFILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("Gemma4*.json"))}
NEWEST = RELEASES[-1]
ROUTER = "language_model.model.layers.*.router.proj.weight"


def only(profile: dict[str, Any], release: str) -> dict[str, Any]:
    """The profile that a survey of a single release makes."""

    def rows(old: list[list[Any]]) -> list[list[Any]]:
        key = version_key(release)
        found = [answer for first, last, answer in old if version_key(first) <= key <= version_key(last)]  # type: ignore[operator]
        return [[release, release, answer] for answer in found]

    parts = {part: {k: r for k, old in profile[part].items() if (r := rows(old))} for part in new_release.PARTS}
    axial = {new_release.AXIAL: rows(profile.get(new_release.AXIAL, []))}
    return copy.deepcopy(profile | parts | axial | {"known": rows(profile["known"])})


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("release", RELEASES[1:])
def test_a_profile_that_forgot_a_release_learns_it_again(name: str, release: str) -> None:
    profile = PROFILES[name]
    older, newer = new_release.forget_releases(profile, release), RELEASES[RELEASES.index(release) + 1 :]
    assert release not in json.dumps(older)
    known = new_release.forget_releases(profile, newer[0]) if newer else profile
    assert new_release.extend_profile(older, release, only(profile, release)) == known


def words(name: str, release: str, surveyed: dict[str, Any]) -> list[str]:
    older = new_release.forget_releases(PROFILES[name], release)
    newer = new_release.extend_profile(older, release, surveyed)
    return new_release.join_words(new_release.describe_profile(older, newer, release))


def test_what_a_release_changed_is_said() -> None:
    name = "Gemma4ForConditionalGeneration"
    found = words(name, "0.31.0", only(PROFILES[name], "0.31.0"))
    v_proj = [line for line in found if line.startswith("`model.language_model.layers.*.self_attn.v_proj.weight`")]
    assert v_proj and v_proj[0].endswith("now ignored/read/refused by layer")
    assert words(name, "0.25.1", only(PROFILES[name], "0.24.0")) == []


def test_a_planted_change_is_found() -> None:
    name = "Gemma4ForConditionalGeneration"
    surveyed, before = only(PROFILES[name], NEWEST), words(name, NEWEST, only(PROFILES[name], NEWEST))
    (row,) = surveyed["parameters"][ROUTER]
    for case in row[2]["cases"].values() if "by" in row[2] else [row[2]]:
        if isinstance(case, dict):
            case["quantized"] = 1
    assert set(words(name, NEWEST, surveyed)) - set(before) == {f"`{ROUTER}`: becomes quantized"}
    surveyed = only(PROFILES[name], NEWEST)
    surveyed["tensors"]["model.language_model.norm.weight"] = [[NEWEST, NEWEST, "refused"]]
    (line,) = set(words(name, NEWEST, surveyed)) - set(before)
    assert line == "`model.language_model.norm.weight`: read into language_model.model.norm.weight, now refused"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the table, which the script writes to."""
    monkeypatch.setattr(new_release, "TABLE", Path(shutil.copy(new_release.TABLE, tmp_path / "releases.json")))
    return tmp_path / "releases.json"


def test_a_release_like_the_newest_row_makes_that_reach_further(table: Path) -> None:
    before = table.read_text()
    row = replace(ranges()[-1], first="0.99.0", last="0.99.0")
    assert list(new_release.describe_row(ranges()[-1], row)) == []
    assert not new_release.write_row(row)
    newest = ranges()[-1]
    assert table.read_text() == before.replace(
        f'"first": "{newest.first}", "last": "{newest.last}"', f'"first": "{newest.first}", "last": "0.99.0"'
    )


def test_a_release_that_differs_gets_a_row(table: Path) -> None:
    before = json.loads(table.read_text())
    row = replace(ranges()[-1], first="0.99.0", last="0.99.0", refuses_v=False, expert_prefix=None)
    found = set(new_release.describe_row(ranges()[-1], row))
    assert found == {"refuses_v: true becomes false", 'expert_prefix: "experts" becomes null'}
    assert new_release.write_row(row)
    after = json.loads(table.read_text())
    assert after["ranges"][:-1] == before["ranges"]
    assert after["ranges"][-1] == {k: v for k, v in asdict(row).items() if k in before["traits"] and k != "classes"}


def test_a_class_is_asked_about_again_where_the_questions_have_changed(tmp_path: Path) -> None:
    config, kept = {"architectures": ["AForCausalLM"]}, tmp_path / "AForCausalLM.json"
    family = replace(survey.FAMILIES["LlamaForCausalLM"], configs=[config])
    models = [{"config": config, "tensors": {"model.norm.weight": [8]}, "axial": None}]
    assert not survey.is_answered(kept, family, models)
    with tempfile.TemporaryDirectory() as scratch:
        asked = [question for _, question in survey.list_questions(family, models, Path(scratch))]
    answers = [question | {"error": None} for question in asked]
    kept.write_text(json.dumps(answers))
    assert survey.is_answered(kept, family, models)
    answers[0]["experiments"].pop()
    kept.write_text(json.dumps(answers))
    assert not survey.is_answered(kept, family, models)
    answers[0]["error"] = "AForCausalLM is refused"
    kept.write_text(json.dumps(answers))
    assert survey.is_answered(kept, family, models)


def test_a_release_is_forgotten_by_data(table: Path, tmp_path: Path) -> None:
    profiles = Path(shutil.copytree(FOLDER, tmp_path / "profiles"))
    new_release.forget_data(profiles, "0.31.0")
    assert json.loads(table.read_text())["ranges"][-1]["last"] == "0.30.0"
    assert all("0.31.0" not in path.read_text() for path in profiles.glob("*.json"))


def test_pins_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = new_release.PINS.read_text()
    monkeypatch.setattr(new_release, "PINS", tmp_path / "pins.json")
    new_release.write_pins(json.loads(text))
    assert (tmp_path / "pins.json").read_text() == text
