"""The model card of a repaired checkpoint: a short fenced section in README.md, everything else kept. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..engines.vllm.releases import PORTABLE, Target

CARD = "README.md"
MAX_CARD = 4_000_000  # bytes; a larger README.md is no card, and stays as it is
BEGIN, END = "<!-- bnbfix -->", "<!-- /bnbfix -->"

_SECTION = re.compile(rf"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
_NEW = """---
library_name: transformers
tags:
- gemma4
{tag}---
"""


def with_section(card: str | None, section: str, *, quantized: bool) -> str:
    """A card with the section in it: in place of the one it has, else at its end; None starts a card.

    Every other character stays, line ends and front matter included.
    """
    if card is None or not card.strip():
        return _NEW.format(tag="- bitsandbytes\n" if quantized else "") + section
    newline = "\r\n" if "\r\n" in card else "\n"
    section = section.replace("\n", newline)
    if (old := list(_SECTION.finditer(card))) != []:
        begin, end = old[-1].span()
        return card[:begin] + section.removesuffix(newline) + card[end:]
    return card + (newline if card.endswith(newline) else newline * 2) + section


def describe(target: Target, edits: Iterable[tuple[str, str]], *, bf16: bool) -> str:
    """The section: what was changed, for which vLLM, how to load it and how to check. `edits` are (action, name).

    It names no repo and no date, so that the same source and target give the same card.
    """
    counts: dict[str, int] = {}
    for action, _ in edits:
        counts[action] = counts.get(action, 0) + 1
    changes = [_change(action, n) for action, n in counts.items()]
    plugins = {r.plugin for r in target.ranges}
    plugin = "" if bf16 or "required" not in plugins else _plugin(target)
    return "\n".join(
        [
            BEGIN,
            "## Repaired for vLLM",
            "",
            f"bnbfix changed this checkpoint so that stock {_name(target)} loads it unmodified: {'; '.join(changes)}. "
            "Every other tensor and file is the source's, byte for byte. "
            "`bnbfix.json` lists each change, and a SHA-256 for each file.",
            "",
            "```bash",
            f"vllm serve MODEL{plugin}",
            f"bnbfix scan MODEL --vllm {target.name}  # what each release makes of it"
            if not bf16
            else "bnbfix verify DIR",
            *([] if bf16 else ["bnbfix verify DIR  # of a downloaded copy: every hash, and a scan"]),
            "```",
            END,
            "",
        ]
    )


def _name(target: Target) -> str:
    if target.name == PORTABLE:
        return f"vLLM, every release from {target.ranges[0].first} to {target.ranges[-1].last},"
    alike = target.ranges[0].name
    return f"vLLM {target.name}" + (f" (and what behaves like it: {alike})" if alike != target.name else "")


def _plugin(target: Target) -> str:
    needing = [r for r in target.ranges if r.plugin == "required"]
    since = f" from {needing[0].first} on" if len(needing) < len(target.ranges) else ""
    return f"  # with vllm-bnb-plugin installed{since}"


_CHANGES: Mapping[str, tuple[str, str]] = {
    "dequantize": ("{} weight dequantized to the precision it had", "{} weights dequantized to the precision they had"),
    "drop": ("{} tensor dropped", "{} tensors dropped"),
    "insert": ("{} weight added as a copy", "{} weights added as copies"),
    "quantize": ("{} weight quantized to NF4, with a loss", "{} weights quantized to NF4, with a loss"),
    "rename": ("{} weight renamed", "{} weights renamed"),
    "stack": ("{} tensor joined from single experts", "{} tensors joined from single experts"),
    "retype": ("{} weight declared U8 `[N, 1]`, same bytes", "{} weights declared U8 `[N, 1]`, same bytes"),
    "config": ("{} key of config.json", "{} keys of config.json"),
}


def _change(action: str, n: int) -> str:
    one, more = _CHANGES.get(action, ("{} " + action, "{} " + action))
    return (one if n == 1 else more).format(n)
