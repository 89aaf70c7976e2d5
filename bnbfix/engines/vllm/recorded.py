"""What a release expects of a model's checkpoint, from its class's profile: parameters, and a place for each tensor."""

from __future__ import annotations

import re
from collections.abc import Container, Hashable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from ...checkpoint.checkpoint import CONFIG
from ...errors import InputError, NotApplicable
from ...models.detect import DRY_LOAD
from ...models.family import Model
from ..engine import Place, ReleaseRange, Slot
from .profiles import (
    derive_size,
    evaluate_feature,
    evaluate_size,
    fill_pattern,
    find_numbers,
    find_pattern,
    known_classes,
    load_profile,
    overlapping_row,
)

REFUSED, IGNORED = Place(refused=True), Place()
TIED = ("tied", "tied_text")  # the features that say that lm_head shares the embeddings' weight
MAX_STACK = 4_096  # layers, or experts of a layer; the most that a model has are 512
MAX_PARAMETERS = 1_000_000  # that a config may ask for; the largest models have a tenth
REMEMBERED = 64  # expectations: those of a model for every range, and of what repairs would make of it
_RECENT: dict[tuple[Hashable, ReleaseRange], RecordedExpectation] = {}
_TEXT = "text_config."
_EXPERT = re.compile(r"\.((?:moe\.)?experts)\.\*\.\w+\.weight")


