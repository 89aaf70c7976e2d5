"""Which vLLM this Python has: the versions that every answer carries, without importing any of it."""

from __future__ import annotations

from typing import Any


def run(folder: str) -> dict[str, Any]:
    """Nothing more than the versions."""
    return {}
