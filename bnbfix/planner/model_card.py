"""The model card of a repaired checkpoint: a short fenced section in README.md, everything else kept. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from ..engines.engine import PORTABLE, Target
from .plan import ONLY_VLLM, Action

CARD = "README.md"
MAX_CARD = 4_000_000  # bytes; a larger README.md is not a card, and stays unchanged
URL = "https://pypi.org/project/bnbfix/"
BEGIN, END = "<!-- bnbfix -->", "<!-- /bnbfix -->"

_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n.*?\r?\n---[ \t]*\r?(?:\n|$)", re.DOTALL)
_SECTION = re.compile(rf"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
_NEW = """---
library_name: transformers
tags:
- {family}
{tag}---
"""


def insert_section(card: str | None, section: str, *, family: str, quantized: bool) -> str:
    """Puts the section into a card: in place of the one it has, else at its end; None starts a card,
    with the family for a tag.

    Every other character stays, line ends and front matter included, except the tag `bitsandbytes` of what is no longer
    `quantized`.
    """
    if card is None or not card.strip():
        return _NEW.format(family=family, tag="- bitsandbytes\n" if quantized else "") + section
    if not quantized:
        card = _drop_tag(card)
    newline = "\r\n" if "\r\n" in card else "\n"
    section = section.replace("\n", newline)
    if (old := list(_SECTION.finditer(card))) != []:
        begin, end = old[-1].span()
        return card[:begin] + section.removesuffix(newline) + card[end:]
    return card + (newline if card.endswith(newline) else newline * 2) + section


def _drop_tag(card: str) -> str:
    """The card without `bitsandbytes` among the tags of its front matter, in either form of a YAML list."""
    front = _FRONT_MATTER.match(card)
    if front is None:
        return card
    text = re.sub(r"(?m)^[ \t]*-[ \t]*[\"']?bitsandbytes[\"']?[ \t]*\r?\n", "", front[0])
    text = re.sub(r"(?m)^tags:[ \t]*\[([^\]\n]*)\]", _drop_from_list, text)
    return text + card[front.end() :]


def _drop_from_list(tags: re.Match[str]) -> str:
    kept = [tag for tag in tags[1].split(",") if tag.strip(" \t\"'") != "bitsandbytes"]
    return f"tags: [{','.join(kept).strip()}]"


def describe_repair(target: Target, actions: Iterable[Action], *, bf16: bool, only_vllm: bool = False) -> str:
    """The section: what was changed, for which vLLM, how to load it and how to check it.

    `only_vllm`: transformers does not load it.

    It names no repo and no date, so that the same source and target give the same card.
    """
    changes = "; ".join(action.describe(count) for action, count in Counter(actions).items())
    check = ["bnbfix verify DIR"]
    if not bf16:
        check = [
            f"bnbfix scan MODEL --vllm {target.name}  # what each release makes of it",
            "bnbfix verify DIR  # of a downloaded copy: every hash, and a scan",
        ]
    lines = [
        BEGIN,
        "## Repaired for vLLM",
        "",
        f"[bnbfix]({URL}) changed this checkpoint so that stock {_name_target(target)} loads it unmodified: {changes}. "
        "Every other tensor and file is the source's, byte for byte. "
        "`bnbfix.json` lists each change, and a SHA-256 for each file." + (f" {ONLY_VLLM}" if only_vllm else ""),
        "",
        "```bash",
        f"vllm serve MODEL{'' if bf16 else _describe_plugin(target)}",
        *check,
        "```",
        END,
        "",
    ]
    return "\n".join(lines)


def _name_target(target: Target) -> str:
    if target.release == PORTABLE:
        return f"{target.engine}, every release from {target.ranges[0].first} to {target.ranges[-1].last},"
    same = target.ranges[0].name
    return target.label + (f" (and what behaves like it: {same})" if same != target.release else "")


def _describe_plugin(target: Target) -> str:
    needing = [r for r in target.ranges if r.plugin == "required"]
    if not needing:
        return ""
    since = f" from {needing[0].first} on" if len(needing) < len(target.ranges) else ""
    return f"  # with vllm-bnb-plugin installed{since}"
