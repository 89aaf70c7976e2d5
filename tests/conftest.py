"""Tiny real checkpoints for the tests: made once for a run, copied for whoever changes one."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import tiny_gemma4
from hub_server import FakeHub

import bnbfix

for module in pkgutil.iter_modules(bnbfix.__path__):  # one that is first imported in a test keeps what the test patched
    import_module(f"bnbfix.{module.name}")

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


@dataclass(frozen=True)
class Ran:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Hub:
    """The tests' Hub, and the command line that talks to it."""

    server: FakeHub
    home: Path
    _client: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to it: nothing else of huggingface_hub's is set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and k != "COLUMNS"}
        ours = {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return kept | ours

    def run(self, *arguments: object, token: str | None = None, script: str | None = None) -> Ran:
        """Runs `bnbfix`, or a script, in a process that is there already, with a cache that all tests share."""
        job = {"argv": [str(a) for a in arguments], "env": {"HF_TOKEN": token}, "script": script}
        stdin, stdout = self._client.stdin, self._client.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        return Ran(**json.loads(stdout.readline()))

    def process(self, *arguments: object, **env: str) -> Ran:
        """Runs `bnbfix` in a process of its own."""
        command = [sys.executable, "-m", "bnbfix", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment | env, capture_output=True, text=True, timeout=120)
        return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    (root / "uploads").mkdir()
    server = FakeHub(root / "uploads")
    hub = Hub(server, root / "home", None)  # type: ignore[arg-type]  # it is made with its own environment
    command = [sys.executable, str(Path(__file__).parent / "hub_runner.py")]
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
