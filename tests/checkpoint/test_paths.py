"""Links, pipes, programs and pickles in a model folder: what is read, what is copied, what never leaves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import bnbfix
from bnbfix.checkpoint.source import LocalSource, open_regular
from bnbfix.errors import InputError
from bnbfix.planner.plan import JOURNAL, RECORD
from bnbfix.rules.rule import Code
from tests.support.build import Make, json_of

SHARD = "model.safetensors"
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\n"


def repair(source: Path, out: Path) -> bnbfix.RepairResult:
    return bnbfix.repair(source, out, vllm="portable", device="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuses(source: Path, tmp_path: Path, words: str) -> None:
    """Asserts that a repair is refused for these words, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=words) as caught:
        repair(source, tmp_path / "out")
    assert SECRET.strip() not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


# Links


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside every model folder."""
    path = tmp_path / "elsewhere" / "id_rsa"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "new.txt", "notes/deep.txt", "stray.safetensors"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_copied_file_that_is_a_link_out_of_the_folder_is_refused(
    checkpoint: Make, tmp_path: Path, secret: Path, name: str, relative: bool
) -> None:
    source = checkpoint("text", "skip", shards=2)
    link = source / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(secret, link.parent) if relative else secret)
    assert LocalSource.open(source).with_subfolders().external_links == {name}
    refuses(source, tmp_path, rf"^{name}: is a link out of the model folder; a repair would copy what it leads to$")
    assert bnbfix.scan(source, "portable").findings, "a scan copies nothing"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_or_an_index_that_is_a_link_out_of_the_folder_is_not_copied_either(
    checkpoint: Make, tmp_path: Path, name: str
) -> None:
    source = checkpoint("text", "skip", shards=2)
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    refuses(source, tmp_path, f"^{name}: is a link out of the model folder")


def test_a_link_that_leads_out_by_way_of_another_is_refused(checkpoint: Make, tmp_path: Path, secret: Path) -> None:
    source = checkpoint("text", "skip")
    (source / "a.txt").symlink_to(secret)
    (source / "b.txt").symlink_to("a.txt")
    assert LocalSource.open(source).external_links == {"a.txt", "b.txt"}
    refuses(source, tmp_path, r"^a\.txt: is a link out")


def test_links_inside_the_folder_and_weights_on_another_disk_are_followed(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "skip", shards=2)
    unlinked = contents(repair(source, tmp_path / "unlinked").out or tmp_path)
    for shard in source.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    (source / "folder").mkdir()
    (source / "README.md").rename(source / "folder" / "README.md")
    (source / "README.md").symlink_to("folder/README.md")
    assert LocalSource.open(source).external_links == {p.name for p in source.glob("*.safetensors")}
    linked = contents(repair(source, tmp_path / "linked").out or tmp_path)
    del linked["folder/README.md"]
    for made in (unlinked, linked):
        del made["bnbfix.json"]  # it hashes the folder's file too
    assert linked == unlinked
    assert not any(p.is_symlink() for p in (tmp_path / "linked").rglob("*"))


def hub_cache(model: Path, cache: Path) -> Path:
    """A snapshot as huggingface_hub's cache has it, with a folder in it."""
    snapshot, blobs = cache / "models--u--m" / "snapshots" / ("a" * 40), cache / "models--u--m" / "blobs"
    (snapshot / "folder").mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    (blobs / "f").write_text("deep")
    (snapshot / "folder" / "deep.txt").symlink_to("../../../blobs/f")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_inside_whatever_leads_to_it(pristine: Make, tmp_path: Path) -> None:
    snapshot = hub_cache(pristine("text", "skip"), tmp_path / "hub")
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    for way in (snapshot, tmp_path / "link" / snapshot.relative_to(tmp_path / "hub")):
        assert LocalSource.open(way).with_subfolders().external_links == frozenset()
    assert repair(snapshot, tmp_path / "out").written
    assert (tmp_path / "out" / "folder" / "deep.txt").read_text() == "deep"


def test_a_snapshot_whose_links_leave_its_repo_is_like_any_other_folder(
    pristine: Make, tmp_path: Path, secret: Path
) -> None:
    snapshot = hub_cache(pristine("text", "skip"), tmp_path / "hub")
    other = tmp_path / "hub" / "models--v--n" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(secret, other / "x")
    (snapshot / "other.txt").symlink_to("../../../models--v--n/blobs/x")
    (snapshot / "ref.txt").symlink_to("../../refs-of-mine")
    (tmp_path / "hub" / "models--u--m" / "refs-of-mine").write_text("x")
    assert LocalSource.open(snapshot).external_links == {"other.txt", "ref.txt"}


def test_blobs_that_are_a_link_themselves_are_not_inside(pristine: Make, tmp_path: Path, secret: Path) -> None:
    snapshot = tmp_path / "m" / "snapshots" / "x"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(pristine("text", "skip"), snapshot)
    (tmp_path / "m" / "blobs").symlink_to(secret.parent)
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../blobs/id_rsa")
    refuses(snapshot, tmp_path, r"^README\.md: is a link out")


