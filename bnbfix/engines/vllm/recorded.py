"""What a release expects of a model's checkpoint, from its class's profile: parameters, and a place for each tensor."""

from __future__ import annotations

import re
from collections.abc import Container, Hashable, Iterable, Mapping
from functools import cached_property, lru_cache, partial
from typing import Any

from ...models.family import Model
from ..engine import Place, ReleaseRange, Slot
from ..skip_entries import Matches
from .facts import ModelFacts
from .profiles import fill_pattern, find_numbers, find_pattern, known_classes, load_profile, overlapping_row
from .skip_entries import vllm_skips

NARROWED = ("tensors", "parameters")  # the answers that depend on the model
REFUSED, IGNORED = Place(refused=True), Place()
REMEMBERED = 8  # models, each with what every range expects of it: the one at hand, and what repairs would make of it
_RECENT: dict[Hashable, tuple[ModelFacts, dict[ReleaseRange, RecordedExpectation]]] = {}
_EXPERT = re.compile(r"\.((?:moe\.)?experts)\.\*\.\w+\.weight")


class RecordedExpectation:
    """What one range of releases expects of a model. Names of tensors are the file's, of parameters vLLM's."""

    def __init__(self, facts: ModelFacts, rows: Mapping[str, Any]) -> None:
        self._facts = facts
        self._rows = dict(rows) | {kind: {k: facts.narrow(k, a) for k, a in rows[kind].items()} for kind in NARROWED}
        self._places: dict[str, Place | None] = {}
        self._whole: dict[tuple[str, int | None], frozenset[str]] = {}  # the parts of a parameter

    def basis(self, names: Iterable[str]) -> object:
        """What the answers about a file depend on that has tensors of these names."""
        patterns, beyond = self._facts.patterns(tuple(names))
        if not beyond and all(_always_read(self._rows["tensors"].get(pattern)) for pattern in patterns):
            return self._taken
        return self._rows  # what becomes of others depends on more than their own names

    @cached_property
    def _taken(self) -> Mapping[str, Mapping[str, Any]]:
        """The parameters that there are, and the tensors that are read."""
        return {kind: {k: a for k, a in self._rows[kind].items() if isinstance(a, dict)} for kind in NARROWED}

    @property
    def skips(self) -> Matches:
        """How vLLM reads skip entries."""
        return vllm_skips

    @property
    def tied(self) -> bool:
        """Return True if config.json says that lm_head shares the embeddings' weight."""
        return self._facts.tied

    @property
    def expert_prefix(self) -> str | None:
        """What per-expert weights begin with inside their module; None where the release has no place for any."""
        prefix: str | None = self._rows["expert_prefix"]
        return prefix

    @property
    def transposed_experts(self) -> bool:
        """Return True if the tensor of all experts is [experts, columns, rows]."""
        return bool(self._facts.profile.get("transposed_experts"))

    @property
    def interleaved_experts(self) -> bool:
        """Return True if gate and up alternate in the tensor of both."""
        return bool(self._facts.profile.get("interleaved_experts"))

    @property
    def refuses_axial_rope(self) -> bool:
        """Return True if the release does not know the name that transformers 5.19 gave the vision tower's rope."""
        return bool(self._rows["refuses_axial"])

    @cached_property
    def parameters(self) -> Mapping[str, Slot]:
        """Every parameter that has to be filled, by name."""
        out: dict[str, Slot] = {}
        for pattern, answer in self._rows["parameters"].items():
            if not (self.tied and pattern.endswith("lm_head.weight")):  # else the embeddings take its place
                about = f"slots of {pattern}"
                out |= self._facts.remember((id(answer), about), partial(self._make_slots, pattern, answer))
        return out

    def _make_slots(self, pattern: str, answer: Any) -> dict[str, Slot]:
        """The parameters of a pattern, by name."""
        out = {}
        read, unbound = (pattern in self._facts.profile.get(key, ()) for key in ("dtype_read", "unbound"))
        for numbers in self._facts.expand(pattern, built=True):
            made = self._facts.choose(answer, numbers[0] if numbers else None)
            if isinstance(made, dict):
                name = fill_pattern(pattern, numbers)
                module = fill_pattern(made.get("module", pattern.rpartition(".")[0]), numbers)
                quantized, experts, reordered = (bool(made.get(key)) for key in ("quantized", "experts", "reordered"))
                out[name] = Slot(name, module, quantized, experts, read, unbound, reordered)
        return out

    def place(self, name: str) -> Place | None:
        """Where the release puts a tensor of the file; None where that was not surveyed."""
        if name not in self._places:
            self._places[name] = self._find_place(name)
        return self._places[name]

    def _find_place(self, name: str) -> Place | None:
        canonical = self.canonical(name)
        if canonical is None or self._facts.is_beyond(canonical):
            return self._place_unknown(canonical or name)
        answer = self._rows["tensors"][find_pattern(canonical)]
        return self._facts.remember((id(answer), canonical), partial(self._make_place, canonical, answer))

    def _make_place(self, name: str, answer: Any) -> Place | None:
        numbers = find_numbers(name)
        read = self._facts.choose(answer, numbers[0] if numbers else None)
        if not isinstance(read, dict):
            return {"refused": REFUSED, "ignored": IGNORED}.get(read)
        shape = self._facts.remember((id(read), "shape"), lambda: tuple(map(self._facts.size, read["shape"])))
        parts = (
            (fill_pattern(parameter, numbers), part.replace("*", str(numbers[-1])) if numbers else part)
            for parameter, found in read["fills"].items()
            for part in found
        )
        return Place(tuple(parts), shape)

    def ignores(self, name: str) -> bool:
        """Return True if the release drops a tensor without a word."""
        return self.place(name) == IGNORED

    def canonical(self, name: str) -> str | None:
        """The name by which the release knows a tensor, as transformers writes it; None where it knows none."""
        return name if find_pattern(name) in self._rows["tensors"] else self._find_alias(name, accepted=True)

    def rename(self, name: str) -> str | None:
        """The name by which the release knows a tensor that it does not know by this one; None where there is none."""
        if self.canonical(name) is None:
            return self._find_alias(name, accepted=False)
        place = self.place(name)
        for pair in self._facts.profile.get("dialects", ()) if place is not None and place.refused else ():
            for theirs, ours in (pair, pair[::-1]):
                other = self.place(ours + name[len(theirs) :]) if name.startswith(theirs) else None
                if other is not None and not other.refused:
                    return f"{ours}{name[len(theirs) :]}"
        for theirs, ours in self._facts.profile.get("inner_names", ()) if place is not None and not place.fills else ():
            known = name.replace(theirs, ours)
            if known != name and (other := self.place(known)) is not None and other.fills:
                return known
        return None

    def _find_alias(self, name: str, *, accepted: bool) -> str | None:
        """The name with another beginning that the class has: one that the release reads, or one that it does not."""
        for theirs, ours, reads in self._rows["aliases"]:
            other = f"{ours}{name[len(theirs) :]}"
            if bool(reads) == accepted and name.startswith(theirs) and find_pattern(other) in self._rows["tensors"]:
                return other
        return None

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
        if self._facts.is_beyond(name):
            answer = answers.get("beyond", 1)
        elif name.endswith("rotary_emb.inv_freq"):
            answer = answers["rotary_emb.inv_freq"]
        else:
            inside = find_pattern(name)[len(module) + 1 if module else 0 :]
            answer = answers.get(inside if inside in ("bias", "weight") else "bnbfix_unknown" + _shorten(inside), 1)
        return REFUSED if answer else IGNORED

    @cached_property
    def _fillers(self) -> Mapping[str, Mapping[str, Any]]:
        """The tensors that fill a parameter in some layer: the answers to them, by pattern."""
        out: dict[str, dict[str, Any]] = {}
        for pattern, answer in self._rows["tensors"].items():
            for parameter in {p for case in _cases(answer) for p in case["fills"]}:
                out.setdefault(parameter, {})[pattern] = answer
        return out

    def missing(self, parameter: str, parts: set[str]) -> tuple[str, ...]:
        """The tensors, by transformers' names, that fill the rest of a parameter of which these parts are filled."""
        numbers, pattern = find_numbers(parameter), find_pattern(parameter)
        layer = numbers[0] if numbers else None
        if parts and parts >= self._parts(pattern, layer):
            return ()
        out = dict[str, None]()
        for tensor, answers in self._fillers.get(pattern, {}).items():
            answer = self._facts.choose(answers, layer)
            wanted = answer["fills"].get(pattern, ()) if isinstance(answer, dict) else ()
            if all(part in parts for part in wanted):
                continue
            own = fill_pattern(tensor, numbers)
            for rest in self._facts.expand(own):
                if any(part.replace("*", str(rest[-1]) if rest else "*") not in parts for part in wanted):
                    out[fill_pattern(own, rest)] = None
        return tuple(out) or (() if parts else (parameter,))

    def _parts(self, pattern: str, layer: int | None) -> frozenset[str]:
        """The parts of a parameter, those of experts with `*` for their numbers."""
        key = pattern, layer if pattern in self._varying else None
        if key not in self._whole:
            answers = (self._facts.choose(answer, layer) for answer in self._fillers.get(pattern, {}).values())
            parts = (p for a in answers if isinstance(a, dict) for p in a["fills"].get(pattern, ()))
            self._whole[key] = frozenset(parts)
        return self._whole[key]

    @cached_property
    def _varying(self) -> frozenset[str]:
        """Parameters that are not filled alike in all layers."""
        return frozenset(p for p, fillers in self._fillers.items() if any("by" in a for a in fillers.values()))


