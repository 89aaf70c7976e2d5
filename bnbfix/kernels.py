"""bitsandbytes kernels, chunk by chunk, on the CPU or on CUDA. The only module that imports torch and bitsandbytes."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .quant_state import QuantState

if TYPE_CHECKING:
    import torch

SUBNORMAL = 2.0**-118  # a block of this scale may hold numbers below bfloat16's normal ones (2**-126)


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight: checked state, statistics as raw bytes, and packed bytes read by (offset, length)."""

    state: QuantState
    read: Callable[[int, int], bytes]
    absmax: bytes  # F32 [blocks], or U8 [blocks] with double quantization
    nested_absmax: bytes | None  # F32 [ceil(blocks / nested blocksize)]
    nested_quant_map: bytes | None  # F32 [256]


def choose_device(request: str, cuda_count: int) -> str:
    """The torch device that a request means on a machine with this many CUDA devices.

    "auto" takes the first CUDA device where there is one. Raises UsageError for a device that is not there.
    """
    if request == "auto":
        return "cuda:0" if cuda_count else "cpu"
    if request == "cpu":
        return "cpu"
    m = re.fullmatch(r"cuda(?::(\d+))?", request)
    if m is None:
        raise UsageError(f"--device {request!r} is none of auto, cpu, cuda, cuda:N")
    number = int(m[1] or 0)
    if number >= cuda_count:
        there = f"{cuda_count} CUDA device{'s' if cuda_count != 1 else ''}" if cuda_count else "no CUDA device"
        raise UsageError(f"--device {request}: torch sees {there}", hint="Use --device cpu; the result is the same.")
    return f"cuda:{number}"


