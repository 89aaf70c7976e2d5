#!/usr/bin/env python3
"""What fleets cost, against a Hub on this machine: seconds, requests, bytes and memory.

    python tests/benchmarks/fleet.py scan MODEL --count 1000             on processes of this machine, then resumed
    python tests/benchmarks/fleet.py ray MODEL --count 1000              then on a Ray cluster of 3 nodes, one killed
    python tests/benchmarks/fleet.py quota MODEL --count 100 --quota 300 the Hub refuses more requests than that in 5 s
    python tests/benchmarks/fleet.py repair MODEL --count 20             the driver is killed in the middle, and resumed

Every repo has the files of MODEL, a folder; make_31b.py makes one. Memory is the largest resident set of the driver,
and of a worker, sampled (Linux): in the first fifth of the models, and after that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.hub import Hub  # noqa: E402
from tests.support.hub_server import TOKEN, FakeHub  # noqa: E402

MANY = "1000000"  # requests a second: the server is ours


class Watch(threading.Thread):
    """Samples the memory of a driver and of its workers, and counts the lines of its results."""

    def __init__(self, driver: int, output: Path, count: int) -> None:
        super().__init__(daemon=True)
        self.driver, self.output, self.count = driver, output, count
        self.early, self.late = Counter[str](), Counter[str]()

    def run(self) -> None:
        while (mine := resident(self.driver)) is not None:
            done = self.output.read_bytes().count(b"\n") if self.output.exists() else 0
            peaks = self.early if done < self.count / 5 else self.late
            peaks["driver"] = max(peaks["driver"], mine)
            peaks["worker"] = max([peaks["worker"], *(resident(p) or 0 for p in children(self.driver))])
            time.sleep(0.5)

    def __str__(self) -> str:
        parts = (f"{who} {self.early[who] >> 20} MB, then {self.late[who] >> 20} MB" for who in ("driver", "worker"))
        return "memory: " + "; ".join(parts)


def resident(pid: int) -> int | None:
    """The bytes that a process holds; None when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") or None
    except (OSError, IndexError):
        return None


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def start(hub: Hub, what: str, output: Path, *more: str) -> subprocess.Popen[str]:
    """Starts a fleet."""
    command = [sys.executable, "-m", "bnbfix", "fleet", what, "--org", "acme", "--output", str(output), *more]
    environment = hub.environment | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)


def finish(hub: Hub, driver: subprocess.Popen[str], output: Path, count: int) -> None:
    """Waits for a fleet, and prints what it cost."""
    watch, begin = Watch(driver.pid, output, count), time.perf_counter()
    watch.start()
    out, _ = driver.communicate()
    seconds, seen = time.perf_counter() - begin, hub.server.seen
    origins = Counter(s.origin for s in seen)
    listing = sum(s.path == "/api/models" for s in seen)
    print(out.splitlines()[0])
    print(f"{seconds:.1f} s, {seconds / count * 1000:.0f} ms a model; {watch}")
    hub_requests, cdn_requests = (origins["hub"] - listing) / count, origins["cdn"] / count
    print(f"of a model: {hub_requests:.2f} requests to the Hub, {cdn_requests:.2f} to the CDN, ", end="")
    print(f"{hub.server.sent / count / 1e6:.3f} MB of files; {listing} requests for the listing", flush=True)


def scan(hub: Hub, count: int, folder: Path, jobs: str) -> None:
    """On processes, then resumed."""
    output = folder / "local.jsonl"
    for _ in range(2):
        hub.server.reset()
        finish(hub, start(hub, "scan", output, "--rate", MANY, "--jobs", jobs), output, count)
    print(f"results: {output.stat().st_size / 1e6:.1f} MB, page: {(folder / 'local.html').stat().st_size / 1e6:.2f} MB")


def ray(hub: Hub, count: int, folder: Path, jobs: str) -> None:
    """On processes, and on a cluster of which a node is killed: the same results."""
    from ray.cluster_utils import Cluster

    scan(hub, count, folder, jobs)
    local, output = folder / "local.jsonl", folder / "ray.jsonl"
    os.environ.update(hub.environment | {"PYTHONPATH": str(ROOT)})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    hub.server.reset()
    driver = start(hub, "scan", output, "--rate", MANY, "--ray", cluster.address)

    def kill_node() -> None:
        while not output.exists() or output.read_bytes().count(b"\n") < count / 4:
            time.sleep(0.2)
        cluster.remove_node(nodes[0], allow_graceful=False)
        print("killed a node")

    threading.Thread(target=kill_node, daemon=True).start()
    finish(hub, driver, output, count)
    asked = Counter(s.path for s in hub.server.seen if s.path.count("/") == 4 and s.path.startswith("/api/models/"))
    print(f"models begun more than once: {sum(n > 1 for n in asked.values())}")
    lines = output.read_text().splitlines()
    print(f"{len(lines)} lines, {len({json.loads(line)['model'] for line in lines})} models")
    print("the same bytes as on processes:", output.read_bytes() == local.read_bytes())
    cluster.shutdown()


def quota(hub: Hub, count: int, folder: Path, jobs: str, allowed: int) -> None:
    """As fast as it can against a Hub that refuses; then at a rate that it accepts."""
    for rate in (MANY, str(allowed / 5 * 0.9)):
        output = folder / f"{rate}.jsonl"
        hub.server.reset()
        hub.server.quota = allowed, 5.0
        finish(hub, start(hub, "scan", output, "--rate", rate, "--jobs", jobs), output, count)
        print(f"--rate {rate}: {hub.server.refused} refused of {sum(s.origin == 'hub' for s in hub.server.seen)}")


def repair(hub: Hub, count: int, folder: Path) -> None:
    """A driver that is killed after 7 pull requests, and another that goes on."""
    output = folder / "repair.jsonl"
    driver = start(hub, "repair", output, "--vllm", "0.32.0", "--rate", MANY)
    while sum(len(r.pulls) for r in hub.server.repos.values()) < 7:
        time.sleep(0.002)
    driver.kill()
    driver.wait()
    written = output.read_bytes().count(b"\n")
    print(f"killed: {sum(len(r.pulls) for r in hub.server.repos.values())} pull requests, {written} results")
    hub.server.reset()
    finish(hub, start(hub, "repair", output, "--vllm", "0.32.0", "--rate", MANY), output, count)
    print("repos by number of pull requests:", dict(Counter(len(r.pulls) for r in hub.server.repos.values())))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scan", "ray", "quota", "repair"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--quota", type=int, default=300)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "uploads").mkdir()
        server = FakeHub(Path(folder) / "uploads")
        hub = Hub(server, Path(folder) / "home", None)  # type: ignore[arg-type]  # no client
        server.page = 1000
        for i in range(a.count):
            server.add(f"acme/model-{i:04}", a.model)
        if a.what == "repair":
            repair(hub, a.count, Path(folder))
        elif a.what == "quota":
            quota(hub, a.count, Path(folder), a.jobs, a.quota)
        else:
            (scan if a.what == "scan" else ray)(hub, a.count, Path(folder), a.jobs)
        server.stop()


if __name__ == "__main__":
    main()
