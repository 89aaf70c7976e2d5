"""`bnbfix verify --load`. No test has a vLLM: what its process would answer is put in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bnbfix
from tests.cli.conftest import VERSIONS, Answer
from tests.support.build import Make
from tests.support.command_line import Cli, harmless

UNBOUND = [{"name": "x.7.weight\x1b[31m", "quantized": True, "states": 0}]


REQUANTIZED = [{"name": "model.layers.1.self_attn.qkv_proj.weight", "quantized": True, "states": 3}]


def loaded(**changes: Any) -> dict[str, Any]:
    """What the engine answers of two parameters, one of them quantized."""
    found = [
        {"name": "a.weight", "quantized": True, "states": 1},
        {"name": "b.weight", "quantized": False, "states": 0},
    ]
    return {"parameters": found, "finite": True, "forward": True} | changes


@pytest.mark.parametrize(
    ("given", "ok", "words"),
    [
        (loaded(), True, "loads it: 2 parameters, 1 of them quantized; the forward pass ran."),
        (loaded(parameters=UNBOUND), False, r"have no quant state: x.7.weight\x1b[31m vLLM 0.32.0"),
        (
            loaded(parameters=REQUANTIZED),
            False,
            "were quantized while loading: model.layers.1.self_attn.qkv_proj.weight",
        ),
        (loaded(finite=False), False, "cannot run it: the forward pass gave no finite numbers"),
        ({"error": "KeyError: '\x1b[31m'"}, False, r"cannot run it: KeyError: '\x1b[31m'"),
    ],
    ids=["ok", "unbound", "requantized", "not finite", "error"],
)
def test_load_reports_what_the_engine_did(
    run: Cli, pristine: Make, tmp_path: Path, answer: Answer, given: dict[str, Any], ok: bool, words: str
) -> None:
    bnbfix.repair(pristine("text", "partial", shards=2), tmp_path / "out", "0.32.0", device="cpu")
    answer(given)
    done = run("verify", tmp_path / "out", "--load")
    assert (done.code, done.err) == (0 if ok else 1, "")
    assert "vLLM 0.32.0, transformers 5.14.1" in done.words and words in done.words
    assert "scan for vLLM 0.32.0: clean." in done.words
    assert harmless(done.out) and done.width <= 80
    done = run("verify", tmp_path / "out", "--load", "--format", "json")
    assert (done.code, done.err, done.json["load"]["ok"]) == (0 if ok else 1, "", ok)
    assert done.json["ok"] is True and done.json["load"]["versions"] == VERSIONS


@pytest.mark.parametrize(
    ("meminfo", "ok"),
    [("MemTotal: 1 kB\nMemAvailable: 1 kB\n", False), ("MemTotal: 1 kB\n", True), (None, True)],
    ids=["too little", "no such line", "no such file"],
)
def test_memory_that_is_not_known_refuses_nothing(
    run: Cli,
    pristine: Make,
    tmp_path: Path,
    answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
    meminfo: str | None,
    ok: bool,
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("a GPU is there, whose memory counts instead")
    bnbfix.repair(pristine("text", "single", shards=2), tmp_path / "out", "0.22.1", device="cpu")
    answer(loaded())
    read_text = Path.read_text

    def read(self: Path, *args: Any, **options: Any) -> str:
        if str(self) != "/proc/meminfo":
            return read_text(self, *args, **options)
        if meminfo is None:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return meminfo

    monkeypatch.setattr(Path, "read_text", read)
    done = run("verify", tmp_path / "out", "--load")
    assert done.code == (0 if ok else 2)
    assert ok or done.err.startswith("error: the machine is too small to load it: 0.0 GB of weights, 0.0 GB")


def test_an_unquantized_output_may_have_nothing_quantized_in_the_engine(
    run: Cli, pristine: Make, tmp_path: Path, answer: Answer
) -> None:
    bnbfix.repair(pristine("text", "single", shards=2), tmp_path / "out", "0.32.0", device="cpu", bf16=True)
    answer(loaded())
    done = run("verify", tmp_path / "out", "--load")
    assert done.code == 1 and "were quantized while loading: a.weight" in done.words
    answer(loaded(parameters=[{"name": "a.weight", "quantized": False, "states": 0}]))
    assert run("verify", tmp_path / "out", "--load").code == 0
