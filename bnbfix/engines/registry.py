"""The engines that there are, and whom to ask about a release."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module

from ..checkpoint.checkpoint import CONFIG
from ..errors import NotApplicable
from ..models.detect import DRY_LOAD
from ..models.family import Model
from .engine import DEFAULT, Engine, Expectation, ReleaseRange, Target


@cache
def engines() -> dict[str, Engine]:
    """Every engine by its name, the default one first: a folder next to this file is one."""
    package = import_module(__package__)
    folders = (m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)
    found: list[Engine] = [import_module(f"{__package__}.{name}.engine").ENGINE for name in folders]
    return {e.name: e for e in sorted(found, key=lambda e: (e.name != DEFAULT, e.name))}


def expect(model: Model, release: ReleaseRange) -> Expectation | None:
    """What a range of releases expects of a model; None where it does not load the model's class."""
    return engines()[release.engine].expect(model, release)


def find_refusal(model: Model, release: ReleaseRange) -> str | None:
    """Why a range of releases loads no checkpoint of the model's class, where it knows the class."""
    return engines()[release.engine].find_refusal(model, release)


def find_ranges(model: Model, target: Target) -> Sequence[ReleaseRange]:
    """The ranges of which something is known about the model's class: its engine's, or the target's that was asked.

    Raises NotApplicable where there are none.
    """
    name, ranges = model.family.architecture, engines()[target.engine].ranges
    if any(name in r.classes or find_refusal(model, r) for r in ranges):
        return ranges
    if any(expect(model, r) for r in target.ranges):
        return target.ranges
    raise NotApplicable(f"is a {name:.100}, which bnbfix does not know", where=CONFIG, command=DRY_LOAD)
