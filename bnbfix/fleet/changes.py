"""What changed between two scans of a fleet: new findings, fixed ones, and models that a new release does not load."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ..engines.engine import Target, version_key
from ..report.markdown import code, escape, render_table
from ..report.text import count, escape_control_chars
from ..rules.rule import Code
from ..rules.selection import BROKEN, CLEAN, FINDINGS
from .results import COUNTING, VERDICTS, Row, Verdict

NEW, BROKEN_BY, UNREADABLE = "new findings", "broken by a new release", "can no longer be read"
FIXED, GONE = "fixed", "no longer in the fleet"
BAD = {NEW: FINDINGS, BROKEN_BY: FINDINGS, UNREADABLE: BROKEN}


class Change(NamedTuple):
    """What changed in a model, in which releases, and because of what."""

    model: str
    what: str
    releases: str
    because: str


def find_changes(old: Mapping[str, Row], new: Iterable[Row], target: Target) -> list[Change]:
    """The changes from one scan to the next in the releases of a target, the bad ones first."""
    rows = list(new)
    out = [change for row in rows for change in _compare_rows(old.get(row.model), row, target)]
    out += [Change(model, GONE, "", "") for model in sorted(old.keys() - {row.model for row in rows})]
    return sorted(out, key=lambda c: [*BAD, FIXED, GONE].index(c.what))


def _compare_rows(old: Row | None, new: Row, target: Target) -> Iterator[Change]:
    if new.verdict in ("error", "skipped"):
        if new.verdict == "error" and (old is None or old.verdict != "error"):
            yield Change(new.model, UNREADABLE, "", new.because)
        return
    wanted = {r.first for r in target.ranges}
    found: dict[tuple[str, str], list[Verdict]] = {}
    for now in new.releases:
        if now.first not in wanted:
            continue
        before = _verdict_before(old, now)
        known = _counting_codes(before) if before else set()
        later = before is not None and _is_after(now.first, before.last)
        why = " ".join(sorted(_counting_codes(now) - known))
        if not why and before and known and VERDICTS.index(now.verdict) < VERDICTS.index(before.verdict):
            why = f"{before.verdict} became {now.verdict}"
        if why:
            found.setdefault((BROKEN_BY if later else NEW, why), []).append(now)
        if not later and (less := sorted(known - _counting_codes(now))):
            found.setdefault((FIXED, " ".join(less)), []).append(now)
    for (what, codes), verdicts in found.items():
        yield Change(new.model, what, _join_releases(verdicts), codes)


def _verdict_before(old: Row | None, now: Verdict) -> Verdict | None:
    """What the older scan said of a range; of releases that it did not know, what it said of the newest."""
    for before in reversed(old.releases if old else ()):
        if not _is_after(before.first, now.first):
            return before
    return None


def _is_after(release: str, other: str) -> bool:
    return (version_key(release) or (0, 0, 0)) > (version_key(other) or (0, 0, 0))


def _counting_codes(verdict: Verdict) -> set[str]:
    """The codes of a range, but for that it does not know the class, which nobody asked of it."""
    return set(verdict.codes) - {str(Code.UNKNOWN_CLASS)} if verdict.verdict in COUNTING else set()


def _join_releases(verdicts: Iterable[Verdict]) -> str:
    return ", ".join(v.first if v.first == v.last else f"{v.first}-{v.last}" for v in verdicts)


def changes_code(changes: Iterable[Change]) -> int:
    """The exit code: 2 where a model can no longer be read, 1 for new findings, else 0."""
    return max((BAD.get(c.what, CLEAN) for c in changes), default=CLEAN)


def render_changes(changes: Iterable[Change]) -> Iterator[str]:
    """A Markdown table, for a pull request or a chat."""
    found = list(changes)
    if not found:
        yield "Nothing changed.\n"
        return
    bad = len({c.model for c in found if c.what in BAD})
    yield f"{count(len({c.model for c in found}), 'model')} changed, {bad} for the worse.\n\n"
    rows = [
        (code(escape_control_chars(c.model)), c.what, c.releases, escape(escape_control_chars(c.because)))
        for c in found
    ]
    yield from (f"{line}\n" for line in render_table(("model", "change", "vLLM", "because of"), rows))