# What is not a regular file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        here = Path.cwd()
        os.chdir(path.parent)  # the whole path may be longer than an address can be
        try:
            s.bind(path.name)
        finally:
            os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, unix_socket, device, Path.mkdir])
def test_opening_what_is_not_a_regular_file_is_an_error_and_does_not_block(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        InputError, match=r"^x: (is not a regular file|cannot be opened \(No such device or address\))$"
    ):
        open_regular(tmp_path / "x", "x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_became_a_pipe_since_it_was_listed_is_refused(checkpoint: Make) -> None:
    folder = checkpoint("text", "skip")
    source = LocalSource.open(folder)
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(InputError, match=rf"^{SHARD}: is not a regular file$"):
        source.read(SHARD, [(0, 8)])


def link_to_folder(path: Path) -> None:
    (path.parent / "run-1").mkdir()
    path.symlink_to("run-1")


def broken_link(path: Path) -> None:
    path.symlink_to("gone")


ODD = pytest.mark.parametrize("make", [fifo, unix_socket, device, link_to_folder, broken_link])


@ODD
@pytest.mark.parametrize("place", ["latest-run", "wandb/latest-run", "README.md"])
def test_an_odd_entry_does_not_concern_a_scan_and_stops_a_repair_that_would_copy_it(
    make: Callable[[Path], object], place: str, checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("text", "skip")
    (source / place).unlink(missing_ok=True)
    want = bnbfix.scan(source, "portable")
    (source / place).parent.mkdir(exist_ok=True)
    make(source / place)
    assert bnbfix.scan(source, "portable") == want and want.findings
    refuses(source, tmp_path, rf"^{place}: (is not a regular file|cannot be opened|is a link out)")
    with pytest.raises(InputError) as caught:
        bnbfix.plan_repair(source, "portable")
    assert caught.value.hint or place == "README.md"  # which is read before it is copied


@ODD
def test_an_odd_entry_that_a_repair_does_not_copy_is_ignored(
    make: Callable[[Path], object], checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("text", "skip")
    (source / "checkpoints").mkdir()
    make(source / "checkpoints" / "latest.pt")
    out = repair(source, tmp_path / "out").out
    assert out is not None and bnbfix.verify(out, source).ok and not (out / "checkpoints" / "latest.pt").exists()


@ODD
def test_an_odd_entry_in_an_output_is_a_difference(
    make: Callable[[Path], object], checkpoint: Make, tmp_path: Path
) -> None:
    out = repair(checkpoint("text", "skip"), tmp_path / "out").out
    assert out is not None and bnbfix.verify(out).ok
    (out / "folder").mkdir()
    make(out / "folder" / "x")
    problems = [str(p) for p in bnbfix.verify(out).problems]
    assert "folder/x: is not in the record" in problems


@ODD
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("step", [bnbfix.scan, bnbfix.plan_repair])
def test_an_odd_entry_that_is_the_config_the_index_or_a_shard_is_an_error(
    make: Callable[[Path], object], name: str, step: Callable[..., object], checkpoint: Make
) -> None:
    source = checkpoint("text", "skip", shards=2)
    (source / name).unlink()
    make(source / name)
    with pytest.raises(InputError, match=rf"^{name}: (is not a regular file|cannot be opened \()"):
        step(source, "portable")


def test_what_nothing_needs_to_be_done_for_is_not_walked(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("e4b", "all")
    source.joinpath(*["d"] * 52).mkdir(parents=True)
    assert bnbfix.scan(source, "0.32.0").ok
    assert not bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu").written


@pytest.mark.parametrize("step", [bnbfix.scan, bnbfix.plan_repair])
def test_a_folder_without_a_config_is_not_walked(step: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "broken").symlink_to("gone")
    tmp_path.joinpath(*["d"] * 52).mkdir(parents=True)
    with pytest.raises(InputError, match=r"^config\.json: is missing$"):
        step(tmp_path)


def test_a_folder_that_cannot_be_listed_is_an_error_of_the_input(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scandir = checkpoint("text", "skip"), os.scandir
    (source / "private").mkdir()

    def denied(path: str | Path) -> object:
        if str(path).rstrip("/").endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert bnbfix.scan(source, "portable").findings
    with pytest.raises(InputError, match=r"^private/: cannot be listed \(Permission denied\)$"):
        bnbfix.plan_repair(source, "portable")


def test_a_file_that_changes_between_scan_and_listing_is_noticed(checkpoint: Make) -> None:
    folder = checkpoint("text", "skip")
    source = LocalSource.open(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^config\.json: changed while it was being read$"):
        source.with_subfolders().check_unchanged()


@pytest.mark.parametrize("name", ["C:x.safetensors", "C:\\x", "\\\\host\\share\\x", "\\\\?\\C:\\x", "\\x", "a/../b"])
def test_a_weight_map_with_drives_and_hosts_of_windows(checkpoint: Make, name: str) -> None:
    folder = checkpoint("text", "skip", shards=2)
    with json_of(folder, "model.safetensors.index.json") as index:
        index["weight_map"]["x"] = name
    with pytest.raises(InputError, match="which is not a file next to it"):
        bnbfix.scan(folder, "portable")


# Programs and pickles

LOADED = "import pathlib, builtins; pathlib.Path({!r}).touch()"


def with_code(source: Path, witness: Path) -> None:
    """Add pickles and programs that leave a trace when they are loaded or run."""
    bomb = f"cbuiltins\nexec\n(V{LOADED.format(str(witness))}\ntR.".encode()
    for name in ("pytorch_model.bin", "optimizer.PT", "original/consolidated.00.pth", "x.ckpt", "y.pkl"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(bomb)
    (source / "modeling_evil.py").write_text(LOADED.format(str(witness)))
    (source / "run.sh").write_text(f"#!/bin/sh\ntouch {witness}\n")
    (source / "run.sh").chmod(0o755)
    with json_of(source) as config:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}


def test_pickles_and_programs_are_reported_and_neither_run_nor_given_new_rights(
    checkpoint: Make, tmp_path: Path
) -> None:
    source, witness = checkpoint("text", "skip"), tmp_path / "witness"
    with_code(source, witness)
    found = {(f.code, f.severity): f.tensors for f in bnbfix.scan(source, "portable").findings}
    pickles = ("optimizer.PT", "pytorch_model.bin", "x.ckpt", "y.pkl")  # vLLM reads nothing in subfolders
    assert found[Code.PICKLES, "note"] == pickles
    messages = [f.message for f in bnbfix.scan(source, "portable").findings if f.code is Code.CODE]
    assert len(messages) == 2 and any("auto_map" in m for m in messages)
    assert [f.tensors for f in bnbfix.scan(source, "portable").findings if f.code is Code.CODE and f.tensors] == [
        ("modeling_evil.py", "run.sh")
    ]
    out = repair(source, tmp_path / "out").out
    assert out is not None and not witness.exists()
    made = contents(out)
    assert not {*pickles, "original/consolidated.00.pth"} & set(made), "stale weights, and code"
    assert made["modeling_evil.py"] == (source / "modeling_evil.py").read_bytes()
    assert not [p for p in out.rglob("*") if p.is_file() and p.stat().st_mode & 0o111]
    assert bnbfix.verify(out, source).ok
    again = bnbfix.scan(out, "portable")
    assert again.ok and Code.PICKLES not in {f.code for f in again.findings}


def test_a_folder_without_pickles_and_programs_has_no_such_note(pristine: Make) -> None:
    codes = {f.code for f in bnbfix.scan(pristine("text", "skip"), "portable").findings}
    assert not codes & {Code.PICKLES, Code.CODE}


def test_pickles_by_themselves_are_not_repaired(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("e4b", "all")
    (source / "training_args.bin").write_bytes(b"\x80\x04.")
    assert bnbfix.scan(source, "0.32.0").ok
    assert not bnbfix.repair(source, tmp_path / "out", vllm="0.32.0", device="cpu").written


# Modes, and names of ours


def test_modes_come_from_the_umask_and_not_from_the_source(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "skip")
    (source / "setuid.txt").write_text("x")
    (source / "setuid.txt").chmod(0o6777)
    before = os.umask(0o027)
    try:
        out = repair(source, tmp_path / "out").out
    finally:
        os.umask(before)
    assert out is not None
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.rglob("*") if p.is_file()} == {0o640}


@pytest.mark.parametrize("name", [".journal", JOURNAL, RECORD, "bnbfix.json.tmp"])
def test_a_source_with_files_named_like_our_own(checkpoint: Make, tmp_path: Path, name: str) -> None:
    source = checkpoint("text", "skip")
    (source / name).write_text(json.dumps({"plan": "x"}))
    out = repair(source, tmp_path / "out").out
    assert out is not None and bnbfix.verify(out, source).ok
    assert (out / name).exists() == (name != JOURNAL) and (source / name).read_text() == json.dumps({"plan": "x"})


# Secrets


def test_a_token_in_the_environment_is_nowhere(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "hf_" + "S3cr3t" * 6
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, token)
    source = checkpoint("text", "skip")
    out = repair(source, tmp_path / "out").out
    assert out is not None
    said = [repr(bnbfix.scan(source, "portable")), repr(bnbfix.verify(out, source)), repr(LocalSource.open(source))]
    os.truncate(source / SHARD, 100)
    with pytest.raises(InputError) as caught:
        repair(source, tmp_path / "other")
    said += [str(caught.value), repr(caught.value), *capsys.readouterr()]
    assert not [text for text in said if token in text]
    assert not [name for name, data in contents(tmp_path).items() if token.encode() in data]
