"""The parameters that a vLLM release makes for the projections of a checkpoint, and what the checkpoint has for them.

This is where a checkpoint and a release meet: `scan` reads findings off it, `mend` decides by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...checkpoint.checkpoint import CONFIG, Checkpoint, Weight
from ...errors import InputError
from ...models import gemma4
from ...models.gemma4 import Model, Place
from ...rules.skip_list import matching_entries, repeats, vllm_skips
from .releases import ReleaseRange

MAX_PROJECTIONS = 1_500  # beside experts; each may be held against every skip entry, and real models have hundreds
MAX_PATTERNS = 20  # skip entries that repeat more than once, which are slow to hold against a name; real ones do not


@dataclass(frozen=True)
class Member:
    """A weight of the checkpoint and its place in the model."""

    weight: Weight
    place: Place

    @property
    def quantized(self) -> bool:
        return self.weight.quantized


@dataclass(frozen=True)
class Parameter:
    """One vLLM parameter, and the weights that go into it: three for a fused qkv_proj, two for gate_up_proj."""

    module: str  # vLLM's name
    role: str
    layer: int | None
    members: tuple[Member, ...]
    quantizable: bool  # does the release pack this role at all?
    skipped_by: tuple[str, ...]  # skip entries that vLLM matches for it

    @property
    def quantized(self) -> bool:
        """Does vLLM make a quantized parameter?"""
        return self.quantizable and not self.skipped_by

    @property
    def partially_quantized(self) -> bool:
        """Are some members quantized and others plain?"""
        return len({m.quantized for m in self.members}) > 1

    def member(self, part: str) -> Member | None:
        return next((m for m in self.members if m.place.part == part), None)


def projections(checkpoint: Checkpoint) -> list[Member]:
    """Every weight of a linear module: quantized, or plain with two dimensions; damaged ones are neither. By name.

    Raises InputError when there are more than any model has, of them or of patterns to hold against them.
    """
    if (count := sum(repeats(e) > 1 for e in checkpoint.skip_modules)) > MAX_PATTERNS:
        raise InputError(f"llm_int8_skip_modules has {count:,} patterns, more than any model", where=CONFIG)
    out, damaged = [], damaged_weights(checkpoint)
    for weight in checkpoint.weights.values():
        if weight.name in damaged:
            continue
        place = gemma4.place(weight.name)
        if (
            place.role in gemma4.LINEAR_ROLES and (weight.quantized or len(weight.tensor.info.shape) == 2)
        ) or weight.quantized:
            out.append(Member(weight, place))
    if (count := sum(m.place.role != "expert" for m in out)) > MAX_PROJECTIONS:
        raise InputError(f"{count:,} linear modules are more than any model has", where=checkpoint.source.name)
    return out


def damaged_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the weights whose quant state lies."""
    where = {e.where for e in checkpoint.damaged}
    return frozenset(w.name for w in checkpoint.weights.values() if where and f"{w.tensor.shard}: {w.name}" in where)


def shape_mismatches(members: Sequence[Member], model: Model) -> list[tuple[Member, str]]:
    """Quantized language weights whose quant state says a shape that the model cannot have, such as a transposed one.

    The bytes do not tell: as many numbers are quantized either way.
    """
    width, out = model.text_config.get("hidden_size"), []
    for m in members:
        side = 0 if m.place.part in ("o_proj", "down_proj") else 1
        if m.weight.state is None or m.place.role not in ("attention", "mlp", "expert") or type(width) is not int:
            continue
        shape = m.weight.state.shape
        if len(shape) != 2 or shape[side] != width:
            which = ("rows", "columns")[side]
            out.append((m, f"quant state says shape {list(shape)[:8]}; hidden_size asks for {width:,} {which}"))
    return out


def parameters(
    members: Sequence[Member], model: Model, release: ReleaseRange, skip: tuple[str, ...]
) -> list[Parameter]:
    """The release's parameters for these weights, in the order of their first member. What it drops is left out."""
    groups: dict[str, list[Member]] = {}
    for m in members:
        if (module := module_of(m.place, model, release)) is not None:
            groups.setdefault(module, []).append(m)
    return [_parameter(module, ms, model, release, skip) for module, ms in groups.items()]


def module_of(place: Place, model: Model, release: ReleaseRange) -> str | None:
    """vLLM's name for the module a weight goes into; None for k and v that the release drops."""
    fused = True
    if place.role == "attention" and place.layer is not None and model.kv_shared(place.layer):
        fused = release.kv_shared == "needs_kv"
        if not fused and place.part in ("k_proj", "v_proj"):
            return None
    return gemma4.vllm_module(model, place, fused=fused)


def is_quantizable(place: Place, model: Model, release: ReleaseRange) -> bool:
    """Does the release make a quantized parameter for this place, where no skip entry names it?"""
    if model.family.name == "gemma4_unified" and place.role == "embedder":
        return False  # gemma4_unified.py passes the embedders no quant_config, in any release
    return place.role in release.quantized


def _parameter(
    module: str, members: list[Member], model: Model, release: ReleaseRange, skip: tuple[str, ...]
) -> Parameter:
    place = members[0].place
    quantizable = is_quantizable(place, model, release)
    # Experts are made by another class, which no skip entry reaches.
    skipped = matching_entries(skip, module, vllm_skips) if quantizable and place.role != "expert" else ()
    return Parameter(module, place.role, place.layer, tuple(members), quantizable, skipped)


def by_layer(members: Sequence[Member]) -> Mapping[tuple[int, str], Member]:
    """Language projections by (layer, part)."""
    return {
        (m.place.layer, m.place.part): m
        for m in members
        if m.place.layer is not None and m.place.part is not None and m.place.role in ("attention", "mlp")
    }
