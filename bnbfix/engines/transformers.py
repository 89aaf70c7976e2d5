"""transformers as a second engine: it reads the same skip list, by its own module names and as patterns.

Source: transformers quantizers/quantizers_utils.py, `should_convert_module`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from ..checkpoint.checkpoint import CONFIG
from ..errors import InputError
from ..models import gemma4
from ..models.family import Model
from ..models.inspection import LinearWeight

# What an entry as a regular expression may hold before it counts as a literal prefix: the time to match it grows with
# the module name's length to the power of its repetitions, and doubles with each alternative.
MAX_PATTERN_LENGTH = 1000
MAX_REPETITIONS = 2
MAX_ALTERNATIVES = 2
MAX_NAME_LENGTH = 128  # real module names have half of that
MAX_REPEATING_ENTRIES = 20  # with more than one repetition each; they are slow, and real checkpoints have none
# A repeated group, a reference back to one, or what begins with "(?", such as a comment between a group and its star.
_GROUPS = re.compile(r"\)\s*[*+{?]|\\[1-9]|\(\?(?!:)")


def check_skip_entries(entries: Sequence[str]) -> None:
    """Raises InputError when a skip list would take too long to match."""
    if (count := sum(_count_repetitions(e) > 1 for e in entries)) > MAX_REPEATING_ENTRIES:
        limit = f"the limit of {MAX_REPEATING_ENTRIES}"
        raise InputError(f"llm_int8_skip_modules has {count:,} patterns with repetitions, above {limit}", where=CONFIG)


def transformers_skips(entry: str, module: str) -> bool:
    """Return True if the entry is a regular expression for the start of the module's name, or a suffix of it."""
    return _compile_entry(entry)(module) or module.endswith(entry)


def _count_repetitions(entry: str) -> int:
    return sum(map(entry.count, "*+{?"))


@cache
def _compile_entry(entry: str) -> Callable[[str], bool]:
    simple = _count_repetitions(entry) <= MAX_REPETITIONS and entry.count("|") <= MAX_ALTERNATIVES
    if len(entry) <= MAX_PATTERN_LENGTH and simple and not _GROUPS.search(entry):
        try:
            pattern = re.compile(entry)
        except (re.error, OverflowError, RecursionError):
            return lambda module: module.startswith(entry)
        return lambda m: pattern.match(m) is not None if len(m) <= MAX_NAME_LENGTH else m.startswith(entry)
    return lambda module: module.startswith(entry)


def transformers_module(model: Model, module: str) -> str:
    """The name that transformers gives a canonical module; text-only models leave out "language_model."."""
    return module.replace(gemma4.TEXT, "model.", 1) if model.family.text_only else module


def transformers_linears(linears: Iterable[LinearWeight], model: Model) -> Iterator[LinearWeight]:
    """The weights that transformers has a linear module for: not k and v of shared layers, nor v where K serves."""
    for linear in linears:
        role = linear.role
        if role.kind not in gemma4.LINEAR_KINDS - {"expert"}:
            continue
        if role.part in ("k_proj", "v_proj") and model.kv_shared(role.layer):
            continue
        if role.part == "v_proj" and model.k_serves_as_v(role.layer):
            continue
        yield linear
