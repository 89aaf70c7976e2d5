#!/usr/bin/env python3
"""Repairs the same checkpoints in many environments, and compares the bytes.

    python tests/kernels/same_bytes.py [--quick]

What must not matter: the vector instructions that ATen, numpy and the C library choose, the number of cores and of
threads, `-O` and `-OO`, the locale, the umask, the user, and the order of Python's hashes. What bitsandbytes' own
library chooses cannot be set: run this on CPUs with and without AVX-512 and AMX, and compare the last lines.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import tiny_gemma4  # noqa: E402

CASES = (  # family, how it is quantized, options of the repair: each quantizes or dequantizes
    ("moe26b", "skip", ["--vllm", "0.32.0"]),
    ("dense31b", "partial", ["--vllm", "0.22.1"]),
    ("dense31b", "partial", ["--vllm", "0.22.1", "--partial-groups", "quantize"]),
    ("dense31b", "all", ["--vllm", "0.22.1", "--bf16"]),
)
NO_AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
NOBODY = "setpriv --reuid=65534 --clear-groups --inh-caps=-all,+dac_override --ambient-caps=-all,+dac_override"
ENVIRONMENTS: dict[str, tuple[dict[str, str], list[str], list[str]]] = {  # variables, options of Python, runner
    "as it is": ({}, [], []),
    "ATen default": ({"ATEN_CPU_CAPABILITY": "default"}, [], []),
    "ATen avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, [], []),
    "ATen avx512": ({"ATEN_CPU_CAPABILITY": "avx512"}, [], []),
    "numpy without AVX-512": ({"NPY_DISABLE_CPU_FEATURES": NO_AVX512}, [], []),
    "libc without AVX2": ({"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX512F,-FMA"}, [], []),
    "1 thread": ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, [], []),
    "16 threads": ({"OMP_NUM_THREADS": "16", "MKL_NUM_THREADS": "16"}, [], []),
    "1 core": ({}, [], ["taskset", "-c", "0"]),
    "-O": ({}, ["-O"], []),
    "-OO": ({}, ["-OO"], []),
    "C locale": ({"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, [], []),
    "umask 077": ({}, [], ["sh", "-c", 'umask 077; exec "$@"', "sh"]),
    "nobody": ({}, [], NOBODY.split()),
    "hash seed 0": ({"PYTHONHASHSEED": "0"}, [], []),
    "hash seed 1": ({"PYTHONHASHSEED": "1"}, [], []),
}
QUICK = ("as it is", "ATen default", "ATen avx2", "-OO", "C locale", "hash seed 1")


def digest(folder: Path) -> str:
    """The SHA-256 of every file's name and bytes."""
    out = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        out.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return out.hexdigest()


def repair(source: Path, out: Path, options: list[str], environment: str) -> str:
    """The digest of a repair, or why there is none."""
    variables, python, runner = ENVIRONMENTS[environment]
    if (runner and shutil.which(runner[0]) is None) or (environment == "nobody" and os.geteuid()):
        return "cannot be run here"
    command = [*runner, sys.executable, *python, "-m", "bnbfix", "repair", str(source), "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([*command, "--device", "cpu", *options], env=env, capture_output=True, text=True, check=False)
    found = digest(out) if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-200:]}"
    shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the environments that found something so far")
    names = QUICK if parser.parse_args().quick else tuple(ENVIRONMENTS)
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # noqa: S103  # for nobody
        for number, (family, quant, options) in enumerate(CASES):
            source = tiny_gemma4.make(Path(folder) / f"{number}-{family}-{quant}", family, quant, shards=2)
            found = {name: repair(source, Path(folder) / "out", options, name) for name in names}
            right = found["as it is"]
            for name, got in found.items():
                if got != right and got != "cannot be run here":
                    different += 1
                    print(f"{family} {quant} {' '.join(options)}: {name}: {got}, not {right}")
            ran = sum(got != "cannot be run here" for got in found.values())
            print(f"{family} {quant} {' '.join(options)}: {ran} environments, {right}", flush=True)
    print(f"{different} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
