"""bitsandbytes kernels, chunk by chunk, on the CPU or on CUDA. No other module imports bitsandbytes."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import fsum
from typing import TYPE_CHECKING, Any

from ..checkpoint.quant_state import WIDTH, QuantState
from ..errors import QuantStateError, UsageError
from .device import CPU_HINT
from .threads import SharedContext, count_threads

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
# Decodes rows of one block each, from (quantized rows, number of the first row, number of rows), to their values.
Decode = Callable[[bytes, int, int], memoryview]
StartDecode = Callable[[bytes, int, int], Callable[[], memoryview]]  # a Decode in two steps: started, and waited for
SUBNORMAL = 2.0**-118  # a block of a smaller scale may hold numbers below the normal ones (2**-126)
KERNEL_BLOCK = 1024  # values in a row for the kernel, at most; larger blocks become several rows with the same scale
# FP4 has two zeros. Whether the second, code 8, becomes +0 or -0 depends on the kernel and on the shape; the first is
# +0 everywhere, as both are in bitsandbytes' table. So quantized bytes go through this table, which makes every 8 a 0.
FP4_ONE_ZERO = bytes((0 if b >> 4 == 8 else b & 0xF0) | (0 if b & 15 == 8 else b & 15) for b in range(256))


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight: checked state, statistics as raw bytes, and quantized bytes read by (offset, length)."""

    state: QuantState
    read: Callable[[int, int], bytes]
    absmax: bytes  # F32 [blocks], or U8 [blocks] with double quantization
    nested_absmax: bytes | None  # F32 [ceil(blocks / nested blocksize)]
    nested_quant_map: bytes | None  # F32 [256]


def use_threads(count: int) -> None:
    """Sets how many threads the kernels called on this thread use, at most; bitsandbytes shares torch's OpenMP."""
    from . import native

    count = count_threads(count)
    if (library := native.load_library()) is not None:
        library.use_threads(count)
    else:
        import torch

        torch.set_num_threads(count)


def dequantize(quantized: QuantizedTensor, device: str, chunk_bytes: int = 4 << 20) -> Iterator[memoryview]:
    """Yields the weight's values in `state.dtype`, little-endian and in order, at most `chunk_bytes` at a time.

    A chunk holds at least one block, and stays valid after the next is drawn. On CUDA the next one is being decoded
    while one is yielded. Raises QuantStateError when `read` returns too few bytes, since the kernel would read past the
    buffer, and UsageError when the GPU fails.

    The kernel gets only whole blocks, as rows of one block, of 1024 values at most, because on the CPU its result
    depends on the shape (bitsandbytes 0.50, csrc/cpu_ops.cpp and backends/cpu/ops.py):
    - With AVX-512, a weight whose columns are a multiple of 16 but not of the blocksize gets the scales of other
      blocks. 31B's vision tower has such columns: 4304.
    - With an odd last dimension, or AVX-512 and blocks of 2048 or more, a generic fallback runs, which torch compiles
      and whose table is made in torch's default dtype: under bfloat16, as in vLLM, that table is wrong.
    """
    with _gpu_errors(device):
        native = native_decoder(quantized) if device == "cpu" else None
        start = _deferred(native) if native is not None else _torch_decoder(quantized, device)
        yield from decode_chunks(quantized, start, chunk_bytes, ahead=0 if device == "cpu" else 1)


