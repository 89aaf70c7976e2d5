"""Tiny real checkpoints for the tests: made once for a run, copied for whoever changes one."""

from __future__ import annotations

import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import hypothesis
import pytest
import tiny_gemma4

import bnbfix
from tests.support.build import Make
from tests.support.command_line import run  # noqa: F401  # a fixture
from tests.support.hub import Hub
from tests.support.hub_server import FakeHub

for module in pkgutil.walk_packages(bnbfix.__path__, "bnbfix."):  # first imported in a test, one keeps what it patched
    if not module.name.endswith("__main__"):
        import_module(module.name)

# In the background of a shell SIGINT is ignored, and so it would be by every command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A slow or busy machine is not a failure.
hypothesis.settings.register_profile("any", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any")


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


@pytest.fixture(scope="session")
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    (root / "uploads").mkdir()
    server = FakeHub(root / "uploads")
    hub = Hub(server, root / "home", None)  # type: ignore[arg-type]  # it is made with its own environment
    command = [sys.executable, str(Path(__file__).parent / "support" / "hub_runner.py")]
    pipes: dict[str, IO[Any] | int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    client = subprocess.Popen(command, text=True, env=hub.environment | {"PYTHONPATH": path}, **pipes)  # type: ignore
    yield Hub(server, root / "home", client)
    client.terminate()
    client.wait(10)
    server.stop()


@pytest.fixture
def hub(_hub: Hub) -> Hub:
    """A well-behaved Hub that has seen nothing. Repos of other tests may still be there."""
    _hub.server.reset()
    return _hub
