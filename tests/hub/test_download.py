"""Repairs of repos: what is downloaded and when, the disk they take, and that they equal the repair of a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from itertools import count
from pathlib import Path

import pytest

import bnbfix
from bnbfix.planner.plan import RECORD
from bnbfix.writer.download import peak_streaming_bytes
from bnbfix.writer.shard_writer import source_files_by_output
from bnbfix.writer.staging import fetched_folder, lock_directory
from tests.support.build import Make
from tests.support.hub import Hub
from tests.support.hub_server import TOKEN

TARGET = ("--vllm", "0.22.1", "--device", "cpu")
NUMBERS = count()  # the process that runs the command line keeps one cache: each test has a repo of its own


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output; of the record all but where the source came from."""
    out = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    record = json.loads(out[RECORD])
    record.pop("source", None)
    record.pop("record_sha256")
    return out | {RECORD: json.dumps(record).encode()}


def fetched(hub: Hub) -> list[str]:
    """The files that were downloaded whole, each time."""
    return sorted(
        s.path.rsplit("/", 1)[1]
        for s in hub.server.seen
        if s.method == "GET" and s.range is None and "/resolve/" not in s.path and "/api/models/" not in s.path
    )


@pytest.fixture
def source(pristine: Make) -> Path:
    """A checkpoint in four shards; its repair copies weights from one to another, and needs no kernels."""
    return pristine("dense31b", "skip", shards=4)


@pytest.fixture
def repo(hub: Hub, source: Path) -> str:
    """The same on the Hub."""
    name = f"org/four-{next(NUMBERS)}"
    hub.server.add(name, source)
    return name


