"""How the two readers of `llm_int8_skip_modules` understand an entry, and which entries say a thing to both.

vLLM compares with its own module names (`is_layer_skipped_bnb`), transformers with its own
(`should_convert_module`); neither translates the other's. An entry that one does not know is harmless there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache

Matches = Callable[[str, str], bool]
MAX_PATTERN = 1000  # characters
MAX_REPEATS = 2  # each may multiply the time by the name's length
MAX_ALTERNATIVES = 2  # each may double it
MAX_NAME = 128  # characters of a module's name; real ones have half of that
# A repeated group, a reference back to one, or what begins with "(?", such as a comment between a group and its star.
GROUPS = re.compile(r"\)\s*[*+{?]|\\[1-9]|\(\?(?!:)")


def vllm_skips(entry: str, module: str) -> bool:
    """vLLM: the entry is one dotted component of the module's name, or a dotted prefix of it."""
    return entry in _vllm_names(module)


@cache
def _vllm_names(module: str) -> frozenset[str]:
    parts = module.split(".")
    return frozenset(parts) | {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def transformers_skips(entry: str, module: str) -> bool:
    """transformers: the entry is a regular expression for the start of the name, or a suffix of it."""
    return _pattern(entry)(module) or module.endswith(entry)


def repeats(entry: str) -> int:
    """How many repetitions a regular expression has: each is a place where it may have to try again."""
    return sum(map(entry.count, "*+{?"))


@cache
def _pattern(entry: str) -> Callable[[str], bool]:
    """Does a module's name start as the entry says?

    An entry that is no regular expression, or one that could take a time exponential in the name's length (something
    repeated inside a group, or more than a few repetitions), counts as a plain prefix; so does any for an absurd name.
    """
    few = repeats(entry) <= MAX_REPEATS and entry.count("|") <= MAX_ALTERNATIVES
    if len(entry) <= MAX_PATTERN and few and not GROUPS.search(entry):
        try:
            found = re.compile(entry)
        except (re.error, OverflowError, RecursionError):
            return lambda module: module.startswith(entry)
        return lambda m: found.match(m) is not None if len(m) <= MAX_NAME else m.startswith(entry)
    return lambda module: module.startswith(entry)


@lru_cache(1 << 14)  # every release asks the same again
def matching_entries(entries: tuple[str, ...], module: str, matches: Matches) -> tuple[str, ...]:
    """The entries that name a module."""
    return tuple(e for e in entries if matches(e, module))


def shortest_prefixes(plain: Iterable[str], matches: Matches, matches_quantized: Callable[[str], bool]) -> list[str]:
    """The shortest prefixes of plain modules that name all of them and no quantized one, in order.

    `matches_quantized` says of an entry whether it names a quantized module to any reader of the list.

    >>> shortest_prefixes(["vision_tower.a.b", "vision_tower.c", "x.layers.1.mlp"], vllm_skips, lambda e: vllm_skips(e, "x.o"))
    ['vision_tower', 'x.layers']
    """
    refused: set[str] = set()
    chosen: list[str] = []
    for module in sorted(plain):
        if any(matches(entry, module) for entry in chosen[-1:]):
            continue
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            entry = ".".join(parts[:n])
            if entry in refused:
                continue
            if not matches_quantized(entry):
                chosen.append(entry)
                break
            refused.add(entry)
    return chosen
