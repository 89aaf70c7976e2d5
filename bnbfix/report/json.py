"""Results as JSON documents. They grow only by new keys; `schema` changes when a key changes its meaning.

`bnbfix schema` prints their schemas.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..rules.scan import SCHEMA
from .outcome import ScanOutcome

if TYPE_CHECKING:  # a scan needs none of these
    from ..engines.engine import ReleaseRange
    from ..engines.vllm.probe import LoadResult, ProbeResult


def render(outcomes: Iterable[ScanOutcome], *, several: bool) -> Iterator[str]:
    """One document: a scan's, or for several models {schema, models: [a document for each]}."""
    documents = [outcome_document(o) for o in outcomes]
    whole = {"schema": SCHEMA, "models": documents} if several else documents[0]
    yield json.dumps(whole, indent=2) + "\n"


def render_lines(outcomes: Iterable[ScanOutcome]) -> Iterator[str]:
    """JSON Lines: a document for each model, on a line of its own, as soon as it is known."""
    for outcome in outcomes:
        yield json.dumps(outcome_document(outcome)) + "\n"


def outcome_document(outcome: ScanOutcome) -> dict[str, Any]:
    """A scan's document, or {schema, model, error} where there is no scan."""
    if outcome.result is not None:
        return outcome.result.to_dict()
    error = outcome.error
    assert error is not None
    described = {"kind": type(error).__name__, "message": str(error), "hint": error.hint, "exit_code": error.exit_code}
    return {"schema": SCHEMA, "model": outcome.model, "error": described}


def schema_text(document: str) -> str:
    """The JSON Schema of a document: scan, repair or verify."""
    return resources.files(__package__).joinpath("assets", f"{document}.schema.json").read_text("utf-8")


def load_document(result: LoadResult) -> dict[str, Any]:
    """{ok, versions, error, parameters, quantized, unbound, requantized, forward}"""
    return {"ok": result.ok} | _lists(vars(result))


def probe_document(result: ProbeResult) -> dict[str, Any]:
    """{schema, versions, release, modules, skips, disagreements}"""
    release = {"first": result.release.first, "last": result.release.last}
    disagreements = [vars(d) for d in result.disagreements]
    return {"schema": SCHEMA} | _lists(vars(result)) | {"release": release, "disagreements": disagreements}


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def releases_document(rows: tuple[ReleaseRange, ...]) -> dict[str, Any]:
    """{schema, ranges}: the release table; `classes` are the model classes that the releases load."""
    return {"schema": SCHEMA, "ranges": [vars(r) | {"classes": sorted(r.classes)} for r in rows]}
