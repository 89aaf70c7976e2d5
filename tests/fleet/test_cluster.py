"""A fleet on a local Ray cluster of several nodes, one of which is killed while it works."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.errors import UsageError
from bnbfix.fleet.cluster import Needs, check_needs
from tests.fleet.test_repair import TITLE
from tests.fleet.test_scan import asked, lines
from tests.support.build import Make
from tests.support.hub import Hub
from tests.support.hub_server import TOKEN

ROOT = Path(bnbfix.__file__).parent.parent
COUNT = 12  # models


class Cluster:
    """A head without CPUs, and two nodes with one each, in processes that see the tests' Hub."""

    def __init__(self, hub: Hub) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = hub.environment | {
            "PYTHONPATH": paths,
            "HF_TOKEN": TOKEN,
            "RAY_ENABLE_METRICS_COLLECTION": "0",
        }
        os.environ.update(self.environment)
        self.ray = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.ray.add_node(num_cpus=1, resources={"disk": 100}) for _ in range(2)]

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Starts a fleet on it."""
        command = [sys.executable, "-m", "bnbfix", "fleet", *map(str, arguments), "--ray", self.ray.address]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environment, text=True, **pipes)


@pytest.fixture(scope="module")
def cluster(_hub: Hub) -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bnbfix[fleet]'")
    before = dict(os.environ)
    made = Cluster(_hub)
    try:
        yield made
    finally:
        made.ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.ray
def test_a_node_that_is_killed_loses_nothing(cluster: Cluster, hub: Hub, pristine: Make, tmp_path: Path) -> None:
    org, sources = f"org{time.monotonic_ns()}", (pristine("dense31b", "partial", shards=2), pristine("e4b", "all"))
    for i in range(COUNT):
        hub.server.add(f"{org}/m{i:02}", sources[i % 2])
    output, common = tmp_path / "ray.jsonl", ("--org", org, "--vllm", "portable", "--rate", "100000")
    hub.server.fault("slow", f"files/{org}")
    driver = cluster.start("scan", *common, "--output", output, "--disk", "10GB")
    while not output.exists() or len(lines(output)) < 3:
        time.sleep(0.05)
    cluster.ray.remove_node(cluster.nodes.pop(), allow_graceful=False)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 1, (out, err)
    assert out.startswith(f"{COUNT} models: ")
    assert [d["model"] for d in lines(output)] == [f"{org}/m{i:02}" for i in range(COUNT)]
    again = asked(hub)
    assert all(again[f"m{i:02}"] >= 1 for i in range(COUNT)) and again.total() <= COUNT + 1  # only what was being done
    hub.server.reset()
    local = hub.process("fleet", "scan", *common, "--output", tmp_path / "local.jsonl", "--jobs", "1")
    assert local.code == 1
    assert output.read_text() == (tmp_path / "local.jsonl").read_text()
    cluster.nodes.append(cluster.ray.add_node(num_cpus=1, resources={"disk": 100}))


@pytest.mark.ray
def test_repairs_on_a_cluster(cluster: Cluster, hub: Hub, pristine: Make, tmp_path: Path) -> None:
    org = f"org{time.monotonic_ns()}"
    hub.server.add(f"{org}/shards", pristine("dense31b", "partial", shards=2))
    hub.server.add(f"{org}/config", pristine("dense31b", "skip"))
    common = ("--org", org, "--vllm", "0.32.0", "--output", tmp_path / "out.jsonl", "--memory", "1GB")
    for _ in range(2):
        out, err = cluster.start("repair", *common).communicate(timeout=300)
        assert out.startswith("2 models: 2 repaired, for vLLM 0.32.0."), (out, err)
    assert all(hub.server.repos[f"{org}/{m}"].pulls == [TITLE] for m in ("shards", "config"))


@pytest.mark.ray
def test_what_no_node_has_is_said(cluster: Cluster, hub: Hub, tmp_path: Path, pristine: Make) -> None:
    (tmp_path / "list").write_text(f"{pristine('e4b', 'all')}\n")
    common = ("scan", "--from", tmp_path / "list", "--output", tmp_path / "out.jsonl")
    _, err = cluster.start(*common, "--gpus", "1").communicate(timeout=120)
    assert err.startswith("error: no node of the cluster has what one model is given: 1 GPU\n")


@pytest.mark.ray
def test_an_address_without_a_cluster_is_said(hub: Hub, tmp_path: Path, pristine: Make) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bnbfix[fleet]'")
    (tmp_path / "list").write_text(f"{pristine('e4b', 'all')}\n")
    common = ("--from", tmp_path / "list", "--output", tmp_path / "out.jsonl")
    done = hub.process("fleet", "scan", *common, "--ray", "127.0.0.1:1")
    assert done.code == 2 and done.err.startswith("error: 127.0.0.1:1: no Ray cluster answers"), done


def test_without_ray_the_option_says_what_to_install(hub: Hub, tmp_path: Path, pristine: Make) -> None:
    (tmp_path / "list").write_text(f"{pristine('e4b', 'all')}\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "ray.py").write_text("raise ImportError")
    paths = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))
    common = ("--from", tmp_path / "list", "--output", tmp_path / "out.jsonl")
    done = hub.process("fleet", "scan", *common, "--ray", "auto", PYTHONPATH=paths)
    assert done.code == 2
    assert done.err.splitlines() == ["error: --ray needs Ray, which is not installed", "  pip install 'bnbfix[fleet]'"]


def test_needs_that_a_node_has_to_have_all_at_once() -> None:
    needs = Needs(2, 1, 1000, 50).resources()
    check_needs(needs, [{"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0, "memory": 1000.0, "disk": 50.0}])
    check_needs(Needs(1).resources(), [{"CPU": 1.0}])
    with pytest.raises(UsageError, match="is given: 50 disk") as caught:
        check_needs(needs, [{"CPU": 2.0, "GPU": 1.0, "memory": 1000.0}])
    assert "ray start --resources" in str(caught.value.hint)
    with pytest.raises(UsageError, match="is given: 2 CPU, 1 GPU"):
        check_needs(Needs(2, 1).resources(), [{"CPU": 2.0}, {"GPU": 1.0}])
