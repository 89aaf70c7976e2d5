"""Which findings count, and the exit code that they make: `--select`, `--ignore`, `--fail-on`. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .rule import Code, Severity
from .scan import Finding

CLEAN, FINDINGS, BROKEN, NOTHING_TO_CHECK = 0, 1, 2, 3
LEVELS: dict[str, Severity | None] = {str(s): s for s in Severity if s is not Severity.LOADS} | {"never": None}


@dataclass(frozen=True)
class Selection:
    """Codes that count. What `ignore` names does not, whether `select` names it or not."""

    select: frozenset[Code] = frozenset(Code)
    ignore: frozenset[Code] = frozenset()

    @classmethod
    def parse(cls, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Selection:
        """From codes or their beginnings (BNB1 means BNB101 to BNB111), one or several with commas between them.

        Raises UsageError for one that begins no code.
        """
        chosen = _codes("--select", select)
        return cls(chosen or frozenset(Code), _codes("--ignore", ignore))

    def __contains__(self, code: Code) -> bool:
        return code in self.select and code not in self.ignore

    def of(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        """The findings that count."""
        return tuple(f for f in findings if f.code in self)


def _codes(option: str, given: Iterable[str]) -> frozenset[Code]:
    out: set[Code] = set()
    for prefix in (part.strip().upper() for text in given for part in text.split(",")):
        found = {c for c in Code if prefix and c.value.startswith(prefix)}
        if not found:
            raise UsageError(
                f"{option} {prefix!r} begins no finding's code",
                hint="Give codes such as BNB101, or beginnings such as BNB1. All codes:",
                command="bnbfix explain",
            )
        out |= found
    return frozenset(out)


def findings_code(findings: Iterable[Finding], fail_on: Severity | None = Severity.DEGRADED) -> int:
    """The exit code of a model that was read: 2 when a quant state is damaged, 1 for what reaches `fail_on`, else 0."""
    found = list(findings)
    if any(f.code is Code.QUANT_STATE for f in found):
        return BROKEN
    return FINDINGS if fail_on is not None and any(f.severity >= fail_on for f in found) else CLEAN


def worst(codes: Sequence[int]) -> int:
    """The exit code of several models: broken input, then findings, then clean; 3 only when none could be checked."""
    return next((c for c in (BROKEN, FINDINGS, CLEAN) if c in codes), NOTHING_TO_CHECK)
