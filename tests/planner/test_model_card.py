"""The model card: one fenced section of its own, and everything else as it was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import bnbfix
from bnbfix.engines.targets import resolve_target
from bnbfix.planner.model_card import BEGIN, CARD, END, MAX_CARD, describe_repair, insert_section
from bnbfix.planner.plan import Action
from tests.support.build import Make

SECTION = f"{BEGIN}\nnew\n{END}\n"
FRONT = "---\nlicense: gemma\ntags: [a, b]\n---\n"


@pytest.mark.parametrize(
    "card",
    [
        FRONT + "# Model\n",
        FRONT + "# Model",
        "# Model\n\n\n",
        FRONT,
        "no front matter",
        "# Modèle 漢字 \u202e\n",
        "a <!-- comment -->\n",
        f"a stray {BEGIN} in the text\n",
        f"{END} first\n",
    ],
)
def test_a_section_is_added_at_the_end(card: str) -> None:
    out = insert_section(card, SECTION, family="gemma4", quantized=True)
    assert out.startswith(card) and out.endswith("\n" + SECTION)
    assert out[len(card) :].strip("\n") == SECTION.strip("\n")
    assert insert_section(out, SECTION, family="gemma4", quantized=True) == out
    newer = SECTION.replace("new", "newer")
    assert insert_section(out, newer, family="gemma4", quantized=True) == out.replace(SECTION, newer)


def test_a_section_is_replaced_where_it_stands() -> None:
    card = f"{FRONT}# Model\n\n{BEGIN}\nold\n{END}\n\nMore text, as it was.  \n"
    assert insert_section(card, SECTION, family="gemma4", quantized=True) == card.replace("old", "new")


def test_line_ends_stay() -> None:
    out = insert_section("# Model\r\n", SECTION, family="gemma4", quantized=True)
    assert out == "# Model\r\n\r\n" + SECTION.replace("\n", "\r\n")
    assert insert_section(out, SECTION, family="gemma4", quantized=True) == out


@pytest.mark.parametrize("card", [None, "", " \n"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_card_is_made_where_there_is_none(card: str | None, quantized: bool) -> None:
    out = insert_section(card, SECTION, family="gemma4", quantized=quantized)
    m = re.fullmatch(r"---\n(.*?)---\n" + re.escape(SECTION), out, re.DOTALL)
    assert m is not None and ("- bitsandbytes" in m[1]) == quantized
    assert m[1].startswith("library_name: transformers\ntags:\n- gemma4\n")


def test_the_section_says_what_for_whom_and_how() -> None:
    edits = [Action.DEQUANTIZE, Action.DEQUANTIZE, Action.CONFIG]
    text = describe_repair(resolve_target("0.22.1"), edits, bf16=False)
    assert text.startswith(BEGIN) and text.endswith(END + "\n")
    assert "vLLM 0.22.1 (and what behaves like it: 0.19.0-0.22.1)" in text
    assert "2 weights dequantized (same values); 1 key of config.json changed." in text
    assert "vllm serve MODEL\n" in text and "bnbfix scan MODEL --vllm 0.22.1" in text and "bnbfix verify DIR" in text
    assert "vllm-bnb-plugin" not in text
    portable = describe_repair(resolve_target("portable"), edits, bf16=False)
    assert "vllm-bnb-plugin installed from 0.28.0 on" in portable
    assert "plugin" not in describe_repair(resolve_target("portable"), edits, bf16=True)


# In a repair


def repaired(source: Path, out: Path, target: str) -> str:
    assert bnbfix.repair(source, out, target, device="cpu").written
    assert bnbfix.verify(out, source).ok
    return (out / CARD).read_bytes().decode()


def test_repairs_keep_the_card_and_replace_their_own_section(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    old = (source / CARD).read_text()
    first = repaired(source, tmp_path / "a", "0.32.0")
    assert first.startswith(old) and first.count(BEGIN) == first.count(END) == 1
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
    second = repaired(tmp_path / "a", tmp_path / "b", "0.22.1")
    assert second.startswith(old) and second.count(BEGIN) == 1 and "vLLM 0.22.1" in second
    assert not bnbfix.repair(tmp_path / "b", tmp_path / "c", "0.22.1").written


def test_a_card_promises_no_release_that_does_not_know_the_model(checkpoint: Make, tmp_path: Path) -> None:
    said = repaired(checkpoint("unified12b", "all"), tmp_path / "out", "portable")
    assert "every release from 0.23.0 to" in said and "0.19.0" not in said


@pytest.mark.parametrize("data", [b"\xff\xfe not UTF-8", b"# \xe9"])
def test_a_card_that_is_not_text_stays_unchanged(checkpoint: Make, tmp_path: Path, data: bytes) -> None:
    source = checkpoint("dense31b", "skip")
    (source / CARD).write_bytes(data)
    bnbfix.repair(source, tmp_path / "out", "0.32.0")
    assert (tmp_path / "out" / CARD).read_bytes() == data


def test_a_checkpoint_without_a_card_gets_one(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    (source / CARD).unlink()
    assert repaired(source, tmp_path / "out", "0.32.0").startswith("---\nlibrary_name: transformers\n")


def test_a_readme_too_large_for_a_card_stays_as_it_is(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "single", shards=2)
    for size, changed in ((MAX_CARD, True), (MAX_CARD + 1, False)):
        (source / CARD).write_bytes(b"#" * size)
        bnbfix.repair(source, tmp_path / str(size), vllm="0.22.1", device="cpu")
        written = (tmp_path / str(size) / CARD).read_bytes()
        assert (written != b"#" * size) == changed and written.startswith(b"#" * size)


FRONT = "---\nbase_model: org/bitsandbytes\ntags: {}\nlicense: mit\n---\n# bitsandbytes\n- bitsandbytes\n"


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ("[gemma4, bitsandbytes]", "[gemma4]"),
        ("[bitsandbytes, gemma4]", "[gemma4]"),
        ("[a, 'bitsandbytes', \"b\"]", '[a, "b"]'),
        ("[bitsandbytes]", "[]"),
        ("[bitsandbytes-4bit, a]", "[bitsandbytes-4bit, a]"),
        ("\n- a\n- bitsandbytes\n  - 'b'", "\n- a\n  - 'b'"),
    ],
)
def test_full_precision_drops_the_tag_and_keeps_the_rest(tags: str, kept: str) -> None:
    card = FRONT.format(tags)
    assert insert_section(card, SECTION, family="gemma4", quantized=True).startswith(card)
    assert insert_section(card, SECTION, family="gemma4", quantized=False).startswith(FRONT.format(kept))
    crlf = insert_section(card.replace("\n", "\r\n"), SECTION, family="gemma4", quantized=False)
    assert crlf.startswith(FRONT.format(kept).replace("\n", "\r\n"))


def test_a_card_without_front_matter_keeps_every_word() -> None:
    card = "# bitsandbytes\n- bitsandbytes\n\n---\ntags: [bitsandbytes]\n---\n"
    assert insert_section(card, SECTION, family="gemma4", quantized=False).startswith(card)
