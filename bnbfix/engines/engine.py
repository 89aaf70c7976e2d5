"""What an engine is to bnbfix: releases, targets, the parameters that it makes, and how it reads skip entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..models.inspection import LinearWeight

PORTABLE, LATEST = "portable", "latest"

Matches = Callable[[str, str], bool]  # (skip entry, module name): does the entry name the module?


@dataclass(frozen=True)
class ReleaseRange:
    """Releases from `first` to `last` that load bitsandbytes checkpoints alike. releases.json explains each trait."""

    first: str
    last: str
    evidence: Literal["run", "read"]
    families: tuple[str, ...]
    quantized: frozenset[str]
    unquantized: frozenset[tuple[str, str]]
    requantizes: bool
    needs_v: bool
    refuses_v: bool
    needs_shared_kv: bool
    expert_prefix: str | None
    per_layer_config: Literal["ignored", "refused", "read"]
    casts_pixels: bool
    plugin: Literal["none", "refused", "required"]

    @property
    def name(self) -> str:
        return self.first if self.first == self.last else f"{self.first}-{self.last}"

    def quantizes(self, family: str, kind: str) -> bool:
        """Return True if the parameter of such a tensor is quantized where no skip entry names its module."""
        return kind in self.quantized and (family, kind) not in self.unquantized


@dataclass(frozen=True)
class Installed:
    """The vLLM installed with bnbfix, by its metadata."""

    version: str
    plugin: str | None


@dataclass(frozen=True)
class Target:
    """What a checkpoint should load in: one range of releases, or several at once."""

    name: str  # a release, or "portable"
    ranges: tuple[ReleaseRange, ...]
    installed: Installed | None = None  # set when the target is the vLLM installed with bnbfix
    warning: str | None = None  # set when the release is newer than what is known

    @property
    def label(self) -> str:
        """The target in words: `vLLM 0.22.1`, or `every vLLM release`."""
        return "every vLLM release" if self.name == PORTABLE else f"vLLM {self.name}"

    def ranges_for(self, family: str) -> tuple[ReleaseRange, ...]:
        """The ranges that it means for a family: of several, those that know the family."""
        if len(self.ranges) == 1:
            return self.ranges
        return tuple(r for r in self.ranges if family in r.families)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the engine, and the weights that fill it: three for qkv_proj, two for gate_up_proj."""

    module: str  # the engine's name
    kind: str
    layer: int | None
    members: tuple[LinearWeight, ...]
    quantizable: bool  # is it quantized where no skip entry names its module?
    skipped_by: tuple[str, ...]  # skip entries that the engine matches with it

    @property
    def quantized(self) -> bool:
        return self.quantizable and not self.skipped_by

    @property
    def partially_quantized(self) -> bool:
        """Return True if some members are quantized in the file and others are not."""
        return len({m.quantized for m in self.members}) > 1

    def member(self, part: str) -> LinearWeight | None:
        return next((m for m in self.members if m.role.part == part), None)


@lru_cache(1 << 14)  # every release asks the same again
def matching_entries(entries: tuple[str, ...], module: str, matches: Matches) -> tuple[str, ...]:
    """The skip entries that name a module."""
    return tuple(e for e in entries if matches(e, module))
