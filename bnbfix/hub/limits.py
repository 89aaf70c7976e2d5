"""How long the Hub may take, in seconds, and how long it asks to wait. Each limit can be set in the environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from ..errors import UsageError


def read_seconds(name: str, default: float) -> float:
    """Return a limit from the environment; raises UsageError for what is not a positive number."""
    text = os.environ.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name} is {text!r}, not a positive number of seconds")
    return seconds


def byte_limit() -> float:
    """Without any byte, then the request is tried again."""
    return read_seconds("BNBFIX_HUB_TIMEOUT", 15)


def answer_limit() -> float:
    """For the whole of one answer: the listing, or a range of a file."""
    return read_seconds("BNBFIX_HUB_ANSWER_TIMEOUT", 300)


def download_limit() -> float:
    """Without progress of a download, which huggingface_hub reports every 10 MB."""
    return read_seconds("BNBFIX_HUB_DOWNLOAD_TIMEOUT", 900)


def patience() -> float:
    """That a refusal may ask to wait; one that asks for more is an error at once."""
    return read_seconds("BNBFIX_HUB_PATIENCE", 60)


def read_wait(status: int, headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a refusal asks to wait, in Retry-After or as the Hub writes RateLimit."""
    if status not in (429, 503):
        return None
    after = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"r=0\b.*?\bt=(\d+)", headers.get("RateLimit", "")
    )
    return float(after[1]) if after else None
