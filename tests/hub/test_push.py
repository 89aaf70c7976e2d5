"""Pushing a repair: what arrives, what is refused, and that nothing goes which does not verify."""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path

import pytest

from bnbfix.hub.push import stale_files
from tests.support.build import Make
from tests.support.hub import Hub, Ran
from tests.support.hub_server import TOKEN
from tests.support.surgery import read_file, write_file

NUMBERS = count()


@pytest.fixture
def source(hub: Hub, checkpoint: Make) -> str:
    """A repo whose repair changes a shard; to this test its weights are new."""
    n = next(NUMBERS)
    folder = checkpoint("dense31b", "partial", shards=2)
    header, data = read_file(folder / "model-00001-of-00002.safetensors")
    begin, _ = header["model.language_model.embed_tokens.weight"]["data_offsets"]
    data = data[:begin] + n.to_bytes(2, "little") + data[begin + 2 :]
    write_file(folder / "model-00001-of-00002.safetensors", header, data)
    hub.server.add(f"org/source-{n}", folder)
    return f"org/source-{n}"


@pytest.fixture
def to() -> str:
    return f"me/repaired-{next(NUMBERS)}"


def repair(hub: Hub, source: str | Path, out: Path, *more: str, token: str | None = TOKEN) -> Ran:
    return hub.run("repair", source, "--out", out, "--vllm", "0.32.0", *more, token=token)