def _cases(answer: Any) -> list[Mapping[str, Any]]:
    """The ways in which a tensor fills parameters, by layers and models."""
    cases = answer["cases"].values() if isinstance(answer, dict) and "by" in answer else (answer,)
    return [case for case in cases if isinstance(case, dict)]


def _always_read(answer: Any) -> bool:
    """Return True if a tensor is read in every layer, into a parameter or a buffer."""
    return isinstance(answer, dict) and len(_cases(answer)) == len(answer.get("cases", "1"))


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
    filling = (pattern for pattern, answer in out["tensors"].items() if any(c["fills"] for c in _cases(answer)))
    prefixes = {m[1] for pattern in filling if (m := _EXPERT.search(pattern))}
    out["refuses_axial"] = overlapping_row(profile.get("refuses_axial", ()), release.first, release.last)
    # Where weights load under both, quant states are looked for under the engine's own, the longer one.
    out["expert_prefix"] = max(prefixes, key=len, default=None)
    aliases = [
        (*key.split("|"), overlapping_row(rows, release.first, release.last))
        for key, rows in profile["aliases"].items()
    ]
    out["aliases"] = sorted(aliases, key=lambda a: -len(a[0]))
    return out


def find_refusal(model: Model, release: ReleaseRange) -> str | None:
    """Why a release loads no checkpoint of the model's class; None where it loads some, or does not know the class."""
    found = overlapping_row(known_classes().get(model.family.architecture, ()), release.first, release.last)
    return found if isinstance(found, str) else None


def expect(model: Model, release: ReleaseRange) -> RecordedExpectation | None:
    """What a range of releases expects of a model; None where its class was not surveyed in it."""
    profile = load_profile(model.family.architecture)
    if profile is None or overlapping_row(profile["known"], release.first, release.last) != 1:
        return None
    if model.key not in _RECENT:
        if len(_RECENT) >= REMEMBERED:
            _RECENT.clear()
        _RECENT[model.key] = ModelFacts(profile, model), {}
    facts, made = _RECENT[model.key]
    if release not in made:
        made[release] = RecordedExpectation(facts, _rows_of(profile["architecture"], release))
    return made[release]
