"""The JSON Schemas that `bnbfix schema` prints: valid, met by every document, and with every key of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import bnbfix
from bnbfix.engines.vllm.live import DryLoad
from bnbfix.engines.vllm.probe import LoadResult
from bnbfix.report.json import load_document
from tests.support.build import Make
from tests.support.command_line import Cli

LOADED = LoadResult({"vllm": "0.32.0"}, None, 2, 1, (), ("x",), True)
DRY_LOAD = DryLoad("0.32.0", {"vllm": "0.32.0", "plugin": None}, "KeyError", ("x",), (), 1, (), ())


@pytest.fixture
def schema(run: Cli) -> Any:
    def read(document: str) -> dict[str, Any]:
        found: dict[str, Any] = run("schema", document).json
        Draft202012Validator.check_schema(found)
        return found

    return read


def unknown_keys(document: Any, schema: Any, root: Any) -> Iterator[str]:
    """Keys that the schema does not describe."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            found = [list(unknown_keys(document, option, root)) for option in schema[choice]]
            yield from min(found, key=len)
            return
    if isinstance(document, list):
        yield from (key for item in document for key in unknown_keys(item, schema.get("items", {}), root))
    elif isinstance(document, dict) and "additionalProperties" not in schema:
        known = schema.get("properties", {})
        yield from set(document) - set(known)
        yield from (key for k in set(document) & set(known) for key in unknown_keys(document[k], known[k], root))


def check(document: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema).validate(document)
    assert list(unknown_keys(document, schema, schema)) == []


def test_scans_meet_their_schema(run: Cli, schema: Any, pristine: Make, tmp_path: Path) -> None:
    scan, found = schema("scan"), schema("scan")["$defs"]
    models = (pristine("dense31b", "partial", shards=2), pristine("e4b", "all"), tmp_path, pristine("moe26b", "all"))
    check(run("scan", *models, "--vllm", "portable", "--json").json, scan)
    for line in run("scan", *models, "--vllm", "0.40.0", "--format", "jsonl").out.splitlines():
        check(json.loads(line), scan)
    check(run("scan", models[0], "--json").json, scan)
    check(run("scan", models[0], "--json").json | {"dry_load": DRY_LOAD.to_dict()}, found["scan"] | {"$defs": found})
    assert not Draft202012Validator(scan).is_valid({"schema": 1, "model": "x"})


def test_repairs_meet_their_schema(run: Cli, schema: Any, pristine: Make, tmp_path: Path) -> None:
    repair = schema("repair")
    for source in (pristine("dense31b", "partial", shards=2), pristine("moe26b", "skip")):
        check(run("repair", source, "--vllm", "0.32.0", "--dry-run", "--json").json, repair)
    done = run("repair", pristine("dense31b", "skip"), "--vllm", "0.32.0", "--out", tmp_path / "out", "--json").json
    check(done, repair)
    check(done | {"pushed": {"repo": "a/b", "url": "u", "commit": "c"}}, repair)
    check(run("repair", tmp_path / "out", "--vllm", "0.32.0", "--dry-run", "--json").json, repair)


def test_verifications_meet_their_schema(run: Cli, schema: Any, pristine: Make, tmp_path: Path) -> None:
    verify = schema("verify")
    bnbfix.repair(pristine("dense31b", "skip"), tmp_path / "out", "0.32.0")
    check(run("verify", tmp_path / "out", "--json").json, verify)
    (tmp_path / "out" / "config.json").write_text("{}")
    document = run("verify", tmp_path / "out", "--json").json
    assert document["problems"]
    check(document | {"load": load_document(LOADED)}, verify)
