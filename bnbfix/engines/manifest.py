"""A load without the bytes: what becomes of a file's tensors by their names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from ..checkpoint.checkpoint import Weight
from ..models.inspection import LinearWeight
from .engine import Expectation, Parameter, Slot
from .skip_entries import read_skip_list

FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})  # dtypes that can be cast


class Load(NamedTuple):
    """A load without the bytes, as far as names and shapes tell."""

    refused: tuple[str, ...]
    renamed: Mapping[str, str]  # refused names, by the name that would be known
    wrong_shapes: Mapping[str, tuple[int | None, ...]]  # the shapes that the weights should have
    no_floats: tuple[str, ...]
    unfilled: tuple[str, ...]  # names of tensors that would fill a parameter which nothing fills
    partial: tuple[str, ...]  # and the rest of a fused one


def group_alike(expectations: Iterable[Expectation], names: Iterable[str]) -> dict[Expectation, Expectation]:
    """For each expectation the first one that says the same of tensors of these names."""
    names, firsts, out = tuple(names), list[tuple[object, Expectation]](), {}
    for expectation in expectations:
        basis = expectation.basis(names)
        first = next((other for known, other in firsts if known == basis), None)
        if first is None:
            firsts.append((basis, expectation))
        out[expectation] = first or expectation
    return out


def load_names(weights: Mapping[str, Weight], expectation: Expectation) -> Load:
    """What a release does with these tensors by their names, dtypes and shapes."""
    refused, wrong_shapes, no_floats = list[str](), {}, list[str]()
    renamed = dict(find_known_names(weights, expectation))
    filled: dict[str, set[str]] = {}
    for name, weight in weights.items():
        place = expectation.place(renamed.get(name, name))
        if place is None or place.refused:
            if place is not None and name not in renamed:
                refused.append(name)
            continue
        for parameter, part in place.fills:
            filled.setdefault(parameter, set()).add(part)
        if place.shape is not None and not _fits(weight.shape, place.shape):
            wrong_shapes[name] = place.shape
        elif place.fills and not weight.quantized and weight.tensor.info.dtype not in FLOATS:
            no_floats.append(name)
    unfilled, partial = list[str](), list[str]()
    for parameter in expectation.parameters:
        missing = expectation.missing(parameter, filled.get(parameter, set()))
        (partial if parameter in filled else unfilled).extend(missing)
    return Load(tuple(refused), renamed, wrong_shapes, tuple(no_floats), tuple(unfilled), tuple(partial))


def find_known_names(weights: Mapping[str, Weight], expectation: Expectation) -> Iterator[tuple[str, str]]:
    """(name, the name that the release knows) of tensors that it knows by another name."""
    for name in weights:
        place = expectation.place(name)
        if place is None or not place.fills:
            known = expectation.rename(name)
            if known is not None and known not in weights:
                yield name, known


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if shape == wanted:
        return True
    return len(shape) == len(wanted) and all(b is None or a == b for a, b in zip(shape, wanted, strict=True))


@lru_cache(1 << 15)  # several rules and plans ask the same
def find_slot(name: str, expectation: Expectation) -> Slot | None:
    """The parameter that a tensor of the file goes into, a fused one perhaps; None for what the release drops."""
    place = expectation.place(name)
    found = (expectation.parameters.get(parameter) for parameter, _ in (place.fills if place else ()))
    return next((slot for slot in found if slot is not None), None)


def parameters(linears: Iterable[LinearWeight], expectation: Expectation, skip: tuple[str, ...]) -> list[Parameter]:
    """A release's parameters for these weights, in the order of their first member, without what it drops."""
    groups: dict[Slot, list[LinearWeight]] = {}
    for linear in linears:
        if (slot := find_slot(linear.name, expectation)) is not None:
            groups.setdefault(slot, []).append(linear)
    entries = read_skip_list(skip, expectation.skips)
    out = []
    for slot, members in groups.items():
        role = members[0].role
        skipped = entries.find(slot.module) if slot.quantized and not slot.experts else ()
        traits = slot.dtype_read, slot.unbound, slot.reordered
        out.append(Parameter(slot.module, role.kind, role.layer, tuple(members), slot.quantized, skipped, *traits))
    return out
