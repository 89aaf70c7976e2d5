"""TODO sarif."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

from .outcome import Outcome


def render(outcomes: Iterable[Outcome]) -> Iterator[str]:
    yield ""
