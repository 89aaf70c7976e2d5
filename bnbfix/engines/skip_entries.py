"""Skip entries and the modules that they name. A large model has thousands of both, so not each is compared with each.

A reader of skip entries gives an entry a key, in one form or several; it names the modules that have this key in this
form. Entries of the same form are looked up at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable
from functools import lru_cache

Matches = Callable[[str, str], bool]  # (skip entry, module name): does the entry name the module?


class SkipReader(ABC):
    """A `Matches` whose entries can be looked up by their forms and keys."""

    @abstractmethod
    def __call__(self, entry: str, module: str) -> bool:
        """Return True if the entry names the module."""

    @abstractmethod
    def keys(self, entry: str) -> Iterable[tuple[Hashable, Hashable]]:
        """(form, key) of an entry."""

    @abstractmethod
    def module_keys(self, module: str, form: Hashable) -> Collection[Hashable]:
        """The keys that a module has in a form."""


class _OneByOne(SkipReader):
    """Any function: each entry is a form of its own."""

    def __init__(self, matches: Matches) -> None:
        self._matches = matches

    def __call__(self, entry: str, module: str) -> bool:
        return self._matches(entry, module)

    def keys(self, entry: str) -> Iterable[tuple[Hashable, Hashable]]:
        return ((entry, True),)

    def module_keys(self, module: str, form: Hashable) -> Collection[Hashable]:
        return (self._matches(str(form), module),)


def _reader(matches: Matches) -> SkipReader:
    return matches if isinstance(matches, SkipReader) else _OneByOne(matches)


class SkipList:
    """A list of skip entries, asked for those that name a module."""

    def __init__(self, entries: Iterable[str], matches: Matches) -> None:
        self._entries, self._reader = tuple(entries), _reader(matches)
        self._places: dict[Hashable, dict[Hashable, list[int]]] = {}  # of entries, by form and key
        self._found: dict[str, tuple[str, ...]] = {}
        for place, entry in enumerate(self._entries):
            for form, key in self._reader.keys(entry):
                self._places.setdefault(form, {}).setdefault(key, []).append(place)

    @property
    def forms(self) -> int:
        """The number of forms, each of which is looked up for each module."""
        return len(self._places)

    def find(self, module: str) -> tuple[str, ...]:
        """The entries that name a module, in the order of the list."""
        if module not in self._found:
            places: set[int] = set()
            for form, by_key in self._places.items():
                for key in self._reader.module_keys(module, form):
                    places.update(by_key.get(key, ()))
            self._found[module] = tuple(self._entries[place] for place in sorted(places))
        return self._found[module]


read_skip_list = lru_cache(1 << 6)(SkipList)  # every release and rule asks the same again


class NamedModules:
    """Modules, asked whether an entry names any of them."""

    def __init__(self, modules: Iterable[str], matches: Matches) -> None:
        self._modules, self._reader = tuple(modules), _reader(matches)
        self._keys: dict[Hashable, set[Hashable]] = {}  # by form

    def any_named_by(self, entry: str) -> bool:
        return any(key in self._keys_in(form) for form, key in self._reader.keys(entry))

    def _keys_in(self, form: Hashable) -> set[Hashable]:
        if form not in self._keys:
            self._keys[form] = {key for m in self._modules for key in self._reader.module_keys(m, form)}
        return self._keys[form]
