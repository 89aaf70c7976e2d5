"""The Hub's own SHA-256: bytes of the right number that are not those it lists are noticed, wherever they come from."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make
from tests.support.hub import Hub

TARGET = ("--vllm", "0.22.1", "--device", "cpu")
NUMBERS = count()


@pytest.fixture
def source(checkpoint: Make) -> Path:
    return checkpoint("dense31b", "skip", shards=4)


@pytest.fixture
def repo(hub: Hub, source: Path) -> str:
    name = f"org/hashed-{next(NUMBERS)}"
    hub.server.add(name, source)
    return name


def flip(path: Path) -> None:
    """Spoils bytes in the middle of a file, behind its header."""
    with path.open("r+b") as f:
        f.seek(path.stat().st_size - 3000)
        spoilt = bytes(b ^ 0x10 for b in f.read(1500))
        f.seek(-1500, os.SEEK_CUR)
        f.write(spoilt)


def shards_of(source: Path) -> dict[bool, str]:
    """A shard that the repair copies (True), and one that it rewrites (False)."""
    return {s.copied: s.name for s in bnbfix.plan_repair(source, "0.22.1").shards}


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "rewritten"])
@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_what_was_damaged_on_the_way_is_not_published(
    hub: Hub, source: Path, repo: str, tmp_path: Path, copied: bool, stream: list[str]
) -> None:
    shard = shards_of(source)[copied]
    flip(source / shard)  # what is sent from now on; the listing has the hashes of before
    done = hub.run("repair", repo, "--out", tmp_path / "out", *TARGET, *stream)
    assert (done.code, done.out) == (2, ""), done.err
    error, hint, _ = done.err.splitlines()
    assert error.startswith(f"error: {shard}: has SHA-256 ") and "where the Hub lists " in error
    assert hint == "  Run it again." if stream else hint.startswith(f"  Delete {hub.home}")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("hf_xet") is None, reason="hf_xet is not installed")
@pytest.mark.parametrize("damaged", [None, True, False], ids=["whole", "copied", "rewritten"])
def test_what_comes_through_xet_is_compared_too(hub: Hub, source: Path, tmp_path: Path, damaged: bool | None) -> None:
    repo = f"org/xet-{next(NUMBERS)}"
    hub.server.add(repo, source, xet=True)
    bnbfix.repair(source, tmp_path / "right", "0.22.1", device="cpu")
    shard = "" if damaged is None else shards_of(source)[damaged]
    if shard:
        flip(source / shard)  # hf_xet does not compare it with the Hub's SHA-256
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "0"}  # hf_xet has a cache of its own there
    done = hub.process("repair", repo, "--out", tmp_path / "out", *TARGET, **home)
    assert any(s.path.startswith("/xorbs/") for s in hub.server.seen)
    if not shard:
        assert (done.code, done.err) == (0, "") and same_weights(tmp_path / "out", tmp_path / "right")
        return
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith(f"error: {shard}: has SHA-256 ") and "where the Hub lists " in done.err
    assert not (tmp_path / "out").exists()


def same_weights(one: Path, other: Path) -> bool:
    """Have two folders the same shards?"""
    shards = [{p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in (one, other)]
    return bool(shards[0]) and shards[0] == shards[1]


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "rewritten"])
def test_what_was_damaged_in_the_cache_is_not_published(
    hub: Hub, source: Path, repo: str, tmp_path: Path, copied: bool, offline: bool
) -> None:
    assert hub.run("repair", repo, "--out", tmp_path / "first", *TARGET).code == 0
    shard = shards_of(source)[copied]
    (cached,) = (hub.home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots").glob(f"*/{shard}")
    flip(cached.resolve())
    pinned = f"{repo}@{cached.parent.name}"  # offline, a download by commit is found by commit only
    command = ["repair", pinned, "--out", tmp_path / "out", *TARGET]
    done = hub.process(*command, HF_HUB_OFFLINE="1") if offline else hub.run(*command)
    assert (done.code, done.out) == (2, ""), done.err
    assert str(cached.resolve()) in done.err and not (tmp_path / "out").exists()
    cached.resolve().unlink()
    if not offline:
        assert hub.run(*command).code == 0


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "rewritten"])
def test_verify_knows_the_hubs_hashes(hub: Hub, source: Path, repo: str, tmp_path: Path, copied: bool) -> None:
    shard = shards_of(source)[copied]
    whole = (source / shard).read_bytes()
    flip(source / shard)
    assert bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu").written
    done = hub.run("verify", tmp_path / "out", "--source", repo)  # the same bytes are downloaded
    if copied:
        listed = next(iter(hub.server.repos[repo].commits.values()))[shard].oid
        assert done.code == 1 and f"{shard}: has another SHA-256 than the Hub lists, {listed}" in " ".join(
            done.out.split()
        ), done.out
    else:
        assert done.code == 2 and f"{shard}: has SHA-256 " in done.err
    (source / shard).write_bytes(whole)
