"""Scans of repos on the Hub: what they read, what they find, and by which names and revisions."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.checkpoint.checkpoint import HEADER_GUESS
from bnbfix.errors import UsageError
from bnbfix.hub.byte_ranges import GAP, content_range_error, merge_ranges
from bnbfix.hub.resolve import open_source, parse_repo
from tests.support.build import Make
from tests.support.hub import Hub
from tests.support.hub_server import TOKEN
from tests.support.surgery import read_file, write_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import make_31b


def found(folder: Path, target: str = "portable") -> dict[str, Any]:
    """The document of a local scan, without the model's name and commit."""
    doc = json.loads(json.dumps(bnbfix.scan(folder, target).to_dict()))
    del doc["model"], doc["commit"]
    return doc


def scanned(hub: Hub, *arguments: str, token: str | None = None) -> dict[str, Any]:
    """The same of a scan of a repo."""
    done = hub.run("scan", *arguments, "--vllm", "portable", "--format", "json", token=token)
    assert done.err == ""
    doc = done.json
    assert re.fullmatch("[0-9a-f]{40}", doc.pop("commit"))
    del doc["model"]
    return doc


@pytest.fixture
def tiny(hub: Hub, pristine: Make) -> str:
    """A repo with a small checkpoint in two shards."""
    hub.server.add("org/tiny", pristine("dense31b", "partial", shards=2))
    return "org/tiny"


# What it finds


@pytest.mark.parametrize(
    ("family", "quant", "shards"), [("dense31b", "partial", 3), ("e4b", "all", 1), ("moe26b", "all", 2)]
)
def test_a_scan_of_a_repo_finds_what_a_scan_of_its_folder_finds(
    hub: Hub, pristine: Make, family: str, quant: str, shards: int
) -> None:
    source = pristine(family, quant, shards=shards)
    hub.server.add(f"org/{family}", source)
    assert scanned(hub, f"org/{family}") == found(source)


def test_a_damaged_quant_state_is_found_on_the_hub_too(hub: Hub, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "all")
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"blocksize": 64', b'"blocksize": 65', 1))
    hub.server.add("org/damaged", source)
    done = hub.run("scan", "org/damaged", "--format", "json")
    assert done.code == 2 and "blocksize 65" in done.err
    assert "BNB201" in {f["code"] for f in done.json["findings"]}


