"""A scan as SARIF 2.1.0, which GitHub's code scanning and others show.

A result for each finding: a location for each file that holds its tensors, and a logical location for each tensor.
Files are relative to the working directory if the model is below it, as code scanning wants them; otherwise
relative to the model, under a uriBaseId of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..__version__ import __version__
from ..engines.targets import label_ranges
from ..rules.rule import Code, Severity
from ..rules.scan import Finding
from .outcome import ScanOutcome
from .text import collapse, count, escape_control_chars, fix_text

SCHEMA_URI = "https://json.schemastore.org/sarif-2.1.0.json"
SARIF_LEVELS = {Severity.FAILS: "error", Severity.WRONG: "error", Severity.DEGRADED: "warning", Severity.NOTE: "note"}


def render(outcomes: Iterable[ScanOutcome]) -> Iterator[str]:
    """One run over all models; a model that could not be scanned is a notification of its invocation."""
    yield json.dumps(document(list(outcomes), Path.cwd()), indent=2) + "\n"


def document(outcomes: list[ScanOutcome], here: Path) -> dict[str, Any]:
    """The log. `here` is the folder that relative paths start from."""
    findings = [(o, f) for o in outcomes if o.result for f in o.result.findings]
    rules = sorted({f.code for _, f in findings}, key=lambda c: c.value)
    # The level of a rule is the worst in this log: code scanning shows it in places instead of a result's own.
    worst = {code: max(f.severity for _, f in findings if f.code is code) for code in rules}
    bases: dict[str, dict[str, Any]] = {}
    prints: Counter[str] = Counter()
    results = [_result(o, f, rules.index(f.code), _base(o.model, here, bases), prints) for o, f in findings]
    errors = [o for o in outcomes if o.error is not None]
    driver = {
        "name": "bnbfix",
        "version": __version__,
        "semanticVersion": __version__,
        "shortDescription": {"text": "Scans bitsandbytes checkpoints for what vLLM cannot load."},
        "rules": [_rule(code, worst[code]) for code in rules],
    }
    invocation: dict[str, Any] = {"executionSuccessful": all(o.error.exit_code == 3 for o in errors if o.error)}
    if errors:
        invocation["toolExecutionNotifications"] = [_notification(o) for o in errors]
    run: dict[str, Any] = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    if bases:
        run["originalUriBaseIds"] = bases
    run["columnKind"] = "unicodeCodePoints"
    return {"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}


def _rule(code: Code, worst: Severity) -> dict[str, Any]:
    e = code.explanation
    links = "\n".join(f"- {url}" for url in e.upstream)
    rule: dict[str, Any] = {
        "id": code.value,
        "name": "".join(word.capitalize() for word in code.name.split("_")),
        "shortDescription": {"text": e.title},
        "fullDescription": {"text": e.why},
        "help": {
            "text": f"{e.why}\n\nFix: {e.fix}" + (f"\n\nUpstream:\n{links}" if links else ""),
            "markdown": f"{e.why}\n\n**Fix**: {e.fix}" + (f"\n\n**Upstream**\n\n{links}" if links else ""),
        },
        "defaultConfiguration": {"level": SARIF_LEVELS[worst]},
        "properties": {"tags": ["vllm", "bitsandbytes"]},
    }
    if e.upstream:
        rule["helpUri"] = e.upstream[0]
    return rule


def _result(
    o: ScanOutcome, f: Finding, index: int, base: tuple[str, str | None], prints: Counter[str]
) -> dict[str, Any]:
    patterns = collapse(f.tensors)
    text = f"{label_ranges(f.releases)} {f.severity}: {escape_control_chars(f.message)}."
    if patterns:
        text += f" {count(len(f.tensors), 'name')}: {', '.join(patterns)}."
    files: dict[str, list[str]] = {}
    for name in f.tensors:
        files.setdefault(o.files[name], []).append(name)
    locations = [_location(file, names, base) for file, names in files.items()] or [_location(o.file(f), [], base)]
    key = fingerprint(f, f"{base[0] or Path(o.model).name + '/'}{o.file(f)}")
    prints[key] += 1
    return {
        "ruleId": f.code.value,
        "ruleIndex": index,
        "level": SARIF_LEVELS[f.severity],
        "message": {"text": f"{text} {fix_text(f)}"},
        "locations": locations,
        # Code scanning reads the first name; the second is ours.
        "partialFingerprints": {"primaryLocationLineHash": f"{key}:{prints[key]}", "bnbfix/v1": f"{key}:{prints[key]}"},
        "properties": {
            "severity": f.severity,
            "releases": [{"first": r.first, "last": r.last} for r in f.releases],
            "model": escape_control_chars(o.model),
        },
    }


def fingerprint(f: Finding, file: str) -> str:
    """Identifies a finding across scans; it does not depend on the number of layers, shards or releases."""
    patterns = sorted({re.sub(r"\d+", "N", name) for name in f.tensors})
    file = re.sub(r"\d+", "N", file)
    whole = "\0".join((file, f.code.value, f.severity.name, re.sub(r"\d+", "N", f.message), *patterns))
    return sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _location(file: str, names: list[str], base: tuple[str, str | None]) -> dict[str, Any]:
    prefix, base_id = base
    artifact = {"uri": prefix + quote(file)} | ({"uriBaseId": base_id} if base_id else {})
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": 1}}}
    if names:
        location["logicalLocations"] = [
            {"fullyQualifiedName": escape_control_chars(n), "kind": "resource"} for n in names
        ]
    return location


def _base(model: str, here: Path, bases: dict[str, dict[str, Any]]) -> tuple[str, str | None]:
    """The start of a file's URI, and the base that it is relative to, which is added to `bases`."""
    folder = Path(model).resolve() if Path(model).is_dir() else None
    if folder is not None and folder.is_relative_to(here.resolve()):
        inside = folder.relative_to(here.resolve()).as_posix()
        return ("" if inside == "." else quote(inside) + "/"), None
    uri = folder.as_uri() + "/" if folder is not None else None
    base = ({"uri": uri} if uri else {}) | {"description": {"text": escape_control_chars(model)}}
    name = next((name for name, known in bases.items() if known == base), f"MODEL{len(bases) or ''}")
    bases[name] = base
    return "", name


def _notification(o: ScanOutcome) -> dict[str, Any]:
    assert o.error is not None
    hint = f" {o.error.hint}" if o.error.hint else ""
    level = "note" if o.error.exit_code == 3 else "error"
    return {"level": level, "message": {"text": escape_control_chars(f"{o.model}: {o.error}{hint}")}}