class RecordedExpectation:
    """What one range of releases expects of a model. Names of tensors are the file's, of parameters vLLM's."""

    def __init__(self, profile: Mapping[str, Any], release: ReleaseRange, model: Model) -> None:
        self._profile, self._model = profile, model
        self._rows = _rows_of(profile["architecture"], release)
        self._vectors: dict[tuple[str, int | None], str] = {}
        self._sizes: dict[str, int | None] = {}
        self._places: dict[str, Place | None] = {}
        self._shapes: dict[int, tuple[int | None, ...]] = {}  # by the answer that has their formulas
        self._stacks: dict[str, list[Sequence[int] | None]] = {}  # of a pattern's stars
        self._answers: dict[tuple[str, str, int | None], Any] = {}

    def _read(self, path: str) -> Any:
        value = self._model.read(path)
        if value is None and path.startswith(_TEXT) and not self._model.config.get("text_config"):
            value = self._model.read(path.removeprefix(_TEXT))  # in one config, as transformers 4 wrote some
        if value is None and (older := self._profile.get("keys", {}).get(path)):
            value = self._model.read(older)
        if value is None:
            value = self._profile["defaults"].get(path)
        return derive_size(path, self._read) if value is None else value

    def _size(self, formula: str | None) -> int | None:
        if formula is None:
            return None
        if formula not in self._sizes:
            self._sizes[formula] = evaluate_size(formula, self._read)
        return self._sizes[formula]

    def _answer(self, kind: str, pattern: str, layer: int | None) -> Any:
        """What the release does with a tensor or parameter of a pattern in a layer; "?" where it was not surveyed."""
        key = kind, pattern, layer
        if key not in self._answers:
            answer = self._rows[kind].get(pattern, "?")
            if isinstance(answer, dict) and "by" in answer:
                vector = "".join(self._feature(name, layer) for name in answer["by"])
                answer = answer["cases"].get(vector, "?")
            self._answers[key] = answer
        return self._answers[key]

    def _feature(self, name: str, layer: int | None) -> str:
        if (name, layer) not in self._vectors:
            self._vectors[name, layer] = evaluate_feature(self._profile["features"][name], self._read, layer)
        return self._vectors[name, layer]

    @cached_property
    def tied(self) -> bool:
        """Return True if config.json says that lm_head shares the embeddings' weight."""
        return any(self._feature(name, None) == "1" for name in TIED if name in self._profile["features"])

    @property
    def expert_prefix(self) -> str | None:
        """What per-expert weights begin with inside their module; None where the release has no place for any."""
        prefix: str | None = self._rows["expert_prefix"]
        return prefix

    @property
    def transposed_experts(self) -> bool:
        """Return True if the tensor of all experts is [experts, columns, rows]."""
        return bool(self._profile.get("transposed_experts"))

    @property
    def refuses_axial_rope(self) -> bool:
        """Return True if the release does not know the name that transformers 5.19 gave the vision tower's rope."""
        return bool(self._rows["refuses_axial"])

    @cached_property
    def parameters(self) -> Mapping[str, Slot]:
        """Every parameter that has to be filled, by name."""
        out = {}
        for pattern in self._rows["parameters"]:
            for numbers in self._expand(pattern, built=True):
                answer = self._answer("parameters", pattern, numbers[0] if numbers else None)
                if pattern.endswith("lm_head.weight") and self.tied:
                    continue  # the embeddings take its place
                if isinstance(answer, dict):
                    name = fill_pattern(pattern, numbers)
                    module = fill_pattern(answer.get("module", pattern.rpartition(".")[0]), numbers)
                    out[name] = Slot(name, module, bool(answer.get("quantized")), bool(answer.get("experts")))
        return out

    def _stack(self, pattern: str, *, built: bool = False) -> Sequence[int] | None:
        """The numbers of a stack's layers in a file, or as built, which may be fewer; None where they are not known."""
        known = self._profile["stacks"].get(pattern)
        if built:
            known = self._profile.get("built", {}).get(pattern, known)
        if isinstance(known, list):
            return known
        length = self._size(known)
        if length is not None and length > MAX_STACK:
            raise InputError(f"asks for {length:,} {pattern}, as no model has", where=CONFIG)
        return None if length is None else range(length)

    def _expand(self, pattern: str, *, built: bool = False) -> list[tuple[int, ...]]:
        """The layer numbers that a pattern stands for in this model; none where a stack's length is not known."""
        out: list[tuple[int, ...]] = [()]
        parts = pattern.split(".")
        for at, part in enumerate(parts):
            if part == "*":
                stack = self._stack(find_pattern(".".join(parts[:at])), built=built) or ()
                if len(out) * len(stack) > MAX_PARAMETERS:
                    raise InputError(f"asks for {len(stack):,} {'.'.join(parts[:at])}, as no model has", where=CONFIG)
                out = [(*numbers, n) for numbers in out for n in stack]
        return out

    def place(self, name: str) -> Place | None:
        """Where the release puts a tensor of the file; None where that was not surveyed."""
        if name not in self._places:
            self._places[name] = self._find_place(name)
        return self._places[name]

    def _find_place(self, name: str) -> Place | None:
        canonical = self.canonical(name)
        if canonical is None:
            return self._place_unknown(name)
        pattern, numbers = find_pattern(canonical), find_numbers(canonical)
        answer = self._answer("tensors", pattern, numbers[0] if numbers else None)
        if self._is_beyond(pattern, numbers):
            return self._place_unknown(canonical)
        if isinstance(answer, dict):
            shape = self._shapes.get(id(answer))
            if shape is None:
                shape = self._shapes[id(answer)] = tuple(map(self._size, answer["shape"]))
            parts = tuple(
                (fill_pattern(parameter, numbers), part.replace("*", str(numbers[-1])) if numbers else part)
                for parameter, found in answer["fills"].items()
                for part in found
            )
            return Place(parts, shape)
        return {"refused": REFUSED, "ignored": IGNORED}.get(answer)

    def ignores(self, name: str) -> bool:
        """Return True if the release drops a tensor without a word."""
        return self.place(name) == IGNORED

    def canonical(self, name: str) -> str | None:
        """The name by which the release knows a tensor, as transformers writes it; None where it knows none."""
        return name if find_pattern(name) in self._rows["tensors"] else self._find_alias(name, accepted=True)

    def rename(self, name: str) -> str | None:
        """The name that the release knows for a tensor whose beginning it does not know; None where it knows none."""
        if self.canonical(name) is None:
            return self._find_alias(name, accepted=False)
        place = self.place(name)
        for pair in self._profile.get("dialects", ()) if place is not None and place.refused else ():
            for theirs, ours in (pair, pair[::-1]):
                other = self.place(ours + name[len(theirs) :]) if name.startswith(theirs) else None
                if other is not None and not other.refused:
                    return f"{ours}{name[len(theirs) :]}"
        return None

    def _find_alias(self, name: str, *, accepted: bool) -> str | None:
        """The name with another beginning that the class has: one that the release reads, or one that it does not."""
        for theirs, ours, reads in self._rows["aliases"]:
            other = f"{ours}{name[len(theirs) :]}"
            if bool(reads) == accepted and name.startswith(theirs) and find_pattern(other) in self._rows["tensors"]:
                return other
        return None

    def _is_beyond(self, pattern: str, numbers: tuple[int, ...]) -> bool:
        """Return True if a layer number is past the end of its stack."""
        if pattern not in self._stacks:
            parts = pattern.split(".")
            self._stacks[pattern] = [self._stack(".".join(parts[:at])) for at, part in enumerate(parts) if part == "*"]
        return any(s is not None and n not in s for n, s in zip(numbers, self._stacks[pattern], strict=True))

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The patterns of every module of the class."""
        names = [*self._rows["tensors"], *(f"{module}." for module in self._rows["unknown"])]
        paths = (name.split(".") for name in names)
        return frozenset(".".join(parts[:n]) for parts in paths for n in range(len(parts)))

    def _place_unknown(self, name: str) -> Place | None:
        """What becomes of a name that the class does not have: refused, or ignored."""
        pattern = module = _find_module(find_pattern(name), self._modules)
        while pattern and pattern not in self._rows["unknown"]:
            pattern = pattern.rpartition(".")[0]
        if (answers := self._rows["unknown"].get(pattern)) is None:
            return None
        if self._is_beyond(find_pattern(name), find_numbers(name)):
            answer = answers.get("beyond", 1)
        elif name.endswith("rotary_emb.inv_freq"):
            answer = answers["rotary_emb.inv_freq"]
        else:
            inside = find_pattern(name)[len(module) + 1 if module else 0 :]
            answer = answers.get(inside if inside in ("bias", "weight") else "bnbfix_unknown" + _shorten(inside), 1)
        return REFUSED if answer else IGNORED

    def missing(self, parameter: str, parts: set[str]) -> tuple[str, ...]:
        """The tensors, by transformers' names, that fill the rest of a parameter of which these parts are filled."""
        numbers, out = find_numbers(parameter), dict[str, None]()
        pattern = find_pattern(parameter)
        for tensor in self._rows["fillers"].get(pattern, ()):
            answer = self._answer("tensors", tensor, numbers[0] if numbers else None)
            wanted = answer["fills"].get(pattern, ()) if isinstance(answer, dict) else ()
            if all("*" not in part and part in parts for part in wanted):
                continue
            own = fill_pattern(tensor, numbers)
            for rest in self._expand(own):
                if any(part.replace("*", str(rest[-1]) if rest else "*") not in parts for part in wanted):
                    out[fill_pattern(own, rest)] = None
        return tuple(out) or (() if parts else (parameter,))