def test_a_repo_that_is_not_a_checkpoint_ends_as_a_folder_does(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    hub.server.add("org/adapter", tmp_path)
    done = hub.run("scan", "org/adapter")
    assert (done.code, done.err) == (
        3,
        "error: org/adapter: is a PEFT adapter, not a model; merge it first\n  bnbfix scan --help\n",
    )


# What it reads


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31B at its real size, sparse."""
    return make_31b.make(tmp_path_factory.mktemp("31b"))


def test_a_scan_of_31b_reads_far_below_one_percent(hub: Hub, big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(p.stat().st_size for p in big.iterdir())
    hub.server.add("org/31b", big)
    begun = time.perf_counter()
    remote = scanned(hub, "org/31b")
    seconds, requests, sent = time.perf_counter() - begun, len(hub.server.seen), hub.server.sent
    assert size > 19e9
    assert remote == found(big)
    assert {f["code"] for f in remote["findings"]} >= {"BNB102", "BNB104"}
    assert sent < size / 1000
    assert requests < 450
    with capsys.disabled():
        print(f"\n31B: {sent:,} of {size:,} bytes ({sent / size:.4%}), {requests} requests, {seconds:.2f} s")


def test_a_plan_for_31b_reads_nothing_twice(hub: Hub, big: Path) -> None:
    hub.server.add("org/31b", big)
    done = hub.run("repair", "org/31b", "--dry-run", "--vllm", "portable", "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert len(hub.server.seen) < 450
    asked = [(s.path, s.range) for s in hub.server.seen if s.origin == "cdn"]
    assert len(asked) == len(set(asked))


def test_every_read_is_pinned_to_one_commit(hub: Hub, tiny: str, pristine: Make) -> None:
    sha = hub.server.repos[tiny].refs["main"]
    scanned(hub, tiny)
    assert {s.method for s in hub.server.seen} == {"GET"}
    info, *files = hub.server.seen
    assert info.path == f"/api/models/{tiny}"
    assert files and all(f"/{sha}/" in s.path and s.range for s in files)


@pytest.mark.parametrize("around", [100_000, HEADER_GUESS - 8], ids=["100,000", "the first range"])
def test_headers_of_every_length_around_a_limit(hub: Hub, checkpoint: Make, around: int) -> None:
    source = checkpoint("text", "all")
    header, data = read_file(source / "model.safetensors")
    want = found(source)
    text = json.dumps(header, separators=(",", ":"))
    for length in range(around - 10, around + 11):
        write_file(source / "model.safetensors", text.ljust(length), data)
        assert int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little") == length
        hub.server.add("org/header", source)
        assert scanned(hub, "org/header") == want


# By which name


def test_revisions_and_spellings(hub: Hub, pristine: Make) -> None:
    first, second = pristine("e4b", "all"), pristine("dense31b", "skip")
    sha = hub.server.add("org/two", first)
    hub.server.add("org/two", second)
    hub.server.add("org/two", first, ref="refs/pr/1")
    page = f"{hub.server.url}/org/two"
    for given in (["org/two"], ["hf://org/two"], ["hf://models/org/two"], [page], [page + "/tree/main"], [page + "/"]):
        assert scanned(hub, *given) == found(second), given
    for given in (
        ["org/two@" + sha],
        ["org/two", "--revision", sha[:8]],
        ["org/two@refs/pr/1"],
        ["hf://org/two@" + sha],
        [page + "/tree/refs%2Fpr%2F1"],
        [f"{page}/commit/{sha}"],
    ):
        assert scanned(hub, *given) == found(first), given


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("org/name", ("org/name", None)),
        ("Org-1/na.me_2@v1.0", ("Org-1/na.me_2", "v1.0")),
        ("https://huggingface.co/org/name/tree/main", ("org/name", "main")),
        ("https://hf.co/org/name", ("org/name", None)),
        ("hf://org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("../name", None),
        ("org/name/", None),
        ("a/b/c", None),
        ("org/na me", None),
        ("org/na--me", None),
        ("org/..", None),
        ("-org/name", None),
        ("org\\name", None),
        ("", None),
        ("https://example.com/org/name", None),
        ("https://huggingface.co/org", None),
        ("https://huggingface.co/org/name/blob/main/x", None),
        ("hf://datasets/org/name", None),
        ("~/models/name", None),
        ("https://[org/name", None),
        ("https://huggingface.co]/org/name", None),
    ],
)
def test_what_is_a_repo(text: str, repo: tuple[str, str | None] | None) -> None:
    assert parse_repo(text) == repo


def test_an_endpoint_that_is_not_an_address_is_reported(hub: Hub) -> None:
    for model in ("org/name", "https://huggingface.co/org/name"):
        done = hub.process("scan", model, HF_ENDPOINT="http://[")
        assert (done.code, done.err) == (2, "error: HF_ENDPOINT is not a valid URL\n  bnbfix scan --help\n"), model


def test_a_folder_wins_over_a_repo_of_its_name(
    pristine: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: Hub
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(pristine("e4b", "all"))
    monkeypatch.chdir(tmp_path)
    assert bnbfix.scan("org/tiny", "0.32.0").ok
    with pytest.raises(UsageError, match="is a folder, which has no revision 'main'"):
        bnbfix.scan("org/tiny", revision="main")
    assert hub.server.seen == []


def test_a_path_is_never_a_repo() -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_source(Path("org/name"))


def test_contradicting_revisions() -> None:
    with pytest.raises(UsageError, match="names revision 'a', not 'b'"):
        open_source("org/name@a", "b")


# Subfolders


def test_a_scan_ignores_files_in_subfolders_as_it_does_in_a_folder(hub: Hub, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    (source / "optimizer.pt").write_bytes(b"pickle")
    hub.server.add("org/pickles", source)
    remote = scanned(hub, "org/pickles")
    assert remote == found(source)
    assert [f["tensors"] for f in remote["findings"] if f["code"] == "BNB205"] == [["optimizer.pt"]]


# Tokens


@pytest.mark.parametrize("access", ["private", "gated"])
def test_the_token_opens_a_repo_and_stays_with_the_hub(hub: Hub, pristine: Make, access: str) -> None:
    source = pristine("dense31b", "partial", shards=2)
    hub.server.add(f"org/{access}", source, access=access)
    assert scanned(hub, f"org/{access}", token=TOKEN) == found(source)
    assert {s.authorization for s in hub.server.seen if s.origin == "hub"} == {f"Bearer {TOKEN}"}
    assert {s.authorization for s in hub.server.seen if s.origin == "cdn"} == {None}


def test_signed_addresses_that_run_out_are_asked_for_again(hub: Hub, tiny: str, pristine: Make) -> None:
    hub.server.fault(403, "model-00001", after=1, times=1)
    assert scanned(hub, tiny) == found(pristine("dense31b", "partial", shards=2))


# The cache


DOWNLOAD = "import sys, huggingface_hub as h; [h.hf_hub_download(sys.argv[1], f) for f in sys.argv[2:]]"


def test_files_in_the_local_cache_are_not_asked_for(hub: Hub, pristine: Make) -> None:
    cached = "org/cached"
    hub.server.add(cached, pristine("dense31b", "partial", shards=2))
    files = sorted(p.name for p in pristine("dense31b", "partial", shards=2).iterdir())
    shards = [f for f in files if f.endswith(".safetensors")]
    assert hub.run(cached, *shards, script=DOWNLOAD).code == 0
    hub.server.reset()
    scan = ("scan", cached, "--vllm", "portable", "--format", "json")
    partly = hub.run(*scan)
    assert not any(".safetensors" in s.path and "index" not in s.path for s in hub.server.seen)
    assert hub.run(cached, *files, script=DOWNLOAD).code == 0
    hub.server.reset()
    offline = hub.process(*scan, HF_HUB_OFFLINE="1")
    assert hub.server.seen == []
    assert (offline.err, offline.json) == (partly.err, partly.json)
    # A new commit: what the cache has is not of it.
    hub.server.add(cached, pristine("e4b", "all"))
    assert scanned(hub, cached) == found(pristine("e4b", "all"))


def test_offline_without_a_cache(hub: Hub, tiny: str, tmp_path: Path) -> None:
    done = hub.process("scan", tiny, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (done.code, hub.server.seen) == (2, [])
    assert done.err.startswith(f"error: {tiny}: offline mode is on (HF_HUB_OFFLINE), and the local cache does not")
    assert "hf download org/tiny" in done.err


# Ranges


def test_near_ranges_are_merged_and_far_ones_are_not() -> None:
    spans = merge_ranges([(1000, 10), (0, 100), (1010 + GAP, 5), (1015 + 2 * GAP + 1, 1), (1002, 2)])
    assert [(s.offset, s.length) for s in spans] == [(0, 1015 + GAP), (1016 + 2 * GAP, 1)]
    assert sorted(m[0] for s in spans for m in s.members) == [0, 1, 2, 3, 4]


def test_spans_cut_back_into_what_was_asked() -> None:
    data = bytes(range(256)) * 40
    asked = [(5, 3), (9000, 20), (0, 0), (4, 10), (8190, 1)]
    cut = {i: part for s in merge_ranges(asked, 100) for i, part in s.split(data[s.offset : s.offset + s.length])}
    assert [cut[i] for i in range(5)] == [data[a : a + n] for a, n in asked]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("bytes 10-19/100", None),
        ("bytes 10-19/*", None),
        (" bytes 10-19/100 ", None),
        ("bytes 10-19/101", "has 101 bytes"),
        ("bytes 0-9/100", "sent bytes 0 to 9"),
        ("bytes 10-20/100", "10 to 20"),
        ("bytes */100", "invalid Content-Range"),
        ("", "invalid Content-Range"),
        (None, "invalid Content-Range"),
        ("items 10-19/100", "invalid Content-Range"),
    ],
)
def test_content_range(value: str | None, words: str | None) -> None:
    said = content_range_error(value, 10, 10, 100)
    assert said is None if words is None else words in (said or "")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs in this process must not reach for the real Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def test_the_next_command_keeps_the_revision(hub: Hub, pristine: Make, tmp_path: Path) -> None:
    sha = hub.server.add("org/revised", pristine("dense31b", "partial", shards=2))
    for given in (["org/revised", "--revision", sha], [f"org/revised@{sha}"], [f"hf://org/revised@{sha}"]):
        done = hub.run("scan", *given, "--vllm", "0.22.1")
        assert done.out.endswith(f"  bnbfix repair org/revised@{sha} --out revised-repaired --vllm 0.22.1\n")
    done = hub.run("repair", "org/revised", "--revision", sha, "--vllm", "0.22.1", "--out", tmp_path / "out")
    assert f"  bnbfix verify {tmp_path / 'out'} --source org/revised@{sha}\n" in done.out