def stored(hub: Hub, repo: str, ref: str = "main") -> dict[str, bytes]:
    """What the Hub has of a repo."""
    r = hub.server.repos[repo]
    return {name: blob.path.read_bytes() for name, blob in r.commits[r.refs[ref]].items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_pushed_repair_scans_clean(hub: Hub, source: str, to: str, tmp_path: Path) -> None:
    done = repair(hub, source, tmp_path / "out", "--push-to", to)
    assert (done.code, done.err) == (0, "")
    assert f"Pushed: {hub.server.url}/{to}/commit/" in done.out
    assert stored(hub, to) == tree(tmp_path / "out")
    assert not hub.server.repos[to].hidden
    scan = hub.run("scan", to, "--vllm", "0.32.0")
    assert (scan.code, scan.err) == (0, "") and "Loads in vLLM 0.32.0." in scan.out
    assert hub.run("repair", to, "--out", tmp_path / "again", "--vllm", "0.32.0").out.startswith("Nothing to do")
    assert all(s.authorization is None for s in hub.server.seen if s.origin == "cdn")


def test_the_json_of_a_push(hub: Hub, source: str, to: str, tmp_path: Path) -> None:
    doc = repair(hub, source, tmp_path / "out", "--push-to", to, "--private", "--format", "json").json
    sha = hub.server.repos[to].refs["main"]
    assert doc["pushed"] == {"repo": to, "url": f"{hub.server.url}/{to}/commit/{sha}", "commit": sha}
    assert hub.server.repos[to].hidden


def test_a_folders_repair_can_be_pushed_too(hub: Hub, pristine: Make, to: str, tmp_path: Path) -> None:
    assert repair(hub, pristine("dense31b", "skip"), tmp_path / "out", "--push-to", to).code == 0
    assert stored(hub, to) == tree(tmp_path / "out")


def test_a_pull_request_onto_the_source(hub: Hub, source: str, tmp_path: Path) -> None:
    before = hub.server.repos[source].refs["main"]
    done = repair(hub, source, tmp_path / "out", "--create-pr")
    assert done.code == 0 and f"{source}/discussions/1\n" in done.out
    assert hub.server.repos[source].refs["main"] == before
    assert stored(hub, source, "refs/pr/1") == tree(tmp_path / "out")
    assert hub.run("scan", f"{source}@refs/pr/1", "--vllm", "0.32.0").code == 0
    assert not any(s.path == "/api/repos/create" for s in hub.server.seen)


def test_what_is_not_replaced_goes(hub: Hub, source: str, pristine: Make, to: str, tmp_path: Path) -> None:
    hub.server.add(to, pristine("e4b", "all"))  # one model.safetensors, which loaders prefer to an index
    assert repair(hub, source, tmp_path / "out", "--push-to", to).code == 0
    assert stored(hub, to) == tree(tmp_path / "out")


def test_only_weights_and_indexes_beside_the_config_go() -> None:
    there = {"a.safetensors", "b.safetensors", "model.safetensors.index.json", "x/a.safetensors", "notes.txt"}
    assert stale_files(there, {"a.safetensors", "config.json"}) == ["b.safetensors", "model.safetensors.index.json"]


def test_nothing_to_do_pushes_nothing(hub: Hub, pristine: Make, to: str, tmp_path: Path) -> None:
    hub.server.add("org/clean", pristine("e4b", "all"))
    done = repair(hub, "org/clean", tmp_path / "out", "--push-to", to)
    assert done.code == 0 and "Nothing to do" in done.out and "Nothing was pushed." in done.out
    assert to not in hub.server.repos and {s.method for s in hub.server.seen} == {"GET"}
    done = repair(hub, "org/clean", tmp_path / "out", "--push-to", to, "--format", "json")
    assert done.json["pushed"] is None and done.json["nothing_to_do"]


SPOILED = """
import sys
from pathlib import Path
from bnbfix.cli import main as cli
from bnbfix.writer import write

what, out = WHAT, Path(sys.argv[sys.argv.index("--out") + 1])
write_plan = write.write_plan

def write_and_spoil(*arguments, **options):
    result = write_plan(*arguments, **options)
    shard = out / "model-00001-of-00002.safetensors"
    if what == "flipped":
        data = bytearray(shard.read_bytes()); data[-1] ^= 1; shard.write_bytes(data)
    elif what == "missing":
        shard.unlink()
    elif what == "extra":
        (out / "folder").mkdir(); (out / "folder" / "pytorch_model.bin").write_bytes(b"x")
    elif what == "no record":
        (out / "bnbfix.json").unlink()
    return result

write.write_plan = write_and_spoil
try:
    cli.main()
finally:
    write.write_plan = write_plan
"""


@pytest.mark.parametrize(("what", "code"), [("flipped", 1), ("missing", 1), ("extra", 1), ("no record", 2)])
def test_a_folder_that_fails_verify_is_not_pushed(
    hub: Hub, source: str, to: str, tmp_path: Path, what: str, code: int
) -> None:
    command = ("repair", source, "--out", tmp_path / "out", "--vllm", "0.32.0", "--push-to", to)
    done = hub.run(*command, script=SPOILED.replace("WHAT", repr(what)), token=TOKEN)
    assert done.code == code and done.err.startswith(f"error: {tmp_path / 'out'}"), done.err
    assert "nothing was pushed" in done.err or what == "no record"
    assert {s.method for s in hub.server.seen} <= {"GET", "HEAD"} and to not in hub.server.repos


PUSHED = """
import sys
from pathlib import Path
from bnbfix.hub.push import Destination, push_folder

done = push_folder(Path(sys.argv[1]), Destination(sys.argv[2], False, False, None), message="Any folder")
print(done.repo, done.commit)
"""


def test_a_folder_is_pushed_with_its_subfolders_in_one_commit(hub: Hub, to: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").write_text("deep")
    (tmp_path / "y.txt").write_text("top")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "z").write_text("of a download")
    done = hub.run(tmp_path, to, script=PUSHED, token=TOKEN)
    assert (done.out, done.err) == (f"{to} {hub.server.repos[to].refs['main']}\n", "")
    assert stored(hub, to) == {"folder/x.txt": b"deep", "y.txt": b"top"}


# Where no shard changes


def light(hub: Hub, checkpoint: Make) -> tuple[str, int]:
    """A repo whose repair for 0.32.0 changes only config.json, and the bytes of its weights."""
    folder = checkpoint("dense31b", "skip", shards=2)
    repo = f"org/light-{next(NUMBERS)}"
    hub.server.add(repo, folder)
    return repo, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def moved(hub: Hub) -> list[str]:
    """Weights that went whole in either direction."""
    return [s.path for s in hub.server.seen if s.origin == "cdn" and s.method != "HEAD" and s.range is None]


@pytest.mark.parametrize("out", [[], ["--out", "DIR"]], ids=["no --out", "--out"])
def test_a_pull_request_moves_no_weights(hub: Hub, checkpoint: Make, tmp_path: Path, out: list[str]) -> None:
    repo, _ = light(hub, checkpoint)
    before, shas = stored(hub, repo), set(hub.server.repos[repo].commits)
    options = [str(tmp_path / "out") if o == "DIR" else o for o in out]
    done = hub.run("repair", repo, "--vllm", "0.32.0", "--create-pr", *options, token=TOKEN)
    assert (done.code, done.err) == (0, "") and f"{repo}/discussions/1\n" in done.out
    assert moved(hub) == [] and not (tmp_path / "out").exists()
    after = stored(hub, repo, "refs/pr/1")
    assert {name for name in after if before.get(name) != after[name]} == {"README.md", "bnbfix.json", "config.json"}
    (sha,) = set(hub.server.repos[repo].commits) - shas
    assert done.out.endswith(f"  bnbfix scan {repo}@{sha} --vllm 0.32.0\n")
    assert hub.run("scan", f"{repo}@{sha}", "--vllm", "0.32.0").code == 0
    for name, data in after.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    assert hub.run("verify", tmp_path / "copy", "--source", f"{repo}@main").code == 0


def test_another_repo_gets_its_weights_from_the_hub_itself(hub: Hub, checkpoint: Make, tmp_path: Path, to: str) -> None:
    repo, _ = light(hub, checkpoint)
    arguments = ("repair", repo, "--vllm", "0.32.0", "--push-to", to, "--private", "--json")
    done = hub.run(*arguments, token=TOKEN)
    assert (done.code, done.err, moved(hub)) == (0, "", []) and hub.server.repos[to].hidden
    assert done.json["config_only"] and done.json["out"] is None and done.json["pushed"]["repo"] == to
    there = stored(hub, to)
    assert set(there) == {*stored(hub, repo), "bnbfix.json"}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in there.items() if name != "bnbfix.json"}
    assert done.json["sha256"] == json.loads(there["bnbfix.json"])["sha256"] == hashes
    assert hub.run("scan", to, "--vllm", "0.32.0").code == 0


