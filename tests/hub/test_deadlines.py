"""Servers that answer too slowly, too much or in circles: each wait has an end, which the environment sets."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from bnbfix.errors import UsageError
from bnbfix.hub import limits
from tests.support.build import Make
from tests.support.hub import Hub

NUMBERS = count()
TARGET = ("--vllm", "0.22.1", "--device", "cpu")


@pytest.fixture
def repo(hub: Hub, pristine: Make) -> str:
    name = f"org/slow-{next(NUMBERS)}"
    hub.server.add(name, pristine("dense31b", "skip", shards=2))
    return name


def test_ranges_that_trickle_end(hub: Hub, repo: str) -> None:
    hub.server.fault("trickles ranges")
    done = hub.process("scan", repo, BNBFIX_HUB_ANSWER_TIMEOUT="0.5")
    assert done.code == 2 and "the Hub's answer takes longer than 0.5 s" in done.err
    assert "BNBFIX_HUB_ANSWER_TIMEOUT sets this limit" in done.err


STOPPED_WHILE_READING = """
import gc, time
from bnbfix.hub.parallel import run_parallel
from bnbfix.hub.source import HubSource

source = HubSource.open("{repo}")

def work(job):
    if job == "fail":
        time.sleep(0.7)
        raise MemoryError
    source.read("model-00001-of-00002.safetensors", [(0, 2_000)])

try:
    run_parallel(work, ["read", "fail"], 2, name="test")
except MemoryError:
    gc.collect()
    print("stopped")
"""


def test_an_answer_that_an_error_elsewhere_stops_is_closed_silently(hub: Hub, repo: str) -> None:
    hub.server.fault("trickles ranges")
    done = hub.run(script=STOPPED_WHILE_READING.format(repo=repo))
    assert (done.out, done.err) == ("stopped\n", "")


def test_a_listing_that_trickles_ends(hub: Hub, repo: str) -> None:
    hub.server.fault("trickles", "/api/models/", origin="hub")
    done = hub.process("scan", repo, BNBFIX_HUB_ANSWER_TIMEOUT="1")
    assert done.code == 2 and done.err.startswith("error: the Hub's answer takes longer than 1 s\n")


def test_a_listing_without_end_ends(hub: Hub, repo: str) -> None:
    hub.server.fault("never ends", "/api/models/", origin="hub")
    done = hub.process("scan", repo)
    assert done.code == 2 and done.err.startswith("error: the Hub's answer has more than 200,000,000 bytes\n")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_a_download_without_progress_ends(hub: Hub, repo: str, tmp_path: Path, stream: list[str]) -> None:
    hub.server.fault("trickles", "model-00002")
    command = ["repair", repo, "--out", tmp_path / "out", *TARGET, *stream]
    done = hub.process(*command, BNBFIX_HUB_DOWNLOAD_TIMEOUT="2")
    assert done.code == 2 and f"{repo}: the download makes no progress for 2 s" in done.err, done.err
    assert "BNBFIX_HUB_DOWNLOAD_TIMEOUT sets this limit" in done.err
    cache = hub.home / "hub" / f"models--{repo.replace('/', '--')}"
    assert list(tmp_path.iterdir()) == [] and list(cache.rglob("*.incomplete")) == []


@pytest.mark.parametrize("what", ["scan", "repair"])
def test_a_redirect_loop_ends(hub: Hub, repo: str, tmp_path: Path, what: str) -> None:
    if what == "scan":
        hub.server.fault("loops", "model-0000", origin="hub")
        done = hub.process("scan", repo)
    else:  # a scan must pass: its requests are ranges
        hub.server.fault("loops whole", "model-00002", origin="hub")
        done = hub.process("repair", repo, "--out", tmp_path / "out", *TARGET)
    assert done.code == 2 and "redirects more than" in done.err, done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", "1e999"])
def test_a_limit_is_a_positive_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BNBFIX_HUB_TIMEOUT", text)
    with pytest.raises(UsageError, match=r"BNBFIX_HUB_TIMEOUT is .* not a positive number of seconds"):
        limits.byte_limit()


def test_a_limit_that_is_not_set_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNBFIX_HUB_TIMEOUT", "")
    assert limits.byte_limit() == 15
    monkeypatch.setenv("BNBFIX_HUB_TIMEOUT", "2.5")
    assert limits.byte_limit() == 2.5
