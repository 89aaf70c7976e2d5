"""bnbfix.json, which an output carries: what was changed, for which target, and a hash of every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..__version__ import __version__
from ..planner.plan import Plan


def record(plan: Plan, files: Mapping[str, str], linked: Sequence[str] = ()) -> bytes:
    """The bytes of bnbfix.json. `files` has the SHA-256 of each file; those in `linked` are hard links without one.

    A repo's repair differs from a folder's in the key "source" alone: {"repo", "revision"}.
    """
    origin = plan.checkpoint.source.origin
    doc: dict[str, Any] = {
        "schema": 1,
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
    # A file name that is no UTF-8 holds halves of surrogate pairs: written as JSON's own escapes.
    return (json.dumps(doc, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def plan_digest(plan: Plan) -> str:
    """Names a plan and the files it reads: two runs with the same one write the same bytes."""
    source = plan.checkpoint.source
    digest = hashlib.sha256(repr((source.name, source.fingerprint)).encode("utf-8", "backslashreplace"))
    digest.update(record(plan, {}))
    for shard in plan.shards:
        digest.update(repr((shard.name, shard.copied, shard.size, shard.header)).encode())
    for name, text in plan.texts.items():
        digest.update(repr((name, text)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
