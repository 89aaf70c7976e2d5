"""The job scripts for fleets, with stand-ins for the schedulers that run what they are given on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bnbfix
from tests.support.build import Make
from tests.support.hub import Hub

ROOT = Path(bnbfix.__file__).parent.parent
# Runs the job's command here, with the volume's folder in the place of the mount.
HF = """#!{python}
import os, sys
arguments = sys.argv[1:]
at = arguments.index("python:3.12")
assert arguments[:2] == ["jobs", "run"] and arguments[arguments.index("--secrets") + 1] == "HF_TOKEN"
assert arguments[arguments.index("--volume") + 1] == "hf://buckets/acme/results:/results"
os.chdir(os.environ["CONTAINER"])
os.execvp("bash", [a.replace("/results", os.environ["BUCKET"]) for a in arguments[at + 1:]])
"""

# symmetric-run ends with `ray stop`, which stops every Ray of the machine; the test stops its own.
RAY = """#!{python}
import sys
from ray.scripts.scripts import main
sys.exit(main() if sys.argv[1:] != ["stop"] else 0)
"""


def stop_processes(folder: Path) -> None:
    """Ends what a test has started with a folder first in its PATH."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if f"\0PATH={folder}:".encode() in b"\0" + (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def org(hub: Hub, pristine: Make) -> str:
    name = f"org{time.monotonic_ns()}"
    hub.server.add(f"{name}/good", pristine("e4b", "all"))
    hub.server.add(f"{name}/bad", pristine("dense31b", "partial", shards=2))
    return name


def install(folder: Path, **programs: str) -> str:
    """A PATH with programs of these texts first; `bnbfix` is this one."""
    folder.mkdir()
    programs |= {"bnbfix": f'#!/bin/sh\nexec "{sys.executable}" -m bnbfix "$@"\n'}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"]))


def run(hub: Hub, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "examples" / script), *arguments]
    env = hub.environment | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_a_job_of_hugging_face(hub: Hub, org: str, tmp_path: Path) -> None:
    folders = {name: tmp_path / name.lower() for name in ("CONTAINER", "BUCKET")}
    for folder in folders.values():
        folder.mkdir()
    path = install(tmp_path / "bin", hf=HF.format(python=sys.executable), pip="#!/bin/sh\n")
    environment = {"PATH": path} | {name: str(folder) for name, folder in folders.items()}
    arguments = (org, "acme/results", "scan", "--vllm", "0.32.0", "--rate", "100000")
    done = run(hub, "fleet_hf_job.sh", *arguments, **environment)
    assert done.returncode == 1 and done.stdout.startswith("2 models: 1 wrong, 1 loads"), done
    assert {p.name for p in folders["BUCKET"].iterdir()} == {"fleet-scan.jsonl", "fleet-scan.html"}
    for path_ in folders["CONTAINER"].iterdir():
        path_.unlink()
    hub.server.reset()
    again = run(hub, "fleet_hf_job.sh", *arguments, **environment)
    assert (again.returncode, again.stdout) == (1, done.stdout)
    assert {s.path for s in hub.server.seen} == {"/api/models"}  # the bucket had the results


@pytest.mark.ray
def test_a_job_of_slurm(hub: Hub, org: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bnbfix[fleet]'")
    scheduler = {"scontrol": f"#!/bin/sh\necho {socket.gethostname()}\n", "srun": '#!/bin/sh\nexec "$@"\n'}
    ray = RAY.format(python=sys.executable)
    path = install(tmp_path / "bin", ray=ray, **scheduler)
    slurm = {"SLURM_JOB_NODELIST": "node", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "1"}
    output = tmp_path / "out.jsonl"
    arguments = ("scan", "--org", org, "--vllm", "0.32.0", "--output", str(output), "--disk", "1GB")
    try:
        done = run(hub, "fleet_slurm.sh", *arguments, PATH=path, **slurm)
    finally:
        stop_processes(tmp_path / "bin")
    assert "2 models: 1 wrong, 1 loads, for vLLM 0.32.0. Written: " in done.stdout, done
    assert [json.loads(line)["model"] for line in output.read_text().splitlines()] == [f"{org}/bad", f"{org}/good"]


@pytest.mark.parametrize("script", ["fleet_hf_job.sh", "fleet_slurm.sh"])
def test_a_job_script_has_a_dozen_lines(script: str) -> None:
    assert len((ROOT / "examples" / script).read_text().splitlines()) <= 15
