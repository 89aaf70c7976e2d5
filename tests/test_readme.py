"""README.md: links that lead somewhere, commands that exist, and error messages that `explain` knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bnbfix
from tests.support.command_line import Cli

ROOT = Path(bnbfix.__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TEXTS = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]
ROWS = [line.split(" | ") for line in README.splitlines() if re.match(r"\| .* \| .*BNB\d", line)]


def test_the_table_of_contents_has_every_section() -> None:
    heads = re.findall(r"^## (.*)$", README, re.M)
    anchors = re.findall(r"\]\(#([\w-]+)\)", README)
    assert anchors == [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    names = re.findall(r"`((?:\.github|bnbfix|examples|tests|engines|rules|models)/[\w./-]+)`", text)
    assert all((path.parent / link).exists() for link in links)
    assert all((ROOT / n).exists() or (ROOT / "bnbfix" / n).exists() for n in names)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_explain_knows_the_error_messages(row: list[str]) -> None:
    symptom, cause, fix = row
    explanations = [bnbfix.explain(code) for code in re.findall(r"BNB\d{3}", cause)]
    whole = " ".join(f"{e.why} {e.fix} {' '.join(e.upstream)}" for e in explanations)
    for words in re.findall(r"`([^`]+)`", symptom):
        assert words in whole, words
    for issue in re.findall(r"\((https://[^)]+)\)", symptom):
        assert issue in whole, issue
    assert fix.startswith(("`bnbfix ", "`pip install "))


@pytest.mark.parametrize("name", ["README.md", "examples/github-actions.yml"])
def test_the_version_that_is_named_is_this_one(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    versions = re.findall(r"OWNER/bnbfix@v(\S+)|rev: v(\S+)", text)
    assert versions and {a or b for a, b in versions} == {bnbfix.__version__}
    assert "OWNER is whoever owns" in text, "a name that stands for another is explained"


def test_there_is_a_row_for_what_people_search_for() -> None:
    text = " ".join(row[0] for row in ROWS)
    for words in ("Tried to load weights of size", "split_with_sizes expects split_sizes", "bare `AssertionError`"):
        assert words in text
    assert "Following weights were not initialized" in text and "images" in text


def test_commands_name_options_that_exist(run: Cli) -> None:
    commands = {line.split("#")[0].strip() for line in README.splitlines() if re.match(r"(\$ )?(uvx )?bnbfix ", line)}
    commands |= set(re.findall(r"`(bnbfix [^`]+)`", README))
    assert len(commands) > 12
    for command in commands:
        _, name, *words = re.sub(r"^(\$ |uvx )", "", command).split()
        text = run(name, *(words[:1] if name == "fleet" else ()), "--help").out
        assert all(word in text for word in words if word.startswith("-")), command
