"""A fleet that is scanned: the same as scans one by one, nothing twice, and the Hub's limits kept."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bnbfix.engines.targets import resolve_target
from bnbfix.errors import OutputError, UsageError
from bnbfix.fleet import local, task
from bnbfix.fleet.results import Results
from bnbfix.fleet.run import name_models, run_fleet
from bnbfix.hub import pace
from tests.support.build import Make
from tests.support.command_line import Cli
from tests.support.hub import Hub, Ran

FAST = ("--rate", "100000", "--jobs", "2")
MODELS = ("broken", "fails", "loads", "other", "wrong")


@pytest.fixture
def org(hub: Hub, pristine: Make, tmp_path: Path) -> str:
    """An organization of five models: one broken, one that bnbfix does not judge."""
    name = f"org{time.monotonic_ns()}"
    other, broken = tmp_path / "other", tmp_path / "broken"
    for folder, config in ((other, "{}"), (broken, "{")):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    sources = {"fails": pristine("dense31b", "int8"), "wrong": pristine("dense31b", "partial", shards=2)}
    sources |= {"loads": pristine("e4b", "all"), "other": other, "broken": broken}
    for model, folder in sources.items():
        hub.server.add(f"{name}/{model}", folder)
    return name


def fleet(hub: Hub, org: str, output: Path, *more: object, vllm: str = "0.32.0") -> Ran:
    return hub.process("fleet", "scan", "--org", org, "--output", output, "--vllm", vllm, *FAST, *more)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def asked(hub: Hub) -> Counter[str]:
    """How often the Hub was asked about each model's commit."""
    return Counter(m[1] for s in hub.server.seen if (m := re.fullmatch("/api/models/[^/]+/([^/]+)", s.path)))


def test_a_fleet_says_what_scans_say(hub: Hub, org: str, tmp_path: Path) -> None:
    done = fleet(hub, org, tmp_path / "out.jsonl")
    assert (done.code, done.err) == (2, ""), done
    assert done.out.startswith("5 models: 1 error, 1 fails, 1 wrong, 1 loads, 1 skipped, for vLLM 0.32.0. Written: ")
    assert f".html\n  {org}/broken: config.json: " in done.out
    assert f"\n  bnbfix fleet repair --org {org} --vllm 0.32.0\n" in done.out
    names = [f"{org}/{m}" for m in MODELS]
    alone = hub.run("scan", *names, "--vllm", "0.32.0", "--format", "jsonl")
    found = lines(tmp_path / "out.jsonl")
    assert [d["model"] for d in found] == names
    for document, single in zip(found, map(json.loads, alone.out.splitlines()), strict=True):
        assert {key: document[key] for key in single} == single
        assert document["commit"] == hub.server.repos[document["model"]].refs["main"]


def test_the_page_has_the_worst_first(hub: Hub, org: str, tmp_path: Path) -> None:
    fleet(hub, org, tmp_path / "out.jsonl", vllm="portable")
    page = (tmp_path / "out.html").read_text()
    assert re.findall(rf'<tr><th scope="row">{org}/(\w+)', page)[0] == "broken"
    verdicts = re.findall(rf'<tr><th scope="row">{org}/\w+<td><span class="verdict (\w+)"', page)
    assert verdicts == sorted(verdicts, key=("error", "fails", "wrong", "degraded", "loads", "skipped").index)
    assert '<th scope="col">0.19.0-0.22.1' in page and "default-src 'none'" in page
    assert "<script" not in page


def test_finished_models_are_not_scanned_again(hub: Hub, org: str, tmp_path: Path, pristine: Make) -> None:
    fleet(hub, org, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    hub.server.reset()
    assert fleet(hub, org, tmp_path / "out.jsonl").code == 2
    assert asked(hub) == {"broken": 1}  # the listing has the commits of the others
    assert (tmp_path / "out.jsonl").read_bytes() == before
    hub.server.add(f"{org}/fails", pristine("e4b", "all"))
    hub.server.reset()
    fleet(hub, org, tmp_path / "out.jsonl")
    assert asked(hub) == {"broken": 1, "fails": 1}
    assert {d["model"]: d.get("verdict") for d in lines(tmp_path / "out.jsonl")}[f"{org}/fails"] == "loads"
    hub.server.reset()
    fleet(hub, org, tmp_path / "out.jsonl", vllm="portable")  # for another target
    assert asked(hub) == dict.fromkeys(MODELS, 1)


def test_models_of_a_list_are_asked_for_their_commit_only(hub: Hub, org: str, tmp_path: Path, pristine: Make) -> None:
    folder = pristine("e4b", "all")
    listed, output = tmp_path / "list", tmp_path / "out.jsonl"
    listed.write_text(f"{org}/wrong\nhf://{org}/wrong\n{org}/loads@main # a branch\n{folder}\n")
    command = ("fleet", "scan", "--from", listed, "--output", output, *FAST)
    first = hub.process(*command)
    assert first.out.startswith("3 models: "), first
    assert [d["model"] for d in lines(output)] == [f"{org}/wrong", f"{org}/loads@main", str(folder)]
    hub.server.reset()
    hub.process(*command)
    assert all(s.path.startswith("/api/models/") for s in hub.server.seen) and len(hub.server.seen) == 2


def test_a_killed_driver_is_resumed(hub: Hub, org: str, tmp_path: Path) -> None:
    hub.server.fault("holds", f"/api/models/{org}/wrong", origin="hub")
    command = [sys.executable, "-m", "bnbfix", "fleet", "scan", "--org", org, "--output", str(tmp_path / "out.jsonl")]
    driver = subprocess.Popen([*command, *FAST], env=hub.environment, start_new_session=True)
    while not (tmp_path / "out.jsonl").exists() or len((tmp_path / "out.jsonl").read_bytes().splitlines()) < 4:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"schema": 1, "bnbfix"')  # a line that it was writing
    while processes_of(driver.pid):  # the workers end with it
        time.sleep(0.05)
    hub.server.released.set()
    hub.server.reset()
    assert fleet(hub, org, tmp_path / "out.jsonl", vllm="portable").code == 2
    assert asked(hub) == {"wrong": 1, "broken": 1}
    assert [d["model"] for d in lines(tmp_path / "out.jsonl")] == [f"{org}/{m}" for m in MODELS]


def processes_of(session: int) -> list[str]:
    """The processes of a session that have not ended."""
    done = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "Z" not in line]


