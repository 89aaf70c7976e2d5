"""Files that somebody else changes or adds while a repair works, and repairs that delete what another one kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import bnbfix
from bnbfix.errors import HubError, InputError, OutputError, UsageError
from bnbfix.hub.client import describe_request, retry
from tests.faults.test_faults import pristine_with_a_clean_shard, tree
from tests.support.build import Make
from tests.support.command_line import Cli
from tests.support.hub import Hub

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def source(checkpoint: Make) -> Path:
    return checkpoint("dense31b", "partial", shards=2)


def test_a_change_that_restores_the_time_is_noticed(source: Path, tmp_path: Path) -> None:
    seen = 0

    def meddle(n: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            before = os.stat(source / SHARD)
            with (source / SHARD).open("r+b") as f:
                f.seek(-1, os.SEEK_END)
                f.write(b"\x55")
            os.utime(source / SHARD, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(InputError, match=f"{SHARD}: changed while it was being read"):
        bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu", progress=meddle)
    assert not (tmp_path / "out").exists()


def test_a_hard_link_is_not_a_change(source: Path, tmp_path: Path) -> None:
    copy = pristine_with_a_clean_shard(source, tmp_path / "clean")
    os.mkdir(tmp_path / "backup")
    linked: list[Path] = []

    def link(n: int) -> None:
        if not linked:
            linked.append(tmp_path / "backup" / "config.json")
            os.link(copy / "config.json", linked[0])

    result = bnbfix.repair(copy, tmp_path / "out", "0.22.1", device="cpu", hardlink=True, progress=link)
    assert result.linked and linked[0].samefile(copy / "config.json")


@pytest.mark.parametrize("name", ["extra.txt", "extra.safetensors", "folder/extra.txt"])
def test_what_somebody_else_puts_into_the_staging_folder_is_not_published(
    source: Path, tmp_path: Path, name: str
) -> None:
    def meddle(n: int) -> None:
        extra = tmp_path / ".out.bnbfix-partial" / name
        extra.parent.mkdir(exist_ok=True)
        extra.write_bytes(b"x")

    with pytest.raises(OutputError, match=f"{name}: was put into the output by another program"):
        bnbfix.repair(source, tmp_path / "out", "0.22.1", device="cpu", progress=meddle)
    assert not (tmp_path / "out").exists()


def test_an_empty_output_is_refused(run: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = run("repair", source, "--out", "")
    assert (done.code, done.error) == (2, "error: --out is empty; it must name a folder")
    with pytest.raises(UsageError, match="empty path"):
        bnbfix.repair(source, "", "0.22.1", device="cpu")
    assert os.listdir() == []


def test_half_a_surrogate_in_a_name_is_not_the_tokens(hub: Hub) -> None:
    listing = '{"id":"org/odd","sha":"%s","siblings":[{"rfilename":"a\\ud800.json","size":1}]}' % ("0" * 40)
    hub.server.fault("says", "/api/models/org/odd", origin="hub", headers={"body": listing})
    done = hub.run("scan", "org/odd")
    assert done.code == 2 and "half a surrogate pair" in done.err and "HF_TOKEN" not in done.err


@pytest.mark.parametrize(("token", "words"), [("hf_good", "no address can hold"), ("hf_\u00fc", "HF_TOKEN")])
def test_only_a_token_that_cannot_be_sent_is_blamed(monkeypatch: pytest.MonkeyPatch, token: str, words: str) -> None:
    def work() -> None:
        "\ud800".encode()

    monkeypatch.setattr("bnbfix.hub.client.get_token", lambda: token)
    with pytest.raises(HubError, match=words):
        retry(work, describe_request("org/odd", None, "a"))


def test_what_another_repair_kept_is_not_deleted_silently(run: Cli, source: Path, tmp_path: Path) -> None:
    staging, out = tmp_path / ".out.bnbfix-partial", tmp_path / "out"

    def interrupt(n: int) -> None:
        if (staging / ".bnbfix-journal").read_text().count("\n") > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnbfix.repair(source, out, "0.22.1", device="cpu", progress=interrupt)
    done = run("repair", source, "--out", out, "--vllm", "portable", "--device", "cpu")
    words = "of files that an interrupted repair finished for another target, source or option"
    assert done.code == 0 and done.err.startswith("deleting ") and done.err.endswith(f" {words}: {staging}\n")
    bnbfix.repair(source, tmp_path / "right", "portable", device="cpu")
    assert tree(out) == tree(tmp_path / "right")


def test_what_the_same_repair_kept_is_not_deleted(run: Cli, source: Path, tmp_path: Path) -> None:
    staging, out = tmp_path / ".out.bnbfix-partial", tmp_path / "out"

    def interrupt(n: int) -> None:
        if (staging / ".bnbfix-journal").read_text().count("\n") > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnbfix.repair(source, out, "0.22.1", device="cpu", progress=interrupt)
    done = run("repair", source, "--out", out, "--vllm", "0.22.1", "--device", "cpu")
    assert done.code == 0 and done.err.startswith("resumed an interrupted repair: ")
