"""bitsandbytes' CPU kernels, called directly in its shared library.

Importing torch and bitsandbytes to reach the same functions takes seconds of processor time and 300 MB, more than
everything else in most repairs. C functions do not describe their arguments, so the library is called only in releases
that were tested; for others `load_library` returns None, and torch is used.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.quant_state import WIDTH, QuantState

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Releases that decode correctly when called like this (csrc/pythonInterface.cpp):
#   cdequantize_blockwise_cpu_{nf4,fp4}_{bf16,fp16,fp32}(quantized, absmax, out, blocksize, rows, columns)
#   cdequantize_blockwise_cpu_fp32(code, quantized, absmax, out, blocksize, n)
# with pointers first, 64-bit integers after them. Add a release once tests/kernels/test_native.py passes with it.
RELEASES = ("0.50.0", "0.50.1", "0.50.2")
SUFFIX = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_longlong
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """The loaded library. Its input must have been checked: it reads and writes past the end of short buffers."""

    calls: ctypes.CDLL

    def use_threads(self, count: int) -> None:
        """Sets how many threads calls on this thread use; torch, if imported later, shares the setting (OpenMP's)."""
        self.calls.omp_set_num_threads(ctypes.c_int(count))

    def scales(
        self, state: QuantState, absmax: bytes, nested_absmax: bytes | None, quant_map: bytes | None
    ) -> NDArray[np.float32]:
        """The scale of every block, F32 [blocks], double quantization undone."""
        if state.nested is None:
            return np.frombuffer(absmax, "<f4")
        assert nested_absmax is not None and quant_map is not None  # by quant_state.check
        quantized, out = np.frombuffer(absmax, "u1"), np.empty(state.blocks, "<f4")
        outer, table = np.frombuffer(nested_absmax, "<f4"), np.frombuffer(quant_map, "<f4")
        call = self.calls.cdequantize_blockwise_cpu_fp32
        call.argtypes, call.restype = [POINTER] * 4 + [INTEGER] * 2, None
        call(*(a.ctypes.data for a in (table, quantized, outer, out)), state.nested.blocksize, state.blocks)
        return out + np.float32(state.nested.offset)

    def decoder(
        self, scales: NDArray[np.float32], state: QuantState, size: int
    ) -> Callable[[bytes, int, int], memoryview]:
        """A decoder of rows of one block of `size` values; `state.blocksize` is a multiple of `size`.

        It takes quantized rows, U8 [rows * size / 2], the number of the first row in the weight, and how many.
        """
        rows_scales = np.repeat(scales, state.blocksize // size)
        call = self.calls[f"cdequantize_blockwise_cpu_{state.quant_type}_{SUFFIX[state.dtype]}"]
        call.argtypes, call.restype = [POINTER] * 3 + [INTEGER] * 3, None

        def decode(quantized: bytes, first: int, rows: int) -> memoryview:
            raw, absmax = np.frombuffer(quantized, "u1"), rows_scales[first : first + rows]
            out = np.empty(rows * size * WIDTH[state.dtype], "u1")
            call(raw.ctypes.data, absmax.ctypes.data, out.ctypes.data, size, rows, size)
            return out.data

        return decode


def any_below(scales: NDArray[np.float32], limit: float) -> bool:
    """Is a scale nearer to zero than `limit`, and not zero?"""
    return bool(np.any((scales != 0) & (np.abs(scales) < limit)))


@cache
def load_library() -> Library | None:
    """bitsandbytes' library for the CPU; None for another release or system, or if it cannot be loaded."""
    try:
        release = version("bitsandbytes")
    except PackageNotFoundError:
        return None
    if not sys.platform.startswith("linux") or release not in RELEASES:
        logger.info("bitsandbytes %s on %s is called through torch", release, sys.platform)
        return None
    path, error = _packaged("bitsandbytes", "libbitsandbytes_cpu.so"), None
    for openmp in (None, _packaged("torch", "lib", "libgomp.so.1")):  # the system's, or else the one of torch
        try:
            if openmp is not None:
                ctypes.CDLL(str(openmp))
            library = Library(ctypes.CDLL(str(path)))
            logger.info("bitsandbytes %s is called directly, in %s", release, path)
            return library
        except OSError as e:
            error = e
    logger.info("bitsandbytes %s is called through torch: %s", release, error)
    return None


def _packaged(package: str, *parts: str) -> Path | None:
    """The path of a file in an installed package, without importing the package."""
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places)), *parts) if places else None
