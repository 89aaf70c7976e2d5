"""The tests' Hub, and the command line that talks to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.hub_server import FakeHub


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
