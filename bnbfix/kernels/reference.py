"""An independent decode of quantized weights, in numpy, with which `verify` compares the kernels' output.

Neither torch nor bitsandbytes is used. Value = table[4 bits] * scale of its block, in float32, rounded once to the
dtype that the quant state names; the high half of a byte comes first.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.quant_state import DTYPES, QuantState

if TYPE_CHECKING:
    from numpy.typing import NDArray

# NF4: the quantiles of a normal distribution, QLoRA (arXiv:2305.14314), appendix E; as bitsandbytes writes them in
# csrc/kernels.cu. FP4: sign, two bits of exponent, one of mantissa, scaled to 1; same source.
_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_NF4 = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
TABLES = {
    "nf4": tuple(map(float, _NF4.split())),
    "fp4": (*_FP4, *(0.0 - value for value in _FP4)),  # the second zero is +0 too
}


def absmax_values(
    state: QuantState, absmax: bytes, nested_absmax: bytes | None, nested_quant_map: bytes | None
) -> NDArray[np.float32]:
    """The scale of every block, F32 [blocks], double quantization undone. The sizes must have been checked."""
    if state.nested is None:
        return np.frombuffer(absmax, "<f4")
    assert nested_absmax is not None and nested_quant_map is not None
    table, outer = np.frombuffer(nested_quant_map, "<f4"), np.frombuffer(nested_absmax, "<f4")
    scales = np.repeat(outer, state.nested.blocksize)[: state.blocks]
    inner: NDArray[np.float32] = table[np.frombuffer(absmax, np.uint8)] * scales
    return inner + np.float32(state.nested.offset)


def cut_columns(data: bytes, rows: int, columns: int, first: int, count: int) -> bytes:
    """So many columns of a matrix of values of any width, one after the other."""
    matrix = np.frombuffer(data, f"V{len(data) // (rows * columns)}").reshape(rows, columns)
    return matrix[:, first : first + count].T.tobytes()


def decode_chunk(state: QuantState, quantized: bytes, scales: NDArray[np.float32]) -> bytes:
    """The values of whole blocks, little-endian in `state.dtype`. `scales` has one for each block in `quantized`.

    Of an odd number of elements the padding half byte is decoded too; it is the last.
    """
    raw = np.frombuffer(quantized, np.uint8)
    codes = np.empty(2 * len(raw), np.uint8)
    codes[0::2], codes[1::2] = raw >> 4, raw & 15
    values = code_table(state.quant_type)[codes]
    with np.errstate(all="ignore"):  # infinities are valid values here, and the API prints no warnings
        values *= np.repeat(scales, state.blocksize)[: len(values)]
        return _cast(values, DTYPES[state.dtype])


def _cast(values: NDArray[np.float32], dtype: str) -> bytes:
    """float32 values rounded once to a dtype (safetensors name)."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    return _bfloat16(values).tobytes()


def decode_int8(raw: bytes, scales: bytes, dtype: str) -> bytes:
    """Rows of an LLM.int8 weight in `dtype` (safetensors name): I8 [rows, columns] * F32 [rows] / 127."""
    rows = np.frombuffer(scales, "<f4")
    with np.errstate(all="ignore"):
        values = np.frombuffer(raw, np.int8).reshape(len(rows), -1).astype("<f4") * rows[:, None]
        return _cast(values * np.float32(1 / 127), dtype)


def same_values(one: bytes, other: bytes, dtype: str) -> bool:
    """Are the bits of two runs of values (`dtype`: safetensors name) the same, with all NaNs equal?

    Which NaN a NaN or infinite scale gives depends on the processor.
    """
    a, b = (np.frombuffer(raw, "<u4" if dtype == "F32" else "<u2") for raw in (one, other))
    exponent, rest = {"F32": (0x7F800000, 0x007FFFFF), "F16": (0x7C00, 0x03FF), "BF16": (0x7F80, 0x007F)}[dtype]
    nan = [((x & exponent) == exponent) & ((x & rest) != 0) for x in (a, b)]
    return bool(np.array_equal(np.where(nan[0], 0, a), np.where(nan[1], 0, b)) and np.array_equal(*nan))


def code_table(quant_type: str) -> NDArray[np.float32]:
    """The sixteen values of a 4-bit type, F32 [16], as its `quant_map` holds them."""
    return np.array(TABLES[quant_type], "<f4")


@cache
def dynamic_map() -> NDArray[np.float32]:
    """The 256 values of bitsandbytes' 8-bit map, F32 [256], in which double quantization stores scales.

    These are the bits that `bitsandbytes.functional.create_dynamic_map` makes with AVX2 and AVX-512; without them it
    differs in the last bits of 42 values. Each step here is rounded alike on every processor.
    """
    first, last, values = np.float32(0.1), 1.0, [0.0, 1.0]
    for exponent in range(-6, 1):
        count = 2 ** (exponent + 6) + 1
        step = float((np.float32(last) - first) / np.float32(count - 1))
        ends = [float(first) + step * i if i < count // 2 else last - step * (count - 1 - i) for i in range(count)]
        bounds = np.array(ends, np.float32)
        means = np.float32(10.0**exponent) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*means.tolist(), *(-means).tolist()]
    return np.array(sorted(values), "<f4")


def scale_rounding(state: QuantState, nested_absmax: bytes | None) -> NDArray[np.float32]:
    """By how much double quantization may have moved the scale of each block, F32 [blocks]; 0 without it.

    bitsandbytes' 8-bit map is widest spaced between 0.1 and 1, with 64 steps of 0.0141 of the nested block's scale.
    """
    if state.nested is None or nested_absmax is None:
        return np.zeros(state.blocks, np.float32)
    outer = np.frombuffer(nested_absmax, "<f4")
    return np.repeat(np.float32(0.0075) * outer, state.nested.blocksize)[: state.blocks]


def within_rounding(
    state: QuantState, quantized: bytes, scales: NDArray[np.float32], slack: NDArray[np.float32], values: bytes
) -> bool:
    """Is each decoded value within 4-bit rounding of the value it was quantized from (both `state.dtype`)?

    `scales` and `slack` are those of the blocks in `quantized`. A value may be off by half of NF4's widest gap, 0.152
    of its block's true scale, and by the change of the scale in double quantization; the dtype adds one hundredth.
    """
    got, want = _float32(decode_chunk(state, quantized, scales), state.dtype), _float32(values, state.dtype)
    got = got[: len(want)]
    with np.errstate(all="ignore"):  # a value that is not finite is within rounding of no other
        true = np.maximum.reduceat(np.abs(want), np.arange(0, len(want), state.blocksize))
        moved = np.abs(scales - true)
        if bool(np.any(moved > slack + np.float32(1e-5) * true)):
            return False
        allowed = np.repeat(np.float32(0.162) * true + moved, state.blocksize)[: len(want)]
        return bool(np.all(np.abs(got - want) <= allowed))


def _float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f2" if dtype == "float16" else "<f4").astype("<f4")


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest even. NaN keeps its upper half, with a bit set."""
    bits = values.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2")
