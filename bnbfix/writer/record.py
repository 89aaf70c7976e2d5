"""bnbfix.json, the record in an output: what was changed, for which target, and a hash of every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..__version__ import __version__
from ..checkpoint.checkpoint import MAX_JSON
from ..checkpoint.source import Source, read_file
from ..errors import InputError, UsageError
from ..planner.plan import RECORD, Action, Options, Plan

RECORD_SCHEMA = 1  # of the record; changes when a key changes its meaning
CHECKSUM = "record_sha256"  # key: tells that the record was edited, by accident or by somebody who does not know of it


def build_record(plan: Plan, files: Mapping[str, str], linked: Sequence[str] = (), *, in_place: bool = False) -> bytes:
    """The bytes of bnbfix.json. `files` has the SHA-256 of each file; those in `linked` were not read and have none:
    hard links, or, of a repair `in_place`, every file that it left alone.

    The record of a repo's repair has one more key than that of a folder's: "source", {"repo", "revision"}.
    """
    origin = plan.checkpoint.source.origin
    doc: dict[str, Any] = {
        "schema": RECORD_SCHEMA,
        "bnbfix": __version__,
        **({"source": dict(origin)} if origin else {}),
        "target": plan.target.name,
        "releases": [r.name for r in plan.target.ranges],
        "options": vars(plan.options),
        "edits": [e.to_dict() for e in plan.edits],
        "sha256": dict(sorted(files.items())),
    }
    if linked:
        doc["linked"] = sorted(linked)
    if in_place:
        doc["in_place"] = True
    doc[CHECKSUM] = record_checksum(doc)
    # A file name that is not UTF-8 holds halves of surrogate pairs: written as JSON's own escapes.
    return (json.dumps(doc, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def record_checksum(doc: Mapping[str, Any]) -> str:
    """The SHA-256 of a record without its checksum, however its JSON is laid out."""
    rest = {key: value for key, value in doc.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def was_edited(doc: Mapping[str, Any]) -> bool:
    """Says whether a record is not what a repair wrote."""
    try:
        return bool(doc.get(CHECKSUM) != record_checksum(doc))
    except RecursionError:
        return True


def read_record(output: Source) -> dict[str, Any]:
    """bnbfix.json of an output. Raises InputError when it is missing, not a record, or of an unknown schema."""
    if RECORD not in output.files:
        raise InputError("is missing; was this folder written by `bnbfix repair`?", where=f"{output.name}/{RECORD}")
    if output.files[RECORD] > MAX_JSON:
        raise InputError(f"{output.files[RECORD]:,} bytes are too many for such a file", where=RECORD)
    try:
        doc = json.loads(read_file(output, RECORD))
        schema = doc["schema"]
        if type(schema) is not int:
            raise ValueError("schema is not a number")
        if schema != RECORD_SCHEMA:
            raise InputError(
                f"has schema {schema}, which this bnbfix does not know", where=RECORD, hint="Use a newer bnbfix."
            )
        if not isinstance(doc["target"], str) or not all(isinstance(v, str) for v in doc["sha256"].values()):
            raise ValueError("target and sha256 are not what they should be")
        if not isinstance(edits := doc["edits"], list) or not all(isinstance(e, dict) for e in edits):
            raise ValueError("edits is not a list of edits")
        Options(**doc["options"])
        if not isinstance(linked := doc.get("linked", []), list) or not all(isinstance(name, str) for name in linked):
            raise ValueError("linked is not a list of files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as e:
        raise InputError(f"is not a record of a repair ({e})", where=RECORD) from e
    return dict(doc)


def repaired_tensors(source: Source) -> frozenset[str]:
    """The tensors that an earlier repair changed, by its record, which is not verified; empty without a record."""
    if not 0 < source.files.get(RECORD, 0) <= MAX_JSON:
        return frozenset()
    try:
        edits = json.loads(read_file(source, RECORD))["edits"]
        return frozenset(e["name"] for e in edits if e["action"] not in (Action.DROP, Action.CONFIG))
    except (ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


def plan_digest(plan: Plan) -> str:
    """Names a plan and the files it reads: two runs with the same digest write the same bytes."""
    source = plan.checkpoint.source
    digest = hashlib.sha256(repr((source.name, source.fingerprint)).encode("utf-8", "backslashreplace"))
    digest.update(build_record(plan, {}))
    for shard in plan.shards:
        digest.update(repr((shard.name, shard.copied, shard.size, shard.header)).encode())
    for name, text in plan.texts.items():
        digest.update(repr((name, text)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
