"""How vLLM reads skip entries.

Source: vLLM quantization/bitsandbytes.py, `is_layer_skipped_bnb`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from functools import cache

from ..skip_entries import SkipReader


class _VllmSkips(SkipReader):
    """An entry names a module if it is one dotted component of the module's name, or a dotted prefix of it."""

    def __call__(self, entry: str, module: str) -> bool:
        return entry in _names_matched(module)

    def keys(self, entry: str) -> Iterable[tuple[Hashable, Hashable]]:
        return ((None, entry),)

    def module_keys(self, module: str, form: Hashable) -> Collection[Hashable]:
        return _names_matched(module)


vllm_skips = _VllmSkips()


@cache
def _names_matched(module: str) -> frozenset[str]:
    """The skip entries that name a module."""
    parts = module.split(".")
    return frozenset(parts) | {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