def test_a_push_to_the_source_itself_keeps_its_other_files(hub: Hub, checkpoint: Make) -> None:
    repo, _ = light(hub, checkpoint)
    before = stored(hub, repo)
    done = hub.run("repair", repo, "--vllm", "0.32.0", "--push-to", repo, token=TOKEN)
    assert (done.code, done.err, moved(hub)) == (0, "", []) and set(stored(hub, repo)) == {*before, "bnbfix.json"}


def test_a_push_needs_a_folder_where_shards_change(hub: Hub, source: str, to: str) -> None:
    done = hub.run("repair", source, "--vllm", "0.32.0", "--push-to", to, token=TOKEN)
    assert done.code == 2 and done.err.startswith("error: shards change, so a push needs --out DIR")
    assert to not in hub.server.repos


def test_a_repo_is_not_repaired_in_place(hub: Hub, checkpoint: Make) -> None:
    repo, _ = light(hub, checkpoint)
    done = hub.run("repair", repo, "--vllm", "0.32.0", "--in-place")
    assert done.code == 2 and "is a repo; only a folder can be repaired in place" in done.err
    assert done.err.endswith(f"  bnbfix repair {repo} --vllm 0.32.0 --create-pr\n")


@pytest.mark.parametrize("options", [["--create-pr"], ["--push-to", "me/x"], ["--push-to", "me/x", "--out", "x"]])
def test_a_dry_run_of_a_push_says_that_no_shard_is_moved(hub: Hub, checkpoint: Make, options: list[str]) -> None:
    repo, _ = light(hub, checkpoint)
    done = hub.run("repair", repo, "--vllm", "0.32.0", *options, "--dry-run", token=TOKEN)
    assert done.code == 0 and "No shard is read or written." in done.out and "README.md" in done.out
    assert done.out.endswith(f"  bnbfix repair {repo} --vllm 0.32.0 {' '.join(options)}\n") and moved(hub) == []


