"""Tiny real checkpoints for the tests: made once for a run, copied for whoever changes one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import tiny_gemma4

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No BNBFIX_* of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("BNBFIX_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`pristine("dense31b", "skip", shards=2)`: a checkpoint shared by all tests; nobody may change it."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str = "dense31b", quant: str = "skip", **options: Any) -> Path:
        key = (family, quant, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("pristine") / f"{family}-{quant}"
            made[key] = tiny_gemma4.make(folder, family, quant, **options)
        return made[key]

    return make


@pytest.fixture
def checkpoint(pristine: Make, tmp_path: Path) -> Make:
    """The same, as a copy of the test's own that it may change."""

    def make(family: str = "dense31b", quant: str = "skip", **options: Any) -> Path:
        source = pristine(family, quant, **options)
        return Path(shutil.copytree(source, tmp_path / f"source-{source.name}"))

    return make
