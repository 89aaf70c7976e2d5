"""bitsandbytes' CPU kernels, called straight in its shared library.

Importing torch and bitsandbytes to reach the same functions takes seconds of processor time and 300 MB, more than
most repairs take for everything else. A C function cannot be asked for its arguments, so the library is called only
in releases whose signatures were read; whoever gets None from `library` takes the way through Python.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The releases whose csrc/pythonInterface.cpp has
#   cdequantize_blockwise_cpu_{nf4,fp4}_{bf16,fp16,fp32}(packed, absmax, out, blocksize, rows, columns)
#   cdequantize_blockwise_cpu_fp32(code, quantized, absmax, out, blocksize, n)
# with pointers first and 64-bit integers after them.
RELEASES = ("0.49.0", "0.49.1", "0.49.2", "0.50.0", "0.50.1", "0.50.2")
SUFFIX = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes for each value
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_longlong


@dataclass(frozen=True)
class Library:
    """The loaded library. What it is given must have been checked: it reads and writes past what is too short."""

    calls: ctypes.CDLL

    def use_threads(self, count: int) -> None:
        """How many threads calls made on this thread use; torch, imported later, shares the setting (OpenMP's)."""
        self.calls.omp_set_num_threads(ctypes.c_int(count))

    def scales(
        self, absmax: NDArray[np.uint8], nested_absmax: bytes, quant_map: bytes, blocksize: int, offset: float
    ) -> NDArray[np.float32]:
        """Undoes double quantization: U8 [blocks], F32 [ceil(blocks / blocksize)] and F32 [256] to F32 [blocks]."""
        outer, table = np.frombuffer(nested_absmax, "<f4"), np.frombuffer(quant_map, "<f4")
        out = np.empty(len(absmax), "<f4")
        call = self.calls.cdequantize_blockwise_cpu_fp32
        call.argtypes, call.restype = [POINTER] * 4 + [INTEGER] * 2, None
        call(*(a.ctypes.data for a in (table, absmax, outer, out)), blocksize, len(absmax))
        return out + np.float32(offset)

    def decode(
        self, packed: bytes | bytearray, absmax: NDArray[np.float32], size: int, quant_type: str, dtype: str
    ) -> NDArray[np.uint8]:
        """Rows of one block of `size` values each, as raw bytes in `dtype`: U8 [rows * size / 2], F32 [rows]."""
        raw = np.frombuffer(packed, "u1")
        out = np.empty(len(absmax) * size * WIDTH[dtype], "u1")
        call = self.calls[f"cdequantize_blockwise_cpu_{quant_type}_{SUFFIX[dtype]}"]
        call.argtypes, call.restype = [POINTER] * 3 + [INTEGER] * 3, None
        call(raw.ctypes.data, absmax.ctypes.data, out.ctypes.data, size, len(absmax), size)
        return out


@cache
def library() -> Library | None:
    """bitsandbytes' library for the CPU; None where it is another release, another system, or cannot be loaded."""
    try:
        if not sys.platform.startswith("linux") or version("bitsandbytes") not in RELEASES:
            return None
    except PackageNotFoundError:
        return None
    path = _packaged("bitsandbytes", "libbitsandbytes_cpu.so")
    for openmp in (None, _packaged("torch", "lib", "libgomp.so.1")):  # the system's, or else the one torch brings
        try:
            if openmp is not None:
                ctypes.CDLL(str(openmp))
            return Library(ctypes.CDLL(str(path)))
        except OSError:
            continue
    return None


def _packaged(package: str, *parts: str) -> Path | None:
    """A file of an installed package, which is not imported."""
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places)), *parts) if places else None