def decode_chunks(
    quantized: QuantizedTensor, start: StartDecode, chunk_bytes: int, *, ahead: int
) -> Iterator[memoryview]:
    """Decodes a weight by chunks, of which up to `ahead` are started before the one that is waited for."""
    state = quantized.state
    size, width = _row_size(state), WIDTH[state.dtype]
    step = max(1, chunk_bytes // (state.blocksize * width)) * state.blocksize
    started: deque[tuple[Callable[[], memoryview], int]] = deque()
    for begin in range(0, state.numel, step):
        count = min(step, state.numel - begin)
        rows = -(-count // size)
        raw = quantized.read(begin // 2, (count + 1) // 2)
        if len(raw) != (count + 1) // 2:
            raise QuantStateError(f"a read of {(count + 1) // 2:,} quantized bytes returned {len(raw):,}")
        if len(raw) != rows * size // 2:
            raw = raw.ljust(rows * size // 2, b"\0")  # to the end of the last block
        if state.quant_type == "fp4":
            raw = raw.translate(FP4_ONE_ZERO)
        started.append((start(raw, begin // size, rows), count * width))
        if len(started) > ahead:
            values, nbytes = started.popleft()
            yield values()[:nbytes]
    for values, nbytes in started:
        yield values()[:nbytes]


@contextmanager
def _gpu_errors(device: str) -> Iterator[None]:
    """Raises UsageError for torch's errors of a GPU: no memory left, no kernel for it, no library for its CUDA.

    torch has no type for a CPU without memory either: that is a MemoryError.
    """
    try:
        yield
    except RuntimeError as e:
        if device == "cpu" and "allocate memory" in str(e):
            raise MemoryError(str(e)) from e
        if device == "cpu":
            raise
        words = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UsageError(f"device {device}: {words}", hint=f"{CPU_HINT}. Or free the GPU's memory.") from e


def _row_size(state: QuantState) -> int:
    """Values in a row for the kernel."""
    return min(state.blocksize, KERNEL_BLOCK)


def _deferred(decode: Decode) -> StartDecode:
    """A decoder in two steps, of which the second does all the work."""

    def start(raw: bytes, first: int, rows: int) -> Callable[[], memoryview]:
        return lambda: decode(raw, first, rows)

    return start


def native_decoder(quantized: QuantizedTensor) -> Decode | None:
    """bitsandbytes' library without torch; None if it is not available or would flush small numbers to zero."""
    from . import native

    library, state = native.load_library(), quantized.state
    if library is None:
        return None
    scales = library.scales(state, quantized.absmax, quantized.nested_absmax, quantized.nested_quant_map)
    if native.any_below(scales, SUBNORMAL):
        logger.debug("a weight of shape %s has scales below %.1e: decoded through torch", state.shape, SUBNORMAL)
        return None
    return library.decoder(scales, state, _row_size(state))


def block_scales(quantized: QuantizedTensor) -> bytes:
    """The scale of every block, F32 [blocks], double quantization undone."""
    from . import native

    library, parts = native.load_library(), (quantized.absmax, quantized.nested_absmax, quantized.nested_quant_map)
    return library.scales(quantized.state, *parts).tobytes() if library else _raw(_absmax(quantized, "cpu"))


def _torch_decoder(quantized: QuantizedTensor, device: str) -> StartDecode:
    """The same kernel through torch, on the CPU or on CUDA."""
    import torch

    bnb = _bitsandbytes()
    state = quantized.state
    size = _row_size(state)
    dtype: torch.dtype = getattr(torch, state.dtype)
    absmax = _absmax(quantized, device)
    # Numbers below the normal ones are flushed to zero by AVX512-BF16 and by CUDA (--use_fast_math), in float32 too;
    # the CPU's float32 kernel and torch's own rounding keep them.
    inner = dtype
    if device == "cpu" and dtype is torch.float16:  # to which the CPU functions in builds for CUDA round wrongly (0.50)
        inner = torch.float32
    if bool(((absmax != 0) & (absmax.abs() < SUBNORMAL)).any()):
        device, inner, absmax = "cpu", torch.float32, _absmax(quantized, "cpu")
    absmax = absmax.repeat_interleave(state.blocksize // size)

    def kernel(column: torch.Tensor, first: int, rows: int) -> torch.Tensor:
        part = bnb.QuantState(
            absmax=absmax[first : first + rows],
            shape=torch.Size((rows, size)),
            blocksize=size,
            quant_type=state.quant_type,
            dtype=inner,
        )
        out: torch.Tensor = bnb.dequantize_4bit(column.view(-1, 1), part)
        return out.view(-1).to(dtype).view(torch.uint8)

    def decode(raw: bytes, first: int, rows: int) -> memoryview:
        return memoryview(kernel(torch.frombuffer(bytearray(raw), dtype=torch.uint8), first, rows).numpy().data)

    return _deferred(decode) if device == "cpu" else _stream_on_gpu(kernel, device)


def _stream_on_gpu(kernel: Callable[[torch.Tensor, int, int], torch.Tensor], device: str) -> StartDecode:
    """Moves chunks through pinned memory: one stream copies in and runs the kernel, another copies back meanwhile.

    Every chunk has its own buffers. torch's allocators reuse a buffer, without a call to CUDA, once it is dropped here
    and the streams that used it are done with it; so there are only as many as are in use at a time.
    """
    import torch

    work, back = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types
    work.wait_stream(torch.cuda.current_stream(device))  # which made the scales

    def start(raw: bytes, first: int, rows: int) -> Callable[[], memoryview]:
        with torch.cuda.stream(work):
            sent = torch.empty(len(raw), dtype=torch.uint8, pin_memory=True)
            memoryview(sent.numpy().data)[:] = raw
            values = kernel(sent.to(device, non_blocking=True), first, rows)
        back.wait_stream(work)
        with torch.cuda.stream(back):
            received = torch.empty(values.shape, dtype=torch.uint8, pin_memory=True)
            received.copy_(values, non_blocking=True)
            values.record_stream(back)
            done = back.record_event()

        def wait() -> memoryview:
            done.synchronize()
            return memoryview(received.numpy().data)

        return wait

    return start


@dataclass(frozen=True)
class Quantized:
    """A weight quantized to NF4, as raw bytes: U8 [ceil(n / 2)], and its statistics in bitsandbytes' layout."""

    weight: bytes
    absmax: bytes  # F32 [blocks], or U8 [blocks] with double quantization
    quant_map: bytes  # F32 [16]
    nested_absmax: bytes | None
    nested_quant_map: bytes | None
    offset: float | None


def quantize(
    values: Iterable[bytes | memoryview], dtype: str, *, blocksize: int, nested_blocksize: int | None
) -> Quantized:
    """Quantizes raw little-endian values in `dtype` to NF4; all chunks but the last hold whole blocks.

    Equal to `bitsandbytes.functional.quantize_4bit` on the whole tensor. Memory: a chunk, and the result. Always on the
    CPU: CUDA's kernels give blocks of zeros other codes, and round some scales of scales otherwise (0.50, on an H200).
    """
    import torch

    from .reference import dynamic_map

    bnb = _bitsandbytes()
    kind: torch.dtype = getattr(torch, dtype)
    quantized, scales = bytearray(), []
    with _gpu_errors("cpu"), _QUANTIZING:
        for chunk in values:
            part = torch.frombuffer(bytearray(chunk), dtype=kind)
            q, state = bnb.quantize_4bit(part, blocksize=blocksize, compress_statistics=False, quant_type="nf4")
            quantized += _raw(q)
            scales.append(state.absmax.float())
        absmax = torch.cat(scales)
        quant_map = _raw(bnb.get_4bit_type("nf4", device="cpu"))
        if nested_blocksize is None:
            return Quantized(bytes(quantized), _raw(absmax), quant_map, None, None, None)
        # Both are bitsandbytes', but for the last bits, which depend on the processor where torch computes them.
        offset = torch.tensor(fsum(absmax.tolist()) / absmax.numel(), dtype=torch.float32)
        table = torch.frombuffer(bytearray(dynamic_map().tobytes()), dtype=torch.float32)
        inner, nested = bnb.quantize_blockwise(absmax - offset, code=table, blocksize=nested_blocksize)
        outer, code = _raw(nested.absmax.float()), _raw(nested.code.float())
        return Quantized(bytes(quantized), _raw(inner), quant_map, outer, code, offset.item())


@contextmanager
def _float32_default() -> Iterator[None]:
    """Quantization without a compiler and with tables in float32, both of which are settings of the whole process.

    bitsandbytes compiles its generic fallback (odd sizes, large blocks), which would need a C++ compiler here; and it
    makes its code tables in torch's default dtype, which vLLM, for example, sets to bfloat16.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        _clear_code_caches()
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_default_dtype(before)


_QUANTIZING = SharedContext(_float32_default)


def _clear_code_caches() -> None:
    """Makes bitsandbytes compute its bounds again: the caller may have filled the caches under another dtype."""
    ops = import_module("bitsandbytes.backends.default.ops")
    utils = import_module("bitsandbytes.backends.utils")
    if (bounds := getattr(ops, "_get_4bit_quantize_bounds", None)) is not None:
        bounds.cache_clear()
    getattr(utils, "_code_4bit_cache", {}).clear()


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
    if not rows * columns:  # torch makes no tensor of an empty buffer
        return
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
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        return import_module("bitsandbytes.functional")
    finally:
        log.setLevel(level)
        if absent:
            del sys.modules["kernels"]


def _absmax(quantized: QuantizedTensor, device: str) -> torch.Tensor:
    """The scale of every block in float32, F32 [blocks], double quantization undone."""
    import torch

    bnb, nested = _bitsandbytes(), quantized.state.nested
    if nested is None:
        return torch.frombuffer(bytearray(quantized.absmax), dtype=torch.float32).to(device)
    assert quantized.nested_absmax is not None and quantized.nested_quant_map is not None  # by quant_state.check
    inner = bnb.QuantState(
        absmax=torch.frombuffer(bytearray(quantized.nested_absmax), dtype=torch.float32).to(device),
        code=torch.frombuffer(bytearray(quantized.nested_quant_map), dtype=torch.float32).to(device),
        blocksize=nested.blocksize,
        dtype=torch.float32,
    )
    outer = torch.frombuffer(bytearray(quantized.absmax), dtype=torch.uint8).to(device)
    # The offset stays float32 whatever torch's default dtype is: vLLM loads under bfloat16, which rounds it.
    values: torch.Tensor = bnb.dequantize_blockwise(outer, inner)
    return values + torch.tensor(nested.offset, dtype=torch.float32, device=device)
