"""The vLLM that the tests of `verify --load` and `releases --probe` talk to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bnbfix.engines.vllm import probe
from tests.support.command_line import install_vllm

VERSIONS = {"vllm": "0.32.0", "transformers": "5.14.1", "torch": "2.13.0", "vllm-bnb-plugin": None}
Answer = Callable[[dict[str, Any]], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Puts an answer in the place of the process that runs vLLM 0.32.0."""

    def put(given: dict[str, Any]) -> None:
        install_vllm(monkeypatch, "0.32.0")
        monkeypatch.setattr(probe, "run_worker", lambda *_, **__: [{"versions": VERSIONS, "error": None} | given])

    return put
