"""The parameters that a vLLM release makes for the linear weights of a checkpoint, and how it reads skip entries.

Source: vLLM quantization/bitsandbytes.py, `is_layer_skipped_bnb`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

from ...models.inspection import LinearWeight
from ..engine import Expectation, Parameter, Slot, matching_entries


def vllm_skips(entry: str, module: str) -> bool:
    """Return True if the entry is one dotted component of the module's name, or a dotted prefix of it."""
    return entry in names_matched(module)


@cache
def names_matched(module: str) -> frozenset[str]:
    """The skip entries that name a module."""
    parts = module.split(".")
    return frozenset(parts) | {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


@lru_cache(1 << 15)  # several rules and plans ask the same
def find_slot(name: str, expectation: Expectation) -> Slot | None:
    """The parameter that a tensor of the file goes into, a fused one perhaps; None for what the release drops."""
    place = expectation.place(name)
    found = (expectation.parameters.get(parameter) for parameter, _ in (place.fills if place else ()))
    return next((slot for slot in found if slot is not None), None)


def parameters(linears: Iterable[LinearWeight], expectation: Expectation, skip: tuple[str, ...]) -> list[Parameter]:
    """The release's parameters for these weights, in the order of their first member, without what it drops."""
    groups: dict[Slot, list[LinearWeight]] = {}
    for linear in linears:
        if (slot := find_slot(linear.name, expectation)) is not None:
            groups.setdefault(slot, []).append(linear)
    out = []
    for slot, members in groups.items():
        role = members[0].role
        skipped = matching_entries(skip, slot.module, vllm_skips) if slot.quantized and not slot.experts else ()
        traits = slot.dtype_read, slot.unbound
        out.append(Parameter(slot.module, role.kind, role.layer, tuple(members), slot.quantized, skipped, *traits))
    return out
