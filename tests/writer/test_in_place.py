"""Repairs in place: only where no shard changes, with the old files next to the new ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import bnbfix
from bnbfix.errors import OutputError, UsageError
from bnbfix.report.next_step import after_verify
from bnbfix.writer import in_place
from tests.support.build import Make
from tests.support.command_line import Cli


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_config_json_is_replaced_and_the_old_one_kept(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    (source / "config.json").chmod(0o640)
    before, plan = contents(source), bnbfix.plan_repair(source, "0.32.0")
    result = bnbfix.repair_in_place(source, "0.32.0")
    after = contents(source)
    assert result.written and result.in_place and result.out == source
    assert after.pop("config.json").decode() == plan.texts["config.json"]
    assert after.pop("config.json.before-bnbfix") == before.pop("config.json")
    assert json.loads(after.pop("bnbfix.json"))["target"] == "0.32.0"
    assert after == before, "every other file is as it was"
    assert (source / "config.json").stat().st_mode & 0o777 == 0o640
    assert bnbfix.scan(source, "0.32.0").ok and bnbfix.verify(source).ok
    assert not bnbfix.repair_in_place(source, "0.32.0").written


@pytest.mark.parametrize("card", [True, False])
def test_it_is_verified_with_its_source(checkpoint: Make, tmp_path: Path, card: bool) -> None:
    source, folder = checkpoint("dense31b", "skip", shards=2), tmp_path / "in-place"
    if not card:
        (source / "README.md").unlink()
    shutil.copytree(source, folder)
    bnbfix.repair_in_place(folder, "0.32.0")
    assert bnbfix.verify(folder, source).ok
    with (folder / "tokenizer.json").open("a") as f:
        f.write(" ")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    found = bnbfix.verify(folder, source)
    (step,) = after_verify(found, str(source))
    assert not any("--overwrite" in command for command in step.commands), "it would replace the user's own folder"
    problems = {p.file: p.message for p in found.problems}
    assert problems["config.json"] == "differs from what the plan writes"
    assert "the source" in problems["tokenizer.json"]
    assert "README.md" not in problems and "config.json.before-bnbfix" not in problems


def test_every_old_file_is_kept(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    first = (source / "config.json").read_bytes()
    (source / "bnbfix.json").write_text("{}")
    for _ in range(2):
        (source / "config.json").write_bytes(first)
        assert bnbfix.repair_in_place(source, "0.32.0").written
    for name in ("config.json.before-bnbfix", "config.json.before-bnbfix1"):
        assert (source / name).read_bytes() == first
    assert (source / "bnbfix.json.before-bnbfix").read_text() == "{}"
    assert bnbfix.verify(source).ok


def test_an_index_is_replaced_too(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    index = source / "model.safetensors.index.json"
    doc = json.loads(index.read_text())
    doc["metadata"]["total_size"] = 1
    index.write_text(json.dumps(doc))
    assert set(bnbfix.repair_in_place(source, "0.32.0").files) == {"config.json", index.name}
    assert json.loads(index.read_text())["metadata"]["total_size"] > 1
    assert json.loads((source / f"{index.name}.before-bnbfix").read_text()) == doc


def test_it_is_refused_where_shards_change(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "partial", shards=2)
    before = contents(source)
    with pytest.raises(UsageError, match=r"model-00001-of-00002\.safetensors and 1 more would have to be written anew"):
        bnbfix.repair_in_place(source, "0.32.0")
    done = run("repair", source, "--in-place", "--vllm", "0.32.0")
    assert done.code == 2 and "cannot be repaired in place" in done.error
    assert done.commands == [f"bnbfix repair {source} --vllm 0.32.0 --out {source}-repaired"]
    assert contents(source) == before


@pytest.mark.parametrize("name", ["config.json", "bnbfix.json"])
def test_a_link_is_not_replaced(checkpoint: Make, tmp_path: Path, name: str) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    target = source / "elsewhere"
    if (source / name).exists():
        (source / name).rename(target)
    else:
        target.write_text("{}")
    (source / name).symlink_to(target.name)
    before = contents(source)
    with pytest.raises(UsageError, match="is a link, which is not replaced in place"):
        bnbfix.repair_in_place(source, "0.32.0")
    assert contents(source) == before


def test_a_disk_that_fails_leaves_the_old_config(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    before = (source / "config.json").read_bytes()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(in_place, "write_small", full)
    with pytest.raises(OutputError, match="No space left on device"):
        bnbfix.repair_in_place(source, "0.32.0")
    assert (source / "config.json").read_bytes() == before
    assert os.listdir(source).count("config.json") == 1


@pytest.mark.parametrize("place", [["--in-place"], []], ids=["--in-place", "no place"])
def test_a_dry_run_says_that_no_shard_is_touched(run: Cli, checkpoint: Make, place: list[str]) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    before = contents(source)
    done = run("repair", source, "--vllm", "0.32.0", "--dry-run", *place)
    assert (done.code, done.err) == (0, "") and "No shard is read or written." in done.words
    assert "model-00001" not in done.out and "README.md" not in done.out and " of disk" not in done.words
    assert done.commands == [f"bnbfix repair {source} --vllm 0.32.0 --in-place"]
    assert run("repair", source, "--vllm", "0.32.0", "--dry-run", "--json", *place).json["disk_needed"] == 0
    assert contents(source) == before


def test_a_dry_run_in_place_leads_to_a_copy_where_shards_change(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "partial", shards=2)
    done = run("repair", source, "--vllm", "0.32.0", "--dry-run", "--in-place")
    assert done.code == 0 and "MB of disk" in done.words
    assert done.commands == [f"bnbfix repair {source} --vllm 0.32.0 --out {source}-repaired"]


def test_on_the_command_line(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    scan = run("scan", source, "--vllm", "0.32.0")
    assert "Repair it (only config.json changes):" in scan.words
    assert scan.commands == [f"bnbfix repair {source} --in-place --vllm 0.32.0"]
    done = run(*scan.commands[0].split()[1:])
    assert (done.code, done.err) == (0, "") and "Replaced config.json in " in done.words
    verify, _, serve = done.commands
    assert (verify, serve) == (f"bnbfix verify {source}", f"vllm serve {source}")
    assert run(*verify.split()[1:]).code == 0
