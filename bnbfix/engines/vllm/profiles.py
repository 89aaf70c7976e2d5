"""What releases of vLLM expect of a class's checkpoints, as tests/conformance/survey.py recorded it from real ones.

A profile is JSON: for patterns of names, in which layer numbers are `*`, rows of [first release, last release, what the
release does]. Where that depends on the model or the layer, it is {"by": features, "cases": {values: answer}}. Sizes
are formulas over the keys of config.json; `keys` are older names of some. `built` are stacks of which the engine builds
fewer layers than a file has. `dialects` are beginnings of names, and `inner_names` parts of them, that tools write
differently. A parameter is `reordered` of which the class moves the rows: of a quantized tensor that is the packed
bytes. `dtype_read` are parameters in whose dtype the class makes a number, `unbound` those that get no quant state,
since the class renames their tensors after the loader has looked for it. `transposed_experts`, `interleaved_experts`
and `numbered_experts` say how transformers keeps experts: in a tensor of all by columns; gate and up alternating in it;
and as linear modules where it quantizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..engine import version_key

INDEX = "index.json"
FOLDER = Path(__file__).with_name("profiles")
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,5})(?![^.])")  # as Python writes it: no other names the same module
_DIVIDED = re.compile("(?<!/)/(?!/)")
Feature = Sequence[str]  # [kind, path, ...]
LITERAL = ".timm_model."  # a tower of timm's: its blocks are all unlike, and the same in every model of the class
EACH = ".each"  # after the path of a list: the number that all of its items are


@cache
def find_pattern(name: str) -> str:
    """A name with `*` for its layer numbers."""
    return name if LITERAL in name else _NUMBER.sub("*", name)


@cache
def find_numbers(name: str) -> tuple[int, ...]:
    """The layer numbers in a name, first to last."""
    return () if LITERAL in name else tuple(int(n) for n in _NUMBER.findall(name))


@lru_cache(1 << 14)
def fill_pattern(pattern: str, numbers: tuple[int, ...]) -> str:
    """A pattern with layer numbers in the place of its first stars."""
    for n in numbers:
        pattern = pattern.replace("*", str(n), 1)
    return pattern


@cache
def known_classes() -> dict[str, list[list[Any]]]:
    """The classes that have a profile, with rows [first release, last release, 1 or why it refuses them]."""
    return dict(json.loads((FOLDER / INDEX).read_text("utf-8")))


@lru_cache(16)
def load_profile(architecture: str) -> dict[str, Any] | None:
    """The profile of a class; None where it was not surveyed."""
    if architecture not in known_classes():
        return None
    return dict(json.loads((FOLDER / f"{architecture}.json").read_text("utf-8")))


def derive_size(path: str, read: Callable[[str], Any]) -> int | None:
    """What a key that config.json leaves out comes to, from the keys next to it; None for other keys."""
    at, dot, key = path.rpartition(".")
    heads = read(f"{at}{dot}num_attention_heads") if key in ("head_dim", "num_key_value_heads") else None
    if type(heads) is not int or heads < 1 or key == "num_key_value_heads":
        return heads if type(heads) is int else None
    width = read(f"{at}{dot}hidden_size")
    return width // heads if type(width) is int else None


def evaluate_feature(feature: Feature, read: Callable[[str], Any], layer: int | None) -> str:
    """The value of a feature for a model, or for one of its layers; "?" where the config does not tell.

    Kinds: `true` PATH; `item` PATH VALUE: the layer's item of a list is VALUE; `in` PATH: a list holds the layer's
    number; `last` PATH COUNT: the layer is one of the last; `first` PATH: one of the first; `after` PATH COUNT: after
    the one whose output is used, counted from 1, or backwards from -1; `every` PATH: the layer's number, counted from
    1, is a multiple; `number` N: its number is N.
    """
    kind, path, *rest = feature
    value = read(path)
    if kind == "true":
        return str(int(bool(value)))
    if layer is None:
        return "?"
    if kind == "number":
        return str(int(layer == int(path)))
    if kind == "item" and isinstance(value, list) and layer < len(value):
        return str(int(value[layer] == rest[0]))
    if kind == "in" and isinstance(value, list | None):
        return str(int(layer in (value or ())))
    if type(value) is not int:
        return "?"
    if kind == "last" and type(count := read(rest[0])) is int:
        return str(int(layer >= count - value))
    if kind == "after" and type(count := read(rest[0])) is int:
        return str(int(layer > (count + value if value < 0 else value - 1)))
    if kind == "first":
        return str(int(layer < value))
    if kind == "every" and value > 0:
        return str(int((layer + 1) % value == 0))
    return "?"


def evaluate_size(formula: str | None, read: Callable[[str], Any]) -> int | None:
    """A size from a formula such as `2*text_config.head_dim*text_config.num_attention_heads/4+8`; None if unknown.

    A `/` divides the product before it, a `//` only the factor before it.
    """
    if formula is None:
        return None
    total = 0
    for product in formula.split("+"):
        factors, *divisor = _DIVIDED.split(product)
        value = 1
        for factor in factors.split("*"):
            number = _evaluate_factor(factor, read)
            if number is None:
                return None
            value *= number
        total += value // int(divisor[0]) if divisor else value
    return total


def _evaluate_factor(factor: str, read: Callable[[str], Any]) -> int | None:
    """A number, the value of a key, the length of a list, or one of these divided by another."""
    dividend, _, divisor = factor.partition("//")
    if divisor:
        whole, part = _evaluate_factor(dividend, read), _evaluate_factor(divisor, read)
        return whole // part if whole is not None and part else None
    if factor.endswith(EACH):
        value = read(factor.removesuffix(EACH))
        items = value if isinstance(value, list) and value else [value]
        return items[0] if type(items[0]) is int and all(item == items[0] for item in items) else None
    found = int(factor) if factor.removeprefix("-").isdigit() else read(factor)
    if isinstance(found, list):
        return len(found)
    return found if type(found) is int else None


def overlapping_row(rows: Sequence[Sequence[Any]], first: str, last: str) -> Any:
    """What releases from `first` to `last` do, out of rows [first, last, answer]; None where no row reaches them."""
    begin, end = version_key(first), version_key(last)
    for row in reversed(rows):
        low, high = version_key(row[0]), version_key(row[1])
        if begin and end and low and high and low <= end and high >= begin:
            return row[2]
    return None
