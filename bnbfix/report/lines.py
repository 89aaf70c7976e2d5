"""Lines of styled text for a terminal, before anything is printed."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import NamedTuple


class Span(NamedTuple):
    """Text in one style, as rich names styles."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


@dataclass(frozen=True)
class Layout:
    """How much is shown, and in which width."""

    width: int = 80
    rule: str = "\u2500"
    verbose: bool = False
    quiet: bool = False


def fold(text: str, width: int) -> list[str]:
    """Text in lines of a width; names without blanks are broken anywhere."""
    return wrap(text, max(width, 8), break_on_hyphens=False) or [""]
