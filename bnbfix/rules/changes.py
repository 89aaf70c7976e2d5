"""What a fix may ask for: changes of tensors and of config.json, each with the finding that asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ..checkpoint.checkpoint import Weight
from ..engines.engine import Expectation, Parameter, ReleaseRange
from ..engines.manifest import group_alike, parameters
from ..engines.registry import expect
from ..models.inspection import Inspection, LinearWeight
from .rule import Code


class Insert(NamedTuple):
    """A weight that is added: an exact copy of `donor` with its quant-state tensors, or its dequantized values."""

    name: str
    donor: Weight
    dequantize: bool
    code: Code


class ExpertChange(NamedTuple):
    """What is done to one tensor of experts to be under `prefix`: quantized, split with its quant state, or renamed.

    `transposed`: the rows of each of its matrices are the columns of the expert's.
    """

    action: Literal["quantize", "split", "rename"]
    prefix: str
    code: Code
    detail: str
    transposed: bool = False


class Stack(NamedTuple):
    """Per-expert tensors that become one, in order; `transposed`: in which the rows of each are columns."""

    parts: tuple[Weight, ...]
    transposed: bool = False

    @property
    def kind(self) -> str:
        """What its parts are."""
        return "matrices" if len(self.parts[0].shape) > 1 else "vectors"


class ConfigEdit(NamedTuple):
    """One change of config.json: a value set at a path of keys, or the key removed."""

    path: tuple[str, ...]
    value: Any
    code: Code | None  # None: the user asked
    remove: bool = False


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Changes(NamedTuple):
    """What a repair changes, by name of the weight or tensor."""

    dequantize: Mapping[str, Code | None] = NOTHING  # weights; None: the user asked
    drop: Mapping[str, Code] = NOTHING  # tensors, next to those of dequantized weights
    insert: tuple[Insert, ...] = ()
    retype: Mapping[str, Code] = NOTHING  # quantized weights whose header entry becomes U8 [N, 1]
    experts: Mapping[str, ExpertChange] = NOTHING
    quantize: Mapping[str, Code] = NOTHING  # unquantized weights that become NF4
    stack: Mapping[str, Stack] = NOTHING  # by the name of the one tensor
    config: tuple[ConfigEdit, ...] = ()

    def __or__(self, other: Changes) -> Changes:
        """Both; where both name a weight, the first one's reason stands."""
        both: dict[str, Any] = {}
        for name in self._fields:
            mine, others = getattr(self, name), getattr(other, name)
            both[name] = mine + others if isinstance(mine, tuple) else {**mine, **others, **mine}
        return Changes(**both)

    def keeps_quantized(self, linear: LinearWeight) -> bool:
        """Return True if the weight is quantized and is not dequantized."""
        return linear.quantized and linear.name not in self.dequantize


@dataclass(frozen=True)
class Request:
    """What a repair is asked for: a checkpoint, the releases that it should load in, and the user's choice."""

    inspection: Inspection
    releases: Sequence[ReleaseRange]
    partial_groups: str = "dequantize"

    def linears(self, so_far: Changes) -> list[LinearWeight]:
        """The linear weights that are not dropped."""
        return [linear for linear in self.inspection.linears if linear.name not in so_far.drop]

    @cached_property
    def expectations(self) -> tuple[Expectation, ...]:
        """What each of the releases expects."""
        found = (expect(self.inspection.model, release) for release in self.releases)
        return tuple(e for e in found if e is not None)

    @cached_property
    def readings(self) -> tuple[Expectation, ...]:
        """One expectation of each group that says the same of the file's tensors."""
        return tuple(dict.fromkeys(group_alike(self.expectations, self.inspection.checkpoint.weights).values()))

    def parameters(self, so_far: Changes) -> Sequence[Parameter]:
        """The parameters of every release, without a skip list; where releases make the same, once."""
        return self._parameters(self.linears(so_far)) if so_far.drop else self._undropped

    @cached_property
    def _undropped(self) -> Sequence[Parameter]:
        return self._parameters(self.inspection.linears)

    def _parameters(self, linears: Sequence[LinearWeight]) -> Sequence[Parameter]:
        return [p for expectation in self.readings for p in parameters(linears, expectation, ())]


Fix = Callable[[Request, Changes], Changes]  # what is asked, what is decided already: what is added to that
