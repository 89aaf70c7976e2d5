"""What an engine is to bnbfix: releases, targets, and the parameters that it makes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

from ..models.family import Model
from ..models.inspection import LinearWeight
from .skip_entries import Matches

PORTABLE, LATEST = "portable", "latest"
DEFAULT = "vLLM"  # the engine whose releases a target names without an engine


@lru_cache(1 << 10)
def version_key(version: str) -> tuple[int, int, int] | None:
    """(major, minor, patch) of a release like 0.22.1, v0.22, 0.22.1+cpu, 0.22.1.post1 or 0.22.1rc1.dev12+g1a2b3c.

    None for anything else.
    """
    number, label = r"(\d{1,6})", r"(?:(?:\.post|\.dev|rc|a|b)\d{1,9})"
    m = re.fullmatch(rf"v?{number}\.{number}(?:\.{number})?{label}{{0,3}}(?:\+[\w.]+)?", version.strip(), re.ASCII)
    return (int(m[1]), int(m[2]), int(m[3] or 0)) if m else None


@dataclass(frozen=True)
class ReleaseRange:
    """Releases from `first` to `last` that load bitsandbytes checkpoints alike. releases.json explains each trait."""

    engine: str  # its name
    first: str
    last: str
    evidence: Literal["run", "read"]
    classes: frozenset[str]  # model classes that it loads under bitsandbytes
    requantizes: bool
    needs_v: bool
    refuses_v: bool
    needs_shared_kv: bool
    expert_prefix: str | None
    per_layer_config: Literal["ignored", "refused", "read"]
    uses_tied_lm_head: bool
    transformers_below: str | None
    casts_pixels: bool
    plugin: Literal["none", "refused", "required"]

    @property
    def name(self) -> str:
        return self.first if self.first == self.last else f"{self.first}-{self.last}"


class Installed(NamedTuple):
    """An installed vLLM and what is installed next to it, by their metadata."""

    version: str
    plugin: str | None
    transformers: str | None = None


@dataclass(frozen=True)
class Target:
    """What a checkpoint should load in: one range of releases, or several at once."""

    name: str  # a release, or "portable"; of another engine than the default one, after "ENGINE:"
    ranges: tuple[ReleaseRange, ...]
    installed: Installed | None = None  # set when the target is the vLLM installed with bnbfix
    warning: str | None = None  # set when the release is newer than what is known
    asking: tuple[str, ...] = ()  # options of a command that asks the same vLLM; set when one is asked

    @property
    def engine(self) -> str:
        """The name of the engine whose releases they are."""
        return self.ranges[0].engine

    @property
    def release(self) -> str:
        """A release, or "portable"."""
        return self.name.rpartition(":")[2]

    @property
    def label(self) -> str:
        """The target in words: `vLLM 0.22.1`, or `every vLLM release`."""
        return f"every {self.engine} release" if self.release == PORTABLE else f"{self.engine} {self.release}"

    def ranges_for(self, model: Model) -> tuple[ReleaseRange, ...]:
        """The ranges that it means for a model: of several, those that know its class."""
        if len(self.ranges) == 1:
            return self.ranges
        return tuple(r for r in self.ranges if model.family.architecture in r.classes)


class Slot(NamedTuple):
    """One parameter of the engine, as its class makes it where no skip entry names its module."""

    name: str
    module: str  # the name that skip entries are compared with
    quantized: bool
    experts: bool  # of a mixture: no skip entry reaches them
    dtype_read: bool = False  # the class makes a number in this dtype: quantized, that is uint8
    unbound: bool = False  # it gets no quant state: the class renames its tensor after the loader has looked for it
    reordered: bool = False  # the class moves its rows, and of a quantized tensor the packed bytes


class Place(NamedTuple):
    """What an engine does with a tensor of the file: it fills parts of parameters, or is ignored, or stops the load."""

    fills: tuple[tuple[str, str], ...] = ()  # (parameter, part): q of a qkv_proj, or "" for the whole
    shape: tuple[int | None, ...] | None = None  # that it has to have; None where that is not known
    refused: bool = False


class Expectation(Protocol):
    """What a release expects of a model's checkpoint. Names of tensors are the file's, of parameters the engine's."""

    def __hash__(self) -> int:
        """Answers are remembered by the one who gave them."""

    def basis(self, names: Iterable[str]) -> object:
        """What the answers about tensors of these names depend on: equal where releases do the same with all of them.

        That is `place`, `rename`, `parameters` and `missing`.
        """

    @property
    def skips(self) -> Matches:
        """How the release reads skip entries: the same function for all that read them alike."""

    @property
    def tied(self) -> bool:
        """Return True if config.json says that lm_head shares the embeddings' weight."""

    @property
    def expert_prefix(self) -> str | None:
        """What per-expert weights begin with inside their module, such as `experts`; None where it has none."""

    @property
    def refuses_axial_rope(self) -> bool:
        """Return True if the release does not know the name that transformers 5.19 gave the vision tower's rope."""

    @property
    def transposed_experts(self) -> bool:
        """Return True if the tensor of all experts is [experts, columns, rows]."""

    @property
    def interleaved_experts(self) -> bool:
        """Return True if gate and up alternate in the tensor of both."""

    @property
    def parameters(self) -> Mapping[str, Slot]:
        """Every parameter that has to be filled, by name."""

    def place(self, name: str) -> Place | None:
        """Where the release puts a tensor; None where that is not known."""

    def canonical(self, name: str) -> str | None:
        """The name that transformers writes for a tensor that the release knows; None where it knows none."""

    def ignores(self, name: str) -> bool:
        """Return True if the release drops a tensor without a word."""

    def missing(self, parameter: str, parts: set[str]) -> tuple[str, ...]:
        """The tensors, by transformers' names, that fill the rest of a parameter of which these parts are filled."""

    def rename(self, name: str) -> str | None:
        """The name by which the release knows a tensor that it does not know by this one; None where there is none."""


class Engine(Protocol):
    """What serves checkpoints: a folder in engines/ whose `engine.py` has one as ENGINE."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def command(self) -> Sequence[str]:
        """What serves a checkpoint; the checkpoint follows."""

    @property
    def ranges(self) -> tuple[ReleaseRange, ...]:
        """Its releases, oldest first."""

    def expect(self, model: Model, release: ReleaseRange) -> Expectation | None:
        """What a range of releases expects of a model; None where it does not load the model's class."""

    def find_refusal(self, model: Model, release: ReleaseRange) -> str | None:
        """Why a range of releases loads no checkpoint of the model's class, where it knows the class."""

    def serving_packages(self, target: Target) -> list[str]:
        """What to install with pip to serve a checkpoint for a target."""


class Parameter(NamedTuple):
    """One parameter of the engine, and the weights that fill it: three for qkv_proj, two for gate_up_proj."""

    module: str  # the engine's name
    kind: str
    layer: int | None
    members: tuple[LinearWeight, ...]
    quantizable: bool  # is it quantized where no skip entry names its module?
    skipped_by: tuple[str, ...]  # skip entries that the engine matches with it
    dtype_read: bool = False
    unbound: bool = False
    reordered: bool = False

    @property
    def quantized(self) -> bool:
        return self.quantizable and not self.skipped_by

    @property
    def partially_quantized(self) -> bool:
        """Return True if some members are quantized in the file and others are not."""
        return len({m.quantized for m in self.members}) > 1

    def member(self, part: str) -> LinearWeight | None:
        return next((m for m in self.members if m.role.part == part), None)
