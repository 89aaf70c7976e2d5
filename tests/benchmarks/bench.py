#!/usr/bin/env python3
"""Times repairs and scans against what moving the bytes costs, the sides interleaved in one run.

    python tests/benchmarks/bench.py repair MODEL      against `cp -r` of the output and `sync`
    python tests/benchmarks/bench.py hardlink MODEL    against `cp` of only the changed shards and `sync`
    python tests/benchmarks/bench.py bf16 MODEL        against cp and sync of the output, and the kernel by itself
    python tests/benchmarks/bench.py hand MODEL        against load_file, dequantize_4bit, save_file, a shard at a time
    python tests/benchmarks/bench.py gpu MODEL         --bf16 on the CPU against the first CUDA device
    python tests/benchmarks/bench.py scan MODEL        of a folder, from the shell

MODEL is a folder that make_model.py made with --towers. Every side runs --rounds times; medians and ratios are
printed. Before each side starts, the output of the one before is removed, what it will read is read once, so that
every side finds its input in memory, and the disk is synced.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RELEASE = "0.22.1"  # keeps the towers in full precision
BUFFER = bytearray(1 << 20)

Side = tuple[list[str], Path]  # a command, and the folder that it reads


def run(command: list[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak RSS in MB) of a command and its children, the sync of the disk included."""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def warm(folder: Path) -> None:
    """Reads every file of a folder."""
    for path in filter(Path.is_file, folder.iterdir()):
        with path.open("rb", buffering=0) as f:
            while f.readinto(BUFFER):
                pass


def interleaved(sides: Mapping[str, Side], rounds: int, clean: Callable[[], None]) -> dict[str, list[float]]:
    """Medians of (wall, CPU, RSS) for each side; the spread of the walls is printed.

    Each round has an order of its own: who follows the removal of a large output finds more memory at hand, and in a
    virtual machine, whose host must first give it, that is worth a second for every few GB.
    """
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    order = random.Random(rounds)
    for _ in range(rounds):
        for name in order.sample(list(sides), len(sides)):
            command, folder = sides[name]
            clean()
            warm(folder)
            seen[name].append(run(command))
    clean()
    for name, rows in seen.items():
        print(f"{name:32} wall {' '.join(f'{w:6.2f}' for w, _, _ in rows)} s")
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seen.items()}


def show(medians: Mapping[str, list[float]], base: str) -> None:
    """A row for each side, with the ratio of its wall time to that of `base`."""
    print(f"\n{'':32} {'wall s':>8} {'CPU s':>8} {'RSS MB':>8} {'ratio':>7}")
    for name, (wall, cpu, rss) in medians.items():
        print(f"{name:32} {wall:8.2f} {cpu:8.2f} {rss:8.0f} {wall / medians[base][0]:7.2f}")


def bnbfix(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bnbfix", *map(str, arguments)]


def repair(model: Path, scratch: Path, rounds: int, *options: str) -> None:
    """A repair against cp -r of its output."""
    kept, out = scratch / "kept", scratch / "out"
    subprocess.run(bnbfix("repair", model, "--out", kept, "--vllm", RELEASE, "--overwrite", *options), check=True)
    sides = {
        "cp -r of the output, sync": (["cp", "-r", str(kept), str(out)], kept),
        "bnbfix repair " + " ".join(options): (
            bnbfix("repair", model, "--out", out, "--vllm", RELEASE, *options),
            model,
        ),
    }
    if "--bf16" in options:
        sides["the kernel by itself, 1 thread"] = (
            [sys.executable, str(HERE / "kernel_by_itself.py"), str(model)],
            model,
        )
    show(interleaved(sides, rounds, lambda: shutil.rmtree(out, ignore_errors=True)), "cp -r of the output, sync")
    shutil.rmtree(kept)


def hardlink(model: Path, scratch: Path, rounds: int) -> None:
    """A repair that links untouched shards, against cp of the others, and of all."""
    kept, out = scratch / "kept", scratch / "out"
    command = bnbfix("repair", model, "--out", kept, "--vllm", RELEASE, "--overwrite", "--hardlink")
    subprocess.run(command, check=True)
    changed = [str(f) for f in kept.iterdir() if f.stat().st_nlink == 1]
    copy = 'mkdir "$1" && cp "${@:2}" "$1"'
    base = "cp of the changed files, sync"
    sides = {
        base: (["bash", "-c", copy, "cp", str(out), *changed], kept),
        "bnbfix repair --hardlink": (bnbfix("repair", model, "--out", out, "--vllm", RELEASE, "--hardlink"), model),
        "cp -r of the whole output, sync": (["cp", "-r", str(kept), str(out)], kept),
    }
    show(interleaved(sides, rounds, lambda: shutil.rmtree(out, ignore_errors=True)), base)
    shutil.rmtree(kept)


def hand(model: Path, scratch: Path, rounds: int) -> None:
    """--bf16 against the script that one would write by hand."""
    out = scratch / "out"
    sides = {
        "by hand": ([sys.executable, str(HERE / "by_hand.py"), str(model), str(out)], model),
        "bnbfix repair --bf16": (bnbfix("repair", model, "--out", out, "--vllm", RELEASE, "--bf16"), model),
    }
    show(interleaved(sides, rounds, lambda: shutil.rmtree(out, ignore_errors=True)), "by hand")


def gpu(model: Path, scratch: Path, rounds: int) -> None:
    """--bf16 on the CPU against the first CUDA device, whose output must be the same; and the kernel by itself."""
    outs = {device: scratch / device for device in ("cpu", "cuda")}
    repairs = {
        f"bnbfix repair --bf16 --device {d}": bnbfix(
            "repair", model, "--out", out, "--vllm", RELEASE, "--bf16", "--device", d
        )
        for d, out in outs.items()
    }
    kernel = [sys.executable, str(HERE / "kernel_by_itself.py"), str(model)]
    commands = repairs | {f"the kernel by itself, {d}": [*kernel, d] for d in outs}

    def clean() -> None:
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)

    sides = {name: (command, model) for name, command in commands.items()}
    show(interleaved(sides, rounds, clean), next(iter(repairs)))
    for command in repairs.values():
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    subprocess.run(["diff", "-r", *map(str, outs.values())], check=True)
    print("\nboth outputs are the same, byte for byte")
    clean()


def scan(model: Path, rounds: int) -> None:
    """A scan from the shell, and only the interpreter."""
    sides = {
        "python -c pass": ([sys.executable, "-c", "pass"], HERE),
        "bnbfix scan": (bnbfix("scan", model, "--vllm", RELEASE, "--exit-zero"), HERE),  # 19 GB of holes are not read
    }
    show(interleaved(sides, rounds, lambda: None), "bnbfix scan")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["repair", "hardlink", "bf16", "hand", "gpu", "scan"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, help="where outputs go; default: next to MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    scratch = a.scratch or a.model.parent / "bench-scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    size = sum(f.stat().st_size for f in a.model.iterdir())
    print(f"{a.case}: {a.model}, {size / 1e9:.2f} GB, {os.cpu_count()} cores\n")
    if a.case == "scan":
        scan(a.model, a.rounds)
    elif a.case == "hardlink":
        hardlink(a.model, scratch, a.rounds)
    elif a.case == "gpu":
        gpu(a.model, scratch, a.rounds)
    elif a.case == "hand":
        hand(a.model, scratch, a.rounds)
    else:
        repair(a.model, scratch, a.rounds, *(["--bf16"] if a.case == "bf16" else []))


if __name__ == "__main__":
    main()