def test_an_interrupted_driver_says_how_to_go_on(hub: Hub, org: str, tmp_path: Path) -> None:
    hub.server.fault("holds", f"/api/models/{org}/wrong", origin="hub")
    command = [sys.executable, "-m", "bnbfix", "fleet", "scan", "--org", org, "--output", str(tmp_path / "out.jsonl")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = subprocess.Popen([*command, *FAST], env=hub.environment, start_new_session=True, text=True, **pipes)  # type: ignore[call-overload]
    while not (tmp_path / "out.jsonl").exists() or len((tmp_path / "out.jsonl").read_bytes().splitlines()) < 4:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    out, err = driver.communicate(timeout=60)
    hub.server.released.set()
    assert (driver.returncode, out) == (130, "")
    assert len(err.splitlines()) == 2, err
    first, again = err.splitlines()
    assert first.startswith("error: interrupted; what is finished is in ") and again.startswith("  bnbfix fleet scan")


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, for workers that this process starts."""
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    return hub


def test_a_model_that_kills_its_worker_takes_no_other_with_it(here: Hub, org: str, tmp_path: Path) -> None:
    here.server.fault("holds", f"/api/models/{org}/wrong", origin="hub")
    before, ended = set(multiprocessing.active_children()), threading.Event()

    def kill_who_waits() -> None:
        seen = 0
        while not ended.wait(0.05):
            waiting = asked(here)["wrong"]
            if waiting > seen and len(lines(tmp_path / "out.jsonl")) == 4:
                seen = waiting
                for child in set(multiprocessing.active_children()) - before:
                    if "SpawnProcess" in child.name:
                        child.kill()

    killer = threading.Thread(target=kill_who_waits)
    killer.start()
    target, models = resolve_target("0.32.0"), name_models(f"{org}/{m}" for m in MODELS)
    results = Results(tmp_path / "out.jsonl", "scan")
    rows = run_fleet(models, target, results, lambda tasks: local.run_on_processes(tasks, jobs=2, rate=1e5))
    ended.set()
    killer.join()
    here.server.released.set()
    assert [row.verdict for row in rows] == ["error", "fails", "loads", "skipped", "error"], [r.because for r in rows]
    assert "its process was killed 3 times" in rows[4].because
    assert asked(here)["wrong"] == local.TRIES and asked(here)["loads"] == 1


def test_a_bug_in_one_model_is_its_error(tmp_path: Path) -> None:
    broken = task.Task("a/b", 5, "0.32.0", False, tmp_path)  # type: ignore[arg-type]  # an address that is none
    ((_, line),) = local.run_on_processes([broken], jobs=1, rate=1e5)
    assert line is not None and "the worker failed (" in json.loads(line)["error"]["message"]


# The Hub's limits


def test_a_429_makes_every_worker_wait(hub: Hub, org: str, tmp_path: Path) -> None:
    hub.server.quota = (12, 1.0)
    done = fleet(hub, org, tmp_path / "out.jsonl")
    refused, seen = hub.server.refused, sum(s.origin == "hub" for s in hub.server.seen)
    assert done.out.startswith("5 models: 1 error, 1 fails, 1 wrong, 1 loads, 1 skipped"), done
    assert "HTTP 429" not in (tmp_path / "out.jsonl").read_text()
    assert 0 < refused < seen / 2


def test_a_long_wait_that_the_hub_asks_for_is_kept(hub: Hub, org: str, tmp_path: Path) -> None:
    fault = hub.server.fault(429, f"/api/models/{org}/", origin="hub", times=1, headers={"Retry-After": "100"})
    command = [sys.executable, "-m", "bnbfix", "fleet", "scan", "--org", org, "--output", str(tmp_path / "out.jsonl")]
    driver = subprocess.Popen([*command, *FAST], env=hub.environment, stderr=subprocess.DEVNULL)
    while fault.times:
        time.sleep(0.05)
    time.sleep(1)
    before = len(hub.server.seen)
    time.sleep(1)
    assert len(hub.server.seen) == before and driver.poll() is None  # everybody waits
    driver.terminate()
    driver.wait(60)


def test_turns_are_given_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    clock = pace.Clock(4)
    assert [clock.reserve() for _ in range(4)] == [0, 0.25, 0.5, 0.75]
    now[0] += 10
    assert clock.reserve() == 0
    clock.pause(30)
    clock.pause(2)
    assert clock.reserve() == 30
    assert clock.reserve() == 30.25
    clock.pause(1e9)
    assert clock.reserve() == pace.LONGEST_WAIT


def test_the_rate_is_that_of_all_workers_together(hub: Hub, org: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    hub.process("fleet", "scan", "--org", org, "--output", tmp_path / "out.jsonl", "--rate", "20", "--jobs", "2")
    requests = sum(s.origin == "hub" for s in hub.server.seen) - 3  # the pages of the listing
    assert time.monotonic() - begin > (requests - 1) / 20


# What makes no sense


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Give --from FILE or --org ORG."),
        (("--from", "/nowhere"), "--from cannot be read"),
        (("--org", "nobody"), "nobody: has no models on the Hub, or none that this token may see"),
        (("--org", "x", "--rate", "0"), "--rate is 0, not a positive number"),
        (("--org", "x", "--baseline", "/nowhere"), "/nowhere: cannot be read"),
        (("--org", "x", "--vllm", "0.1"), "'0.1' is not a vLLM release"),
        (("--org", "x", "--output", "x.html"), "--output is JSON Lines"),
    ],
)
def test_what_makes_no_sense_is_said(hub: Hub, arguments: tuple[str, ...], words: str) -> None:
    done = hub.run("fleet", "scan", *arguments)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err


def test_another_file_is_not_taken_for_results(hub: Hub, org: str, tmp_path: Path) -> None:
    for text in ("notes", '{"a": 1}\n', "[]\n{}\n"):
        (tmp_path / "notes").write_text(text)
        done = fleet(hub, org, tmp_path / "notes")
        assert done.code == 2 and "notes: line 1 is not a result of `bnbfix fleet`" in done.err
        assert (tmp_path / "notes").read_text() == text


def test_two_drivers_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = Results(tmp_path / "out.jsonl", "scan")
    with pytest.raises(UsageError, match="another fleet is writing to it"):
        Results(tmp_path / "out.jsonl", "scan")
    first.close()
    Results(tmp_path / "out.jsonl", "scan").close()


# The words of a fleet, and its file


def test_a_fleet_without_findings_proposes_no_repair(run: Cli, pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{pristine('e4b', 'all')}\n")
    done = run("fleet", "scan", "--from", tmp_path / "list", "--output", tmp_path / "out.jsonl", "--vllm", "0.32.0")
    assert (done.code, done.err) == (0, "") and done.out.startswith("1 model: 1 loads, for vLLM 0.32.0. Written: ")
    assert done.commands == []


def test_a_quiet_fleet_prints_warnings_only(run: Cli, pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{pristine('dense31b', 'partial', shards=2)}\n")
    common = ("--from", tmp_path / "list", "--output", tmp_path / "out.jsonl", "--vllm", "0.99.0")
    done = run("fleet", "scan", *common, "--quiet")
    assert (done.code, done.out) == (1, "") and done.err.startswith("warning: ") and "0.99.0" in done.err
    assert len(lines(tmp_path / "out.jsonl")) == 1 and (tmp_path / "out.html").exists()


def test_results_are_not_written_to_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written \(Is a directory\)"):
        Results(tmp_path, "scan")


def test_results_that_may_not_grow_are_an_error_and_keep_what_they_have(tmp_path: Path) -> None:
    described = task.Task("a/b", "a/b", "0.32.0", False, tmp_path)
    line = task.describe_loss(described, "x" * 20_000)
    results = Results(tmp_path / "out.jsonl", "scan")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match=r"out\.jsonl: cannot be written \(File too large\)"):
            results.add(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert results.rows == {}


def test_an_error_of_the_system_is_the_models_own(tmp_path: Path, pristine: Make) -> None:
    folder = Path(shutil.copytree(pristine("e4b", "all"), tmp_path / "model"))
    described, held = task.Task("m", str(folder), "0.32.0", False, tmp_path), []
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        line = task.run_task(described, pace.Clock(1e5))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
        for fd in held:
            os.close(fd)
    assert line is not None
    error = json.loads(line)["error"]
    assert (error["kind"], error["exit_code"]) == ("InputError", 2) and "Too many open files" in error["message"]
