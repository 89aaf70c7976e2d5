"""transformers as a second engine: it reads the same skip list, by its own module names and as patterns.

Source: transformers quantizers/quantizers_utils.py, `should_convert_module`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import cache, lru_cache

from ..checkpoint.checkpoint import CONFIG
from ..errors import InputError
from ..models.family import Model
from ..models.inspection import LinearWeight
from .skip_entries import SkipReader, read_skip_list
from .vllm.profiles import fill_pattern, find_numbers, find_pattern, load_profile

# What an entry as a regular expression may hold before it counts as a literal prefix: the time to match it grows with
# the module name's length to the power of its repetitions, and doubles with each alternative.
MAX_PATTERN_LENGTH = 1000
MAX_REPETITIONS = 2
MAX_ALTERNATIVES = 2
MAX_NAME_LENGTH = 128  # real module names have half of that
MAX_REPEATING_ENTRIES = 20  # with more than one repetition each; they are slow, and real checkpoints have none
MAX_COMPARISONS = 10_000_000  # of the forms of skip entries with modules; this many take about 15 s
_SPECIAL = re.compile(r"[\\^$*+?{}\[\]()|]")  # in a regular expression; a dot is as well
# A repeated group, a reference back to one, or what begins with "(?", such as a comment between a group and its star.
_GROUPS = re.compile(r"\)\s*[*+{?]|\\[1-9]|\(\?(?!:)")


def check_skip_entries(entries: tuple[str, ...], modules: int) -> None:
    """Raises InputError when a skip list would take too long to compare with so many modules."""
    if (count := sum(_count_repetitions(e) > 1 for e in entries)) > MAX_REPEATING_ENTRIES:
        limit = f"the limit of {MAX_REPEATING_ENTRIES}"
        raise InputError(f"llm_int8_skip_modules has {count:,} patterns with repetitions, above {limit}", where=CONFIG)
    forms = read_skip_list(entries, transformers_skips).forms
    if forms * modules > MAX_COMPARISONS:
        what = f"llm_int8_skip_modules has {forms:,} kinds of entries, too many for {modules:,} linear modules"
        raise InputError(what, where=CONFIG, hint="Are they patterns? Name layers or modules instead.")


class _TransformersSkips(SkipReader):
    """An entry is a regular expression for the start of a module's name, or a suffix of it."""

    def __call__(self, entry: str, module: str) -> bool:
        return bool(_compile_entry(entry)(module)) or module.endswith(entry)

    def keys(self, entry: str) -> Iterable[tuple[Hashable, Hashable]]:
        """Its forms: as a suffix its length; as a prefix the lengths between its dots, each of which stands for any
        character. Any other pattern is a form of its own.
        """
        if _SPECIAL.search(entry) or len(entry) > MAX_PATTERN_LENGTH:
            return ((entry, True), (len(entry), entry))
        return ((tuple(map(len, entry.split("."))), entry), (len(entry), entry))

    def module_keys(self, module: str, form: Hashable) -> Collection[Hashable]:
        if isinstance(form, str):
            return (bool(_compile_entry(form)(module)),)
        if isinstance(form, int):
            return (module[len(module) - form :],) if form <= len(module) else ()
        assert isinstance(form, tuple)
        parts, at = [], 0
        for length in form:
            parts.append(module[at : at + length])
            at += length + 1
        return (".".join(parts),) if at <= len(module) + 1 else ()


transformers_skips = _TransformersSkips()


def _count_repetitions(entry: str) -> int:
    return sum(map(entry.count, "*+{?"))


@cache
def _compile_entry(entry: str) -> Callable[[str], object]:
    simple = _count_repetitions(entry) <= MAX_REPETITIONS and entry.count("|") <= MAX_ALTERNATIVES
    if len(entry) <= MAX_PATTERN_LENGTH and simple and not _GROUPS.search(entry):
        try:
            pattern = re.compile(entry)
        except (re.error, OverflowError, RecursionError):
            return lambda module: module.startswith(entry)
        if not _count_repetitions(entry):
            return pattern.match
        return lambda m: pattern.match(m) if len(m) <= MAX_NAME_LENGTH else m.startswith(entry)
    return lambda module: module.startswith(entry)


def transformers_linears(linears: Iterable[LinearWeight], model: Model) -> Iterator[tuple[LinearWeight, str]]:
    """The weights that transformers has a linear module for, and its name.

    Not k and v of shared layers, nor v where K serves as V.
    """
    for linear in linears:
        role = linear.role
        unused = role.part in ("k_proj", "v_proj") and model.kv_shared(role.layer)
        unused |= role.part == "v_proj" and model.k_serves_as_v(role.layer)
        if not unused and (module := find_module(linear.name, model.family.architecture)) is not None:
            yield linear, module


def loads_numbered_experts(architecture: str) -> bool:
    """Return True if transformers makes a linear module for each expert of a class that is quantized.

    Source: transformers quantizers/base.py, `MODULES_TO_PATCH_FOR_QUANTIZATION`.
    """
    return bool((load_profile(architecture) or {}).get("numbered_experts"))


@lru_cache(1 << 14)
def find_module(name: str, architecture: str) -> str | None:
    """The linear module that transformers makes for a tensor of a class's files; None where it makes none.

    Of a class without a profile it is taken to have the tensor's own name, as in most.
    """
    profile = load_profile(architecture)
    if profile is None:
        return name.removesuffix(".weight")
    others = [key.split("|") for key in profile["aliases"]]
    others += [(elsewhere, here) for here, elsewhere in profile.get("dialects", ())]
    for spelling in (name, *(ours + name[len(theirs) :] for theirs, ours in others if name.startswith(theirs))):
        if (module := profile["linears"].get(find_pattern(spelling))) is not None:
            return fill_pattern(module, find_numbers(spelling))
    return None