def test_a_refused_pull_request_says_so(hub: Hub, checkpoint: Make) -> None:
    repo, _ = light(hub, checkpoint)
    hub.server.fault(403, "/commit/", origin="hub")
    done = hub.run("repair", repo, "--vllm", "0.32.0", "--create-pr", token=TOKEN)
    assert done.code == 2 and "your token does not allow this (HTTP 403)" in done.err


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--push-to", "nonsense"], "'nonsense' is not a repo that can be pushed to: org/name"),
        (["--push-to", "me/x@v1"], "is not a repo that can be pushed to"),
        (["--private"], "a private repo needs a repo to push to"),
        (["--private", "--create-pr"], "only a new repo can be made private"),
    ],
)
def test_options_that_make_no_sense(hub: Hub, source: str, tmp_path: Path, options: list[str], words: str) -> None:
    done = repair(hub, source, tmp_path / "out", *options)
    assert done.code == 2 and words in done.err and not (tmp_path / "out").exists()


def test_a_folder_has_no_repo_for_a_pull_request(hub: Hub, pristine: Make, tmp_path: Path) -> None:
    done = repair(hub, pristine("dense31b", "skip"), tmp_path / "out", "--create-pr")
    assert done.code == 2 and "a pull request needs a repo to push to, and a folder has none" in done.err


def test_no_token_is_said_before_the_work(hub: Hub, source: str, to: str, tmp_path: Path) -> None:
    done = repair(hub, source, tmp_path / "out", "--push-to", to, token=None)
    assert done.code == 2 and "pushing needs a token" in done.err and "hf auth login" in done.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_pushed_offline(hub: Hub, pristine: Make, to: str, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip")
    command = ("repair", source, "--out", tmp_path / "out", "--vllm", "0.32.0", "--push-to", to)
    done = hub.process(*command, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert done.code == 2 and done.err.startswith(f"error: {to}: offline mode is on (HF_HUB_OFFLINE)")
    assert hub.server.seen == [] and (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": 403, "path": "/api/repos/create", "origin": "hub"}, "your token does not allow this (HTTP 403)"),
        ({"kind": 403, "path": "/commit/", "origin": "hub"}, "your token does not allow this (HTTP 403)"),
        ({"kind": 403, "path": "/objects/batch", "origin": "hub"}, "your token does not allow this (HTTP 403)"),
        ({"kind": 403, "path": "/upload/", "origin": "cdn"}, "HTTP 403"),
        ({"kind": 500, "path": "/commit/", "origin": "hub"}, "the Hub fails (HTTP 500)"),
        (
            {"kind": "says", "path": "/commit/", "origin": "hub", "headers": {"body": "{}"}},
            "returned an invalid response",
        ),
        ({"kind": "says", "path": "/commit/", "origin": "hub", "headers": {"body": "<html>"}}, "cannot be pushed"),
        (
            {"kind": "says", "path": "/api/repos/create", "origin": "hub", "headers": {"body": "<html>"}},
            "invalid response",
        ),
    ],
)
def test_a_push_that_is_refused_keeps_the_repair(
    hub: Hub, source: str, to: str, tmp_path: Path, fault: dict[str, object], words: str
) -> None:
    hub.server.fault(**fault)  # type: ignore[arg-type]
    done = repair(hub, source, tmp_path / "out", "--push-to", to)
    assert done.code == 2 and done.err.startswith(f"error: {to}: ") and words in done.err
    assert "Traceback" not in done.err and TOKEN not in done.err
    assert "The repair itself is done." in done.err and done.err.endswith(f"  hf upload {to} {tmp_path / 'out'}\n")
    assert hub.run("verify", tmp_path / "out").code == 0
    assert to not in hub.server.repos or stored(hub, to) == {}


def test_the_token_is_in_no_file(hub: Hub, source: str, to: str, tmp_path: Path) -> None:
    done = repair(hub, source, tmp_path / "out", "--push-to", to)
    everything = [*tree(tmp_path / "out").values(), *tree(hub.home).values(), done.out.encode(), done.err.encode()]
    assert not any(TOKEN.encode() in data for data in everything)
    assert json.loads((tmp_path / "out" / "bnbfix.json").read_text())["source"]["repo"] == source
