"""What a target is asked for by, and releases in words."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UsageError
from .engine import DEFAULT, LATEST, PORTABLE, Engine, Installed, ReleaseRange, Target, version_key
from .registry import engines

LIST = "bnbfix releases"  # what an error proposes to run


def resolve_target(request: str | None, installed: Installed | None = None) -> Target:
    """The target that a request names: a release, "latest" or "portable". None is the installed vLLM, else "portable".

    Another engine's is named after the engine and a colon. A release that is newer than the engine's table is judged as
    its newest row, and `Target.warning` says so. Raises UsageError for any other release that the table does not know.
    """
    here = installed if request is None else None
    if request is None:
        request = here.version if here else PORTABLE
    if not isinstance(request, str):
        raise UsageError(f"the vLLM release is {request!r}, not a string", command=LIST)
    name, colon, release = request.rpartition(":")
    wanted = (name if colon else DEFAULT).lower()
    engine = next((e for e in engines().values() if e.name.lower() == wanted), None)
    if engine is None:
        hint = f"The engines are {', '.join(engines())}."
        raise UsageError(f"{request!r} names no engine that bnbfix knows", hint=hint, command=LIST)
    rows = engine.ranges
    if release == PORTABLE:
        return Target(request, rows)
    if release == LATEST:
        return target_of(rows[-1])
    known = find_range(release, engine.name)
    found = known or _newest_row(release, engine)
    if found is None:
        words = f"{release!r} is not a {engine.name} release that bnbfix knows"
        if here:
            words = f"the installed {engine.name} {release} is not in the table"
        hint = f"Name a release from {rows[0].first} to {rows[-1].last}, {LATEST!r} or {PORTABLE!r}."
        raise UsageError(words, hint=hint, command=LIST)
    warning = f"{engine.name} {release} is newer than this bnbfix, which judges it as {found.last}"
    warning += "; --dry-load asks the release itself"
    return Target(request, (found,), here, None if known else warning)


def target_of(row: ReleaseRange) -> Target:
    """The last release of a range as a target."""
    return Target(row.last if row.engine == DEFAULT else f"{row.engine}:{row.last}", (row,))


def find_range(version: str, engine: str = DEFAULT) -> ReleaseRange | None:
    """The range that a release falls into; None when the table does not reach it."""
    key = version_key(version)
    if key is None:
        return None
    for r in engines()[engine].ranges:
        last = version_key(r.last)
        # A patch release of the last minor version behaves like it until a row says otherwise.
        if last is not None and key <= max(last, (last[0], last[1], key[2])) and key >= (version_key(r.first) or key):
            return r
    return None


def _newest_row(version: str, engine: Engine) -> ReleaseRange | None:
    """The last row of the table, for a release that is newer than it."""
    key, last = version_key(version), engine.ranges[-1]
    return last if key and key > (version_key(last.last) or key) else None


def format_ranges(found: Iterable[ReleaseRange]) -> str:
    """`0.19.0-0.22.1, 0.28.0`: ranges of one engine in their order, neighbours joined."""
    wanted = tuple(found)
    runs: list[list[ReleaseRange]] = [[]]
    for r in engines()[wanted[0].engine].ranges if wanted else ():
        if r in wanted:
            runs[-1].append(r)
        elif runs[-1]:
            runs.append([])
    ends = ((run[0].first, run[-1].last) for run in runs if run)
    return ", ".join(first if first == last else f"{first}-{last}" for first, last in ends)


def label_ranges(found: Iterable[ReleaseRange]) -> str:
    """`vLLM 0.19.0-0.22.1, 0.28.0`: the same, with the engine's name."""
    wanted = tuple(found)
    return f"{wanted[0].engine if wanted else DEFAULT} {format_ranges(wanted)}"
