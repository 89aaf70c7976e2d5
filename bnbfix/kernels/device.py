"""Which device the kernels run on."""

from __future__ import annotations

import os
import re
import sys

from ..errors import UsageError
from .packages import require_packages

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-ctrl-gpu", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, WSL
CPU_HINT = 'Use device="cpu" (--device cpu); the result is the same'


def choose_device(request: str, cuda_count: int) -> str:
    """The torch device that a request means on a machine with this many CUDA devices.

    "auto" takes the first CUDA device where there is one. Raises UsageError for a device that torch does not see.
    """
    if request == "auto":
        return "cuda:0" if cuda_count else "cpu"
    if request == "cpu":
        return "cpu"
    m = re.fullmatch(r"cuda(?::(\d+))?", request)
    if m is None:
        raise UsageError(f"device {request!r} is not one of auto, cpu, cuda, cuda:N")
    number = int(m[1] or 0)
    if number >= cuda_count:
        there = f"{cuda_count} CUDA device{'s' if cuda_count != 1 else ''}" if cuda_count else "no CUDA device"
        raise UsageError(f"device {request}: torch sees {there}", hint=f"{CPU_HINT}.")
    return f"cuda:{number}"


def resolve_device(request: str) -> str:
    """`choose_device` with the devices torch sees, if torch is needed.

    "auto" is the CPU where there is no GPU driver, and where bitsandbytes is called without torch: an H200 decodes 1.7
    times as fast as one such thread, which saves less time than importing torch costs.
    """
    if request == "cpu" or (request == "auto" and (not gpu_driver() or _needs_no_torch())):
        return "cpu"
    require_packages(f"device {request} takes torch", ["torch"])
    import torch

    return choose_device(request, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _needs_no_torch() -> bool:
    from . import native

    return native.load_library() is not None


def gpu_driver() -> bool:
    """Is a GPU possible? On Linux its driver shows as a device file; on other systems only torch knows."""
    return not sys.platform.startswith("linux") or any(os.path.exists(path) for path in GPU_DRIVERS)
