"""Workers on a Ray cluster. Ray starts again elsewhere what a lost node was doing."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import UsageError
from ..hub.pace import Clock
from .task import Lines, Task, describe_loss, run_task

TRIES = 3  # of a model whose worker or node is lost, after the first
WINDOW = 256  # tasks that Ray is given at a time
DISK = "disk"  # the custom resource, in GB: `ray start --resources='{"disk": 500}'`


@dataclass(frozen=True)
class Needs:
    """What one model takes of a node."""

    cpus: float = 1
    gpus: float = 0
    memory: int = 0  # bytes
    disk: float = 0  # GB

    def resources(self) -> dict[str, float]:
        """The same by Ray's names."""
        found = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory, DISK: self.disk}
        return {name: n for name, n in found.items() if n}


@dataclass(frozen=True)
class _RemotePace:
    """The pace that an actor keeps for every node."""

    actor: Any

    def reserve(self) -> float:
        import ray

        return float(ray.get(self.actor.reserve.remote()))

    def pause(self, seconds: float) -> None:
        import ray

        ray.get(self.actor.pause.remote(seconds))


def run_on_ray(tasks: Sequence[Task], *, address: str, needs: Needs, rate: float) -> Lines:
    """Yield each task with its line, as soon as it is done. Ending the iteration ends what runs.

    Raises:
        UsageError: Ray is not installed, there is no cluster at the address, or no node of it has what a model needs.
    """
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed", command="pip install 'bnbfix[fleet]'") from None
    _check_address(address)
    try:
        ray.init(address, namespace="bnbfix", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise _no_cluster(address, e) from None
    try:
        check_needs(needs.resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
        # The clock is on the driver's own node: if that is lost, so is the driver.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pace = _RemotePace(ray.remote(Clock).options(num_cpus=0, scheduling_strategy=here).remote(rate))
        remote = ray.remote(run_task).options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=needs.memory or None,
            resources={DISK: needs.disk} if needs.disk else None,
            max_retries=TRIES,
            scheduling_strategy="SPREAD",
        )
        queue, running = iter(tasks), dict[Any, Task]()
        while True:
            running |= {remote.remote(task, pace): task for task in islice(queue, WINDOW - len(running))}
            if not running:
                return
            for done in ray.wait(list(running))[0]:
                task = running.pop(done)
                try:
                    line = ray.get(done)
                except ray.exceptions.RayError as e:  # the task's own exception, or that its workers were lost
                    line = describe_loss(task, f"{type(e).__name__}: {str(e).strip().splitlines()[-1]}")
                yield task, line
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise UsageError where nothing listens: Ray would try again for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as e:
            raise _no_cluster(address, e) from None


def _no_cluster(address: str, error: Exception) -> UsageError:
    hint = "Start one with `ray start --head`, or name its address."
    return UsageError(f"no Ray cluster answers ({error})", where=address, hint=hint, command="ray status")


def check_needs(needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise UsageError where no node has what a model needs: Ray would wait for one for ever."""
    if any(all(node.get(name, 0) >= n for name, n in needs.items()) for node in nodes):
        return
    missing = [name for name, n in needs.items() if all(node.get(name, 0) < n for node in nodes)]
    what = ", ".join(f"{needs[name]:,.10g} {name}" for name in missing or needs)
    hint = "Ask for less."
    if DISK in missing:
        hint = """Nodes say what disk they have, in GB: ray start --resources='{"disk": 500}'"""
    raise UsageError(f"no node of the cluster has what one model is given: {what}", hint=hint)
