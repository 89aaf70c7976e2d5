"""What a model's config says about its class's profile: sizes, stacks of layers, and features. No release is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from ...checkpoint.checkpoint import CONFIG
from ...errors import InputError
from ...models.family import Model
from .profiles import derive_size, evaluate_feature, evaluate_size, find_numbers, find_pattern

T = TypeVar("T")
TIED = ("tied", "tied_text")  # the features that say that lm_head shares the embeddings' weight
MAX_STACK = 4_096  # layers, or experts of a layer; the most that a model has are 512
MAX_PARAMETERS = 1_000_000  # that a config may ask for; the largest models have a tenth
_TEXT = "text_config."


class ModelFacts:
    """A profile's formulas and features for one model, each evaluated once. Raises InputError for sizes of no model."""

    def __init__(self, profile: Mapping[str, Any], model: Model) -> None:
        self.profile, self._model = profile, model
        self._sizes: dict[str, int | None] = {}
        self._features: dict[tuple[str, int | None], str] = {}
        self._stacks: dict[str, tuple[Sequence[int] | None, ...]] = {}  # of a pattern's stars
        self._beyond: dict[str, bool] = {}
        self._patterns: dict[tuple[str, ...], tuple[frozenset[str], bool]] = {}  # of all names of a file
        self._derived: dict[tuple[int, str], Any] = {}  # from the profile's answers, by what they are about
        self._values: dict[tuple[str, ...], frozenset[str]] = {}  # of several features, in the layers of a stack

    def _read(self, path: str) -> Any:
        value = self._model.read(path)
        if value is None and path.startswith(_TEXT) and not self._model.config.get("text_config"):
            value = self._model.read(path.removeprefix(_TEXT))  # in one config, as transformers 4 wrote some
        if value is None and (older := self.profile.get("keys", {}).get(path)):
            value = self._model.read(older)
        if value is None:
            value = self.profile["defaults"].get(path)
        return derive_size(path, self._read) if value is None else value

    def size(self, formula: str | None) -> int | None:
        """The value of a formula; None where the config does not tell."""
        if formula is None:
            return None
        if formula not in self._sizes:
            self._sizes[formula] = evaluate_size(formula, self._read)
        return self._sizes[formula]

    def features(self, names: Sequence[str], layer: int | None) -> str:
        """The values of features in a layer, one character each."""
        return "".join(self._feature(name, layer) for name in names)

    def _feature(self, name: str, layer: int | None) -> str:
        if (name, layer) not in self._features:
            self._features[name, layer] = evaluate_feature(self.profile["features"][name], self._read, layer)
        return self._features[name, layer]

    @cached_property
    def tied(self) -> bool:
        """Return True if config.json says that lm_head shares the embeddings' weight."""
        return any(self._feature(name, None) == "1" for name in TIED if name in self.profile["features"])

    def stack(self, pattern: str, *, built: bool = False) -> Sequence[int] | None:
        """The numbers of a stack's layers in a file, or as built, which may be fewer; None where they are not known."""
        known = self.profile["stacks"].get(pattern)
        if built:
            known = self.profile.get("built", {}).get(pattern, known)
        if isinstance(known, list):
            return known
        length = self.size(known)
        if length is not None and length > MAX_STACK:
            raise InputError(f"asks for {length:,} {pattern}, as no model has", where=CONFIG)
        return None if length is None else range(length)

    def is_beyond(self, name: str) -> bool:
        """Return True if a layer number in a name is past the end of its stack."""
        if name not in self._beyond:
            pattern = find_pattern(name)
            if pattern not in self._stacks:
                parts = pattern.split(".")
                stacks = (self.stack(".".join(parts[:at])) for at, part in enumerate(parts) if part == "*")
                self._stacks[pattern] = tuple(stacks)
            pairs = zip(find_numbers(name), self._stacks[pattern], strict=True)
            self._beyond[name] = any(stack is not None and n not in stack for n, stack in pairs)
        return self._beyond[name]

    def patterns(self, names: tuple[str, ...]) -> tuple[frozenset[str], bool]:
        """The patterns of tensor names, and whether `is_beyond` holds for any of the names."""
        if names not in self._patterns:
            self._patterns[names] = frozenset(map(find_pattern, names)), any(map(self.is_beyond, names))
        return self._patterns[names]

    def expand(self, pattern: str, *, built: bool = False) -> list[tuple[int, ...]]:
        """The layer numbers that a pattern stands for in this model; none where a stack's length is not known."""
        out: list[tuple[int, ...]] = [()]
        parts = pattern.split(".")
        for at, part in enumerate(parts):
            if part == "*":
                stack = self.stack(find_pattern(".".join(parts[:at])), built=built) or ()
                if len(out) * len(stack) > MAX_PARAMETERS:
                    raise InputError(f"asks for {len(stack):,} {'.'.join(parts[:at])}, as no model has", where=CONFIG)
                out = [(*numbers, n) for numbers in out for n in stack]
        return out

    def narrow(self, pattern: str, answer: Any) -> Any:
        """A profile's answer for a pattern of names, without cases that no layer and features that every layer has."""
        if not isinstance(answer, dict) or "by" not in answer:
            return answer
        stack, star, _ = pattern.partition(".*")
        about = f"layers of {stack}" if star else "no layer"
        key = id(answer), about
        return self.remember(key, lambda: self._narrow(answer, about, self.stack(stack) if star else (None,)))

    def choose(self, answer: Any, layer: int | None) -> Any:
        """What an answer of the profile says of a layer; "?" where that was not surveyed."""
        if isinstance(answer, dict) and "by" in answer:
            return answer["cases"].get(self.features(answer["by"], layer), "?")
        return answer

    def remember(self, key: tuple[int, str], derive: Callable[[], T]) -> T:
        """What is derived from an answer of the profile, given by its id, once for all ranges that give it."""
        if key not in self._derived:
            self._derived[key] = derive()
        found: T = self._derived[key]
        return found

    def _narrow(self, answer: Mapping[str, Any], about: str, layers: Sequence[int | None] | None) -> Any:
        by = answer["by"]
        if layers is None:  # any number may come
            if any(self.profile["features"][name][0] != "true" for name in by):
                return answer
            layers = (None,)
        key = (about, *by)
        if key not in self._values:
            self._values[key] = frozenset(self.features(by, layer) for layer in layers)
        cases = {value: answer["cases"].get(value, "?") for value in self._values[key]}
        first = next(iter(cases.values()), "?")
        if all(case == first for case in cases.values()):
            return first
        kept = [at for at in range(len(by)) if len({value[at] for value in cases}) > 1]
        return {
            "by": [by[at] for at in kept],
            "cases": {"".join(value[at] for at in kept): case for value, case in cases.items()},
        }
