"""How vLLM reads skip entries.

Source: vLLM quantization/bitsandbytes.py, `is_layer_skipped_bnb`.
"""

from __future__ import annotations

from functools import cache


def vllm_skips(entry: str, module: str) -> bool:
    """Return True if the entry is one dotted component of the module's name, or a dotted prefix of it."""
    return entry in _names_matched(module)


@cache
def _names_matched(module: str) -> frozenset[str]:
    """The skip entries that name a module."""
    parts = module.split(".")
    return frozenset(parts) | {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
