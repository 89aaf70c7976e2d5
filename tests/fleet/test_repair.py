"""A fleet that is repaired: one pull request for each repo, whatever ends before it is written down."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.build import Make
from tests.support.hub import Hub, Ran
from tests.support.hub_server import TOKEN

TITLE = "Repair for vLLM 0.32.0 with bnbfix"


@pytest.fixture
def org(hub: Hub, pristine: Make) -> str:
    """Two models whose shards change, two of which only config.json does, and one that is fine."""
    name = f"org{time.monotonic_ns()}"
    sources = {"shards": pristine("dense31b", "partial", shards=2), "config": pristine("dense31b", "skip")}
    for model, folder in sources.items():
        hub.server.add(f"{name}/{model}-1", folder)
        hub.server.add(f"{name}/{model}-2", folder)
    hub.server.add(f"{name}/fine", pristine("e4b", "all"))
    return name


def command(org: str, output: Path) -> tuple[str, ...]:
    where = ("--org", org, "--output", str(output), "--vllm", "0.32.0", "--rate", "100000")
    return "fleet", "repair", *where


def fleet(hub: Hub, org: str, output: Path) -> Ran:
    return hub.process(*command(org, output), HF_TOKEN=TOKEN)


def pulls(hub: Hub, org: str) -> dict[str, list[str]]:
    return {name.split("/")[1]: repo.pulls for name, repo in sorted(hub.server.repos.items()) if name.startswith(org)}


def expected(n: int = 1) -> dict[str, list[str]]:
    changed = ("config-1", "config-2", "shards-1", "shards-2")
    return dict.fromkeys(changed, [TITLE] * n) | {"fine": []}


def test_every_repo_gets_one_pull_request(hub: Hub, org: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done = fleet(hub, org, output)
    assert done.code == 0 and done.out.startswith("5 models: 4 repaired, 1 nothing to do, for vLLM 0.32.0."), done
    assert pulls(hub, org) == expected()
    assert {p.name for p in tmp_path.iterdir()} == {"out.jsonl", "out.html"}
    for document in map(json.loads, output.read_text().splitlines()):
        if pushed := document["pushed"]:
            assert pushed["url"] == f"{hub.server.url}/{document['model']}/discussions/1"
            assert f'<a href="{pushed["url"]}">pull request</a>' in (tmp_path / "out.html").read_text()
            assert hub.run("scan", f"{document['model']}@refs/pr/1", "--vllm", "0.32.0").code == 0
    hub.server.reset()
    assert fleet(hub, org, output).out == done.out
    assert {s.path for s in hub.server.seen} == {"/api/models"}


def test_a_pull_request_that_nobody_wrote_down_is_found(hub: Hub, org: str, tmp_path: Path) -> None:
    fleet(hub, org, tmp_path / "out.jsonl")
    done = fleet(hub, org, tmp_path / "another.jsonl")
    assert done.out.startswith("5 models: 4 repaired, 1 nothing to do"), done
    assert pulls(hub, org) == expected()
    urls = [
        [json.loads(line)["pushed"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "another.jsonl")
    ]
    assert urls[0] == urls[1]


def test_a_new_commit_gets_a_new_pull_request(hub: Hub, org: str, tmp_path: Path, checkpoint: Make) -> None:
    fleet(hub, org, tmp_path / "out.jsonl")
    folder = checkpoint("dense31b", "skip")
    (folder / "notes.txt").write_text("new")
    hub.server.add(f"{org}/config-1", folder)
    fleet(hub, org, tmp_path / "out.jsonl")
    assert pulls(hub, org) == expected() | {"config-1": [TITLE, TITLE]}


def test_somebody_elses_pull_request_does_not_count(hub: Hub, org: str, tmp_path: Path, pristine: Make) -> None:
    for model in ("config-1", "shards-1"):  # one without a record
        hub.server.add(f"{org}/{model}", pristine("e4b", "all"), ref="refs/pr/1")
        hub.server.repos[f"{org}/{model}"].pulls.append(TITLE)
    fleet(hub, org, tmp_path / "out.jsonl")
    assert pulls(hub, org) == expected() | {"config-1": [TITLE, TITLE], "shards-1": [TITLE, TITLE]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_killed_driver_leaves_one_pull_request_for_each(hub: Hub, org: str, tmp_path: Path, count: int) -> None:
    environment = hub.environment | {"HF_TOKEN": TOKEN}
    driver = subprocess.Popen([sys.executable, "-m", "bnbfix", *command(org, tmp_path / "out.jsonl")], env=environment)
    while sum(map(len, pulls(hub, org).values())) < count:
        time.sleep(0.002)
    driver.kill()  # at once: mostly before the answer about the last one is written down
    driver.wait()
    done = fleet(hub, org, tmp_path / "out.jsonl")
    assert done.out.startswith("5 models: 4 repaired, 1 nothing to do"), done
    assert pulls(hub, org) == expected()


def test_one_repo_has_one_writer(hub: Hub, org: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{org}/fine\n{org}/fine@main\n")
    done = hub.run("fleet", "repair", "--from", tmp_path / "list", "--output", tmp_path / "out.jsonl", token=TOKEN)
    assert done.code == 2 and f"{org}/fine@main: is the same repo as {org}/fine" in done.err


def test_folders_and_what_cannot_be_repaired_are_said(hub: Hub, tmp_path: Path, pristine: Make) -> None:
    hub.server.add("org/experts", pristine("moe26b", "skip"))
    (tmp_path / "list").write_text(f"{pristine('e4b', 'all')}\norg/experts\n")
    arguments = ("--from", tmp_path / "list", "--output", tmp_path / "out.jsonl")
    done = hub.process("fleet", "repair", *arguments, HF_TOKEN=TOKEN)
    assert done.code == 2 and done.out.startswith("2 models: 2 error")
    words = [json.loads(line)["error"]["message"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "a pull request needs a repo to push to" in words[0] and "experts" in words[1]
    assert all(f"\n  {w}\n" in done.out or f": {w}\n" in done.out for w in words), done.out


def test_a_repair_needs_a_token(hub: Hub, org: str, tmp_path: Path) -> None:
    done = hub.run(*command(org, tmp_path / "out.jsonl"))
    assert done.code == 2 and "pushing needs a token" in done.err and not hub.server.seen


def test_results_of_scans_and_of_repairs_are_kept_apart(hub: Hub, org: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    hub.process("fleet", "scan", "--org", org, "--output", output, "--rate", "100000")
    done = fleet(hub, org, output)
    assert done.code == 2 and "holds results of a scan" in done.err