def resolve_device(request: str) -> str:
    """`choose_device` with what torch sees here. "cpu" is answered without importing torch."""
    if request == "cpu":
        return "cpu"
    import torch

    return choose_device(request, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def dequantize(packed: PackedTensor, device: str, chunk_bytes: int = 4 << 20) -> Iterator[memoryview]:
    """Yields the weight's values in `state.dtype`, little-endian and in order, at most about `chunk_bytes` at a time.

    The kernel sees every chunk as rows of one block each. Blocks run over the flat tensor, but the CPU kernel of
    bitsandbytes 0.50 (csrc/cpu_ops.cpp, `dequantizeBlockwise4bitCpu`, AVX-512) counts them by row, and so decodes a
    weight whose columns are no multiple of the blocksize wrongly; 31B's vision tower has such. With rows of one
    block both ways of counting are the same, and equal to the CUDA kernel.
    """
    import torch

    bnb = _bitsandbytes()
    state = packed.state
    dtype: torch.dtype = getattr(torch, state.dtype)
    absmax = _absmax(packed, device)
    code = bnb.get_4bit_type(state.quant_type, device=device)
    # AVX512-BF16 flushes subnormal numbers to zero, CUDA and other CPUs do not; torch's own rounding keeps them.
    tiny = state.dtype == "bfloat16" and bool(((absmax != 0) & (absmax.abs() < SUBNORMAL)).any())
    inner = torch.float32 if tiny else dtype

    def kernel(raw: memoryview, first: int, shape: tuple[int, int]) -> memoryview:
        column = torch.frombuffer(raw, dtype=torch.uint8).to(device).view(-1, 1)
        part = bnb.QuantState(
            absmax=absmax[first : first + -(-shape[0] * shape[1] // state.blocksize)].contiguous(),
            shape=torch.Size(shape), code=code, blocksize=state.blocksize, quant_type=state.quant_type, dtype=inner,
        )  # fmt: skip
        with _exact():
            out: torch.Tensor = bnb.dequantize_4bit(column, part).reshape(-1).to(dtype)
        if state.quant_type == "fp4":
            out = _fp4_zeros(out, column, part.absmax, shape[1])
        return memoryview(out.contiguous().view(torch.uint8).cpu().numpy().data)

    size = state.blocksize
    step = max(1, chunk_bytes // (size * dtype.itemsize))
    for first in range(0, state.blocks, step):
        begin, end = first * size, min((first + step) * size, state.numel)
        raw = memoryview(bytearray(packed.read(begin // 2, (end - begin + 1) // 2)))
        rows, tail = divmod(end - begin, size)
        if rows:
            yield kernel(raw[: rows * size // 2], first, (rows, size))
        if tail:
            yield kernel(raw[rows * size // 2 :], first + rows, (1, tail))


@dataclass(frozen=True)
class Quantized:
    """A weight quantized to NF4, as raw bytes: U8 [ceil(n / 2)], and its statistics as bitsandbytes lays them out."""

    weight: bytes
    absmax: bytes  # F32 [blocks], or U8 [blocks] with double quantization
    quant_map: bytes  # F32 [16]
    nested_absmax: bytes | None
    nested_quant_map: bytes | None
    offset: float | None


def quantize(
    values: Iterable[bytes | memoryview], dtype: str, device: str, *, blocksize: int, nested_blocksize: int | None
) -> Quantized:
    """Quantizes raw little-endian values in `dtype` to NF4; all chunks but the last hold whole blocks.

    Equal to `bitsandbytes.functional.quantize_4bit` on the whole tensor. Memory: a chunk, and the result.
    """
    import torch

    bnb = _bitsandbytes()
    kind: torch.dtype = getattr(torch, dtype)
    packed, scales = bytearray(), []
    with _exact():
        for chunk in values:
            part = torch.frombuffer(bytearray(chunk), dtype=kind).to(device)
            q, state = bnb.quantize_4bit(part, blocksize=blocksize, compress_statistics=False, quant_type="nf4")
            packed += _raw(q)
            scales.append(state.absmax.float())
        absmax = torch.cat(scales)
        quant_map = _raw(bnb.get_4bit_type("nf4", device="cpu"))
        if nested_blocksize is None:
            return Quantized(bytes(packed), _raw(absmax), quant_map, None, None, None)
        offset = absmax.mean()
        inner, nested = bnb.quantize_blockwise(absmax - offset, blocksize=nested_blocksize)
        return Quantized(
            bytes(packed), _raw(inner), quant_map, _raw(nested.absmax.float()), _raw(nested.code.float()), offset.item()
        )


@contextmanager
def _exact() -> Iterator[None]:
    """What surrounds every kernel: no compiler, and tables in float32.

    bitsandbytes compiles its generic fallback (odd sizes, large blocks), which would need a C++ compiler here; and it
    makes its code tables in torch's default dtype, which vLLM for one sets to bfloat16.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_default_dtype(before)


def _raw(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)


def dequantize_int8(
    read: Callable[[int, int], bytes], shape: tuple[int, int], scales: bytes, dtype: str, chunk_bytes: int = 4 << 20
) -> Iterator[memoryview]:
    """Yields an LLM.int8 weight's values in `dtype`, row chunks in order: I8 [out, in] by its scales F32 [out] / 127.

    The arithmetic is `bitsandbytes.functional.int8_vectorwise_dequant`'s.
    """
    import torch

    bnb = _bitsandbytes()
    kind: torch.dtype = getattr(torch, dtype)
    rows, columns = shape
    stats = torch.frombuffer(bytearray(scales), dtype=torch.float32)
    step = max(1, chunk_bytes // (columns * 4))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        raw = torch.frombuffer(bytearray(read(first * columns, count * columns)), dtype=torch.int8)
        values: torch.Tensor = bnb.int8_vectorwise_dequant(raw.view(count, columns), stats[first : first + count])
        yield memoryview(values.to(kind).reshape(-1).view(torch.uint8).numpy().data)


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes.functional, imported without the detour that fetches native code from the Hub.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 asks the `kernels` package for a gemm as it is imported
    (backends/cpu/ops.py), which downloads and loads it, or warns. Nothing here multiplies matrices.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, absent = log.level, "kernels" not in sys.modules
    log.setLevel(logging.ERROR)
    if absent:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # the import system's mark for "not to be had"
    try:
        return import_module("bitsandbytes.functional")
    finally:
        log.setLevel(level)
        if absent:
            del sys.modules["kernels"]


def _fp4_zeros(values: torch.Tensor, column: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    """Makes FP4 code 8 plus zero times the block's scale, as the table has it.

    bitsandbytes' AVX-512 kernel does that; its scalar kernel, which takes the rest of a row too, and its CUDA kernel
    take minus zero.
    """
    import torch

    codes = torch.cat([column >> 4, column & 15], dim=1).reshape(-1)[: values.numel()]
    zeros = (scales * 0).to(values.dtype).repeat_interleave(size)
    return torch.where((codes == 8) & (values == 0), zeros, values)


def _absmax(packed: PackedTensor, device: str) -> torch.Tensor:
    """The scale of every block in float32, F32 [blocks], double quantization undone."""
    import torch

    bnb = _bitsandbytes()
    nested = packed.state.nested
    if nested is None:
        return torch.frombuffer(bytearray(packed.absmax), dtype=torch.float32).to(device)
    assert packed.nested_absmax is not None and packed.nested_quant_map is not None  # quant_state.check saw to it
    inner = bnb.QuantState(
        absmax=torch.frombuffer(bytearray(packed.nested_absmax), dtype=torch.float32).to(device),
        code=torch.frombuffer(bytearray(packed.nested_quant_map), dtype=torch.float32).to(device),
        blocksize=nested.blocksize,
        dtype=torch.float32,
    )
    quantized = torch.frombuffer(bytearray(packed.absmax), dtype=torch.uint8).to(device)
    # The offset stays float32 whatever torch's default dtype is: vLLM loads under bfloat16, which rounds it.
    offset = torch.tensor(nested.offset, dtype=torch.float32, device=device)
    values: torch.Tensor = bnb.dequantize_blockwise(quantized, inner)
    return values + offset