def _shorten(inside: str) -> str:
    """The unknown name that stands for all like this one."""
    return "" if "." not in inside else ".bias" if inside.endswith(".bias") else ".weight"


def _find_module(pattern: str, modules: Container[str]) -> str:
    """The innermost module around a name that the class has."""
    module = pattern.rpartition(".")[0]
    while module and module not in modules:
        module = module.rpartition(".")[0]
    return module


@lru_cache(64)
def _rows_of(architecture: str, release: ReleaseRange) -> dict[str, Any]:
    """The answers of one range of releases, by kind and pattern."""
    profile = load_profile(architecture)
    assert profile is not None, architecture
    out: dict[str, Any] = {}
    for kind in ("tensors", "parameters", "unknown"):
        found = {key: overlapping_row(rows, release.first, release.last) for key, rows in profile[kind].items()}
        out[kind] = {key: answer for key, answer in found.items() if answer is not None}
    fillers: dict[str, list[str]] = {}
    prefixes = set()
    for pattern, answer in out["tensors"].items():
        cases = answer["cases"].values() if isinstance(answer, dict) and "by" in answer else (answer,)
        taken = [case["fills"] for case in cases if isinstance(case, dict)]
        if any(taken) and (m := _EXPERT.search(pattern)):
            prefixes.add(m[1])
        for parameter in {p for fills in taken for p in fills}:
            fillers.setdefault(parameter, []).append(pattern)
    out["fillers"] = fillers
    out["refuses_axial"] = overlapping_row(profile.get("refuses_axial", ()), release.first, release.last)
    # Where weights load under both, quant states are looked for under the engine's own, the longer one.
    out["expert_prefix"] = max(prefixes, key=len, default=None)
    aliases = [
        (*key.split("|"), overlapping_row(rows, release.first, release.last))
        for key, rows in profile["aliases"].items()
    ]
    out["aliases"] = sorted(aliases, key=lambda a: -len(a[0]))
    return out


def check_class(model: Model) -> None:
    """Raises NotApplicable where no release is known to load the model's class."""
    if (name := model.family.architecture) not in known_classes():
        raise NotApplicable(f"is a {name:.100}, which bnbfix does not know", where=CONFIG, command=DRY_LOAD)


def find_refusal(model: Model, release: ReleaseRange) -> str | None:
    """Why a release loads no checkpoint of the model's class; None where it loads some, or does not know the class."""
    found = overlapping_row(known_classes().get(model.family.architecture, ()), release.first, release.last)
    return found if isinstance(found, str) else None


def expect(model: Model, release: ReleaseRange) -> RecordedExpectation | None:
    """What a range of releases expects of a model; None where its class was not surveyed in it."""
    profile = load_profile(model.family.architecture)
    if profile is None or overlapping_row(profile["known"], release.first, release.last) != 1:
        return None
    found = _RECENT.get((model.key, release))
    if found is None:
        if len(_RECENT) >= REMEMBERED:
            _RECENT.clear()
        found = _RECENT[model.key, release] = RecordedExpectation(profile, release, model)
    return found