@pytest.fixture(scope="module")
def repaired(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Its repair from the folder."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    bnbfix.repair(pristine("dense31b", "skip", shards=4), out, "0.22.1", device="cpu")
    return contents(out)


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_a_repair_of_a_repo_equals_the_repair_of_its_folder(
    hub: Hub, source: Path, repo: str, repaired: dict[str, bytes], tmp_path: Path, stream: list[str]
) -> None:
    out = tmp_path / "out"
    done = hub.run("repair", repo, "--out", out, *TARGET, *stream, token=TOKEN)
    assert (done.code, done.err) == (0, "")
    assert {s.authorization for s in hub.server.seen if s.origin == "hub"} == {f"Bearer {TOKEN}"}
    assert {s.authorization for s in hub.server.seen if s.origin == "cdn"} == {None}
    assert contents(out) == repaired
    assert os.listdir(tmp_path) == ["out"]
    sha = hub.server.repos[repo].refs["main"]
    assert json.loads((out / RECORD).read_text())["source"] == {"repo": repo, "revision": sha}
    made = {"model.safetensors.index.json", "README.md"}
    assert fetched(hub) == sorted({p.name for p in source.iterdir()} - made), "what the output is made from, once"
    verified = hub.run("verify", out, "--source", repo)
    assert verified.code == 0 and "tensors equal the source's" in " ".join(verified.out.split())


def test_nothing_is_downloaded_for_what_needs_no_repair_or_cannot_be_repaired(
    hub: Hub, pristine: Make, tmp_path: Path
) -> None:
    hub.server.add("org/fine", pristine("e4b", "all"))
    hub.server.add("org/lost", pristine("moe26b", "all"))
    fine = hub.run("repair", "org/fine", "--vllm", "0.32.0", "--out", tmp_path / "out")
    lost = hub.run("repair", "org/lost", "--vllm", "0.22.1", "--out", tmp_path / "out")
    assert (fine.code, lost.code) == (0, 1)
    assert "Nothing to do" in fine.out and "BNB401" in lost.err
    assert fetched(hub) == [] and not (tmp_path / "out").exists()


def test_a_dry_run_downloads_nothing(hub: Hub, source: Path, repo: str) -> None:
    done = hub.run("repair", repo, *TARGET, "--dry-run", "--format", "json")
    local = bnbfix.plan_repair(source, "0.22.1")
    assert done.code == 0 and done.json["bytes_written"] == local.bytes_written
    assert fetched(hub) == []


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_an_etag_cannot_lead_a_download_out_of_the_cache(
    hub: Hub, pristine: Make, tmp_path: Path, stream: list[str]
) -> None:
    name = f"org/leaves{len(stream)}"
    hub.server.add(name, pristine("e4b", "skip"))
    hub.server.fault("leaves", "model.safetensors", origin="hub")
    home = tmp_path / "home"
    done = hub.process("repair", name, "--out", tmp_path / "out", *stream, HF_HOME=str(home / "hf"))
    assert done.code == 2 and "the Hub names a file so that it would leave the cache" in done.err
    assert "Traceback" not in done.err
    assert not [p for p in tmp_path.rglob("*") if "stolen" in p.name] and not (tmp_path / "out").exists()


def test_a_second_stream_keeps_what_the_first_fetched(hub: Hub, repo: str, tmp_path: Path) -> None:
    folder = fetched_folder(tmp_path / "out")
    lock = lock_directory(folder, tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"half of it")
    done = hub.run("repair", repo, "--out", tmp_path / "out", "--stream")
    assert done.code == 2 and "another repair is writing there" in done.err
    assert (folder / "model.safetensors").read_bytes() == b"half of it"
    os.close(lock)
    assert hub.run("repair", repo, "--out", tmp_path / "out", "--stream").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_root_is_not_a_destination(hub: Hub, repo: str) -> None:
    for more in ([], ["--dry-run"]):
        done = hub.run("repair", repo, "--out", "/", "--overwrite", *more)
        assert (done.code, done.err) == (2, "error: /: is the root, which cannot be replaced\n  bnbfix repair --help\n")


def test_stream_is_for_repos(hub: Hub, source: Path, tmp_path: Path) -> None:
    done = hub.run("repair", source, *TARGET, "--out", tmp_path / "out", "--stream")
    assert done.code == 2 and "only repos on the Hub can be streamed" in done.err


def test_killed_and_run_again_finished_files_are_not_fetched_anew(hub: Hub, pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip", shards=4)
    hub.server.add("org/killed", source)
    slow = hub.server.fault("slow", "model-00003")
    command = ["repair", "org/killed", "--out", str(tmp_path / "out"), *TARGET]
    killed = subprocess.Popen([sys.executable, "-m", "bnbfix", *command], env=hub.environment)
    snapshot = hub.home / "hub" / "models--org--killed" / "snapshots"
    deadline = time.monotonic() + 60
    while len(list(snapshot.glob("*/model-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = {p.name for p in snapshot.glob("*/*")}
    assert "model-00003-of-00004.safetensors" not in finished and len(finished) >= 3
    assert slow.times < 1_000_000 and not (tmp_path / "out").exists()
    hub.server.reset()
    done = hub.run(*command)
    assert (done.code, done.err) == (0, "")
    assert "model-00003-of-00004.safetensors" in fetched(hub) and finished.isdisjoint(fetched(hub))
    bnbfix.repair(source, tmp_path / "local", "0.22.1")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_killed_stream_goes_on_from_its_finished_shards(hub: Hub, pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip", shards=4)
    hub.server.add("org/killed-stream", source)
    hub.server.fault("stalls", "model-00004")
    command = ["repair", "org/killed-stream", "--out", str(tmp_path / "out"), *TARGET, "--stream"]
    killed = subprocess.Popen([sys.executable, "-m", "bnbfix", *command], env=hub.environment)
    journal = tmp_path / ".out.bnbfix-partial" / ".bnbfix-journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("model-")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()
    hub.server.reset()
    done = hub.run(*command)
    assert done.code == 0 and "resumed an interrupted repair: 1 finished file kept" in done.err
    assert os.listdir(tmp_path) == ["out"]
    bnbfix.repair(source, tmp_path / "local", "0.22.1")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_stream_that_fails_leaves_nothing(hub: Hub, repo: str, tmp_path: Path) -> None:
    hub.server.fault(403, "model-00003", after=1)
    done = hub.run("repair", repo, *TARGET, "--out", tmp_path / "out", "--stream")
    assert done.code == 2 and f"{repo}: model-00003-of-00004.safetensors" in done.err
    assert os.listdir(tmp_path) == []


def test_a_stream_keeps_a_file_until_its_last_use(hub: Hub, pristine: Make, tmp_path: Path) -> None:
    # Weights of one shard have their quant states in the next: both are read for the first, and the second again.
    source, repo = pristine("dense31b", "partial", shards=17), f"org/parted-{next(NUMBERS)}"
    uses = Counter(f for read in source_files_by_output(bnbfix.plan_repair(source, "0.22.1")).values() for f in read)
    assert max(uses.values()) > 1
    hub.server.add(repo, source)
    done = hub.run("repair", repo, *TARGET, "--out", tmp_path / "out", "--stream")
    assert (done.code, done.err) == (0, "")
    shards = [f for f in fetched(hub) if f.endswith(".safetensors")]
    assert shards == sorted(f for f in uses if f.endswith(".safetensors")), "each once"
    assert os.listdir(tmp_path) == ["out"]
    bnbfix.repair(source, tmp_path / "local", "0.22.1", device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_file_in_place_of_the_stream_folder_is_an_error_and_stays(
    hub: Hub, repo: str, tmp_path: Path, what: str
) -> None:
    place = tmp_path / ".out.bnbfix-source"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    place.write_text("in the way") if what == "file" else place.symlink_to("precious")
    done = hub.run("repair", repo, *TARGET, "--out", tmp_path / "out", "--stream")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {place}: cannot be written (Not a directory)")
    assert (tmp_path / "precious" / "file").read_text() == "precious" and fetched(hub) == []
    assert sorted(os.listdir(tmp_path)) == [".out.bnbfix-source", "precious"]


MEASURE = """
import os, sys
from pathlib import Path
import bnbfix

repo, root, how = sys.argv[1:]
places, peak = (Path(root), Path.home() / "nowhere"), 0
if how == "whole":
    import huggingface_hub.constants as c
    places = (Path(root), Path(c.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--")))

def size(path):
    try:
        return 0 if os.path.islink(path) else os.path.getsize(path)
    except FileNotFoundError:  # another download has just put it in its place
        return 0

def step(n):
    global peak
    files = [os.path.join(at, f) for place in places for at, _, names in os.walk(place) for f in names]
    peak = max(peak, sum(size(f) for f in files))

bnbfix.repair(repo, Path(root) / "out", "0.22.1", device="cpu", stream=how == "stream", progress=step)
print(peak)
"""


def test_streaming_never_has_all_of_the_source_on_disk(
    hub: Hub, source: Path, repo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    peaks = {}
    for how in ("stream", "whole"):
        (tmp_path / how).mkdir()
        done = hub.run(repo, tmp_path / how, how, script=MEASURE)
        assert done.err == ""
        peaks[how] = int(done.out)
    out = sum(p.stat().st_size for p in (tmp_path / "stream" / "out").glob("*.safetensors"))
    assert peaks["whole"] >= size + out
    assert peaks["stream"] < size + out - size // 4
    plan = bnbfix.plan_repair(source, "0.22.1")
    sizes = {f: plan.checkpoint.source.files[f] for read in source_files_by_output(plan).values() for f in read}
    assert out < peaks["stream"] <= peak_streaming_bytes(plan, sizes) + (1 << 16)  # and the texts
    with capsys.disabled():
        print(f"\nmost bytes on disk: {peaks['stream']:,} streaming, {peaks['whole']:,} not; {size:,} + {out:,}")


def test_the_inputs_of_a_plan_are_what_its_files_are_made_from(source: Path) -> None:
    plan = bnbfix.plan_repair(source, "0.22.1")
    read = source_files_by_output(plan)
    assert set(read) == {s.name for s in plan.shards} | set(plan.copied)
    assert {f for files in read.values() for f in files} <= set(plan.checkpoint.source.files)
    assert all(read[name] == (name,) for name in plan.copied)


def test_the_inputs_of_split_experts_are_where_they_are_whole(pristine: Make) -> None:
    plan = bnbfix.plan_repair(pristine("moe26b", "skip", shards=5), "0.32.0")
    have = plan.checkpoint.tensors
    split = {e.name for e in plan.edits if e.action == "quantize"}
    assert len(split) == 12
    made_of = source_files_by_output(plan)
    for name in split:
        stem = name.rpartition("_proj")[0].removesuffix("gate_up").removesuffix("down")
        holding = {s.name for s in plan.shards for t in s.tensors if t.info.name.startswith(f"{stem}0.")}
        assert holding and all(have[name].shard in made_of[shard] for shard in holding)


XET = """
from types import SimpleNamespace
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from bnbfix.hub.client import counting_bar

counted = []
with XetDownloadProgressReporter(
    reconstruction_desc="", total=100, log_level=30, tqdm_class=counting_bar(counted.append)
) as reporter:
    for n in (10, 60, 100):
        reporter.update_progress(SimpleNamespace(
            total_bytes_completed=n, total_transfer_bytes_completed=n // 2, total_bytes=100,
            total_bytes_completion_rate=1.0, total_transfer_bytes_completion_rate=None))
print(counted)
"""


def test_downloads_through_xet_are_counted_once_too(hub: Hub) -> None:
    if not hasattr(import_module("huggingface_hub.utils._xet_progress_reporting"), "XetDownloadProgressReporter"):
        pytest.skip("this huggingface_hub has one bar for a download through Xet")
    done = hub.run(script=XET)
    assert (done.out, done.err) == ("[10, 50, 40]\n", "")


OWN_ERROR = """
import sys, threading
import bnbfix

class Own(OSError):
    pass

def step(n):
    raise Own("mine")

def while_fetching(n):
    if threading.current_thread().name.startswith("bnbfix-fetch"):
        raise Own("mine")

repo, source, out = sys.argv[1:]
bnbfix.repair(source, out, "0.22.1", device="cpu")
for work in (
    lambda: bnbfix.repair(repo, out + "-2", "0.22.1", device="cpu", progress=step),
    lambda: bnbfix.repair(repo, out + "-2", "0.22.1", device="cpu", stream=True, progress=step),
    lambda: bnbfix.verify(out, repo, progress=while_fetching),
):
    try:
        work()
    except Own as e:
        print(e, e.__cause__)
"""


def test_what_the_callers_progress_raises_is_not_the_hubs(hub: Hub, source: Path, repo: str, tmp_path: Path) -> None:
    done = hub.run(repo, source, tmp_path / "out", script=OWN_ERROR)
    assert (done.out, done.err) == ("mine None\n" * 3, "")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize("place", ["http://127.0.0.1:1/\x7f", "http://a..b/", "http://["])
def test_a_download_that_is_sent_to_no_address_is_the_hubs_error(
    hub: Hub, repo: str, tmp_path: Path, place: str, stream: list[str]
) -> None:
    assert hub.run("repair", repo, *TARGET, "--out", tmp_path / "out", "--dry-run").code == 0
    planning = sum("/resolve/" in s.path and "model-00003" in s.path for s in hub.server.seen)
    hub.server.fault("elsewhere", "model-00003", origin="hub", headers={"Location": place}, after=planning)
    done = hub.run("repair", repo, *TARGET, "--out", tmp_path / "out", *stream)
    assert done.code == 2 and done.err.startswith(f"error: {repo}: model-00003-of-00004.safetensors: "), done.err
    assert os.listdir(tmp_path) == [] and planning


SPACE = """
import shutil, sys
from collections import namedtuple
from pathlib import Path
import bnbfix
from bnbfix.writer import download as supply

plan, real = bnbfix.plan_repair(sys.argv[1], "0.22.1"), shutil.disk_usage
download, output = sum(supply.missing_files(plan).values()), plan.bytes_written + supply.SLACK_BYTES
try:
    for free, stream in ((output + download, False), (output + download - 1, False), (output + download // 2, True)):
        shutil.disk_usage = lambda path: namedtuple("Usage", "free")(free)
        try:
            supply.check_space(plan, Path(sys.argv[2]), stream=stream)
            print("enough")
        except bnbfix.OutputError as e:
            print(e, e.hint)
finally:
    shutil.disk_usage = real
"""


def test_disk_is_checked_for_source_and_output_together(hub: Hub, repo: str, tmp_path: Path) -> None:
    done = hub.run(repo, tmp_path / "out", script=SPACE)
    assert done.err == ""
    enough, short, stream = done.out.splitlines()
    assert enough == stream == "enough"
    assert "not enough disk" in short and "for the download" in short and "--stream" in short
    assert fetched(hub) == []


APART = """
import os, shutil, sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
import bnbfix
from bnbfix.writer import download as supply

plan, usage, stat = bnbfix.plan_repair(sys.argv[1], "0.22.1"), shutil.disk_usage, os.stat
out = Path(sys.argv[2])
download, output = sum(supply.missing_files(plan).values()), plan.bytes_written + supply.SLACK_BYTES
def disk(path):  # the output's folder is on a disk of its own
    return 1 if str(path).startswith(str(out.parent)) else 2
try:
    def apart(path, **options):
        found = stat(path, **options)
        return SimpleNamespace(**{k: getattr(found, k) for k in dir(found) if k[:3] == "st_"} | {"st_dev": disk(path)})
    os.stat = apart
    for here, there in ((output, download), (output - 1, download), (output, download - 1)):
        shutil.disk_usage = lambda path: namedtuple("Usage", "free")(here if disk(path) == 1 else there)
        try:
            supply.check_space(plan, out)
            print("enough")
        except bnbfix.OutputError as e:
            print(e)
finally:
    shutil.disk_usage, os.stat = usage, stat
"""


def test_disk_is_checked_for_each_of_two_disks(hub: Hub, repo: str, tmp_path: Path) -> None:
    done = hub.run(repo, tmp_path / "out", script=APART)
    assert done.err == ""
    enough, here, there = done.out.splitlines()
    assert enough == "enough"
    assert here.startswith(f"{tmp_path / 'out'}: not enough disk: ")
    assert there.startswith(f"{hub.home / 'hub'}: not enough disk: ")
