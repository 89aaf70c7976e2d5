"""Compares numbers of an output with an independent decode (kernels/reference.py) of their sources, by chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Weight
from ..checkpoint.source import Source
from ..kernels import reference
from ..kernels.bnb import QuantizedTensor
from ..planner.layout import QUANT_TYPE, Dequantize, Quantize, Slice, Split
from ..writer.tensor_data import (
    CHUNK_BYTES,
    copy_range,
    cut_values,
    order_values,
    quantized_rows,
    quantized_tensor,
    slice_values,
)


def compare_dequantized(source: Source, op: Dequantize, output: Source, file: str, at: int) -> str | None:
    """What is wrong with dequantized bytes of the output at a file offset; None when every bit is right."""
    for want in _values(source, op):
        got = output.read(file, [(at, len(want))])[0]
        if got != want and not reference.same_values(got, want, op.dtype):
            return f"is not what its quantized weight decodes to, before byte {at + len(want):,} of the file"
        at += len(want)
    return None


def compare_quantized(source: Source, op: Quantize, output: Source, file: str, at: int) -> str | None:
    """What is wrong with a weight that was quantized: its values must be within 4-bit rounding of those it came from.

    NF4's widest gap is 0.304 of a block's scale, so no value moves by more than half of that, and by what double
    quantization changed the scale; the scale itself must be that of the values, within 8-bit rounding.
    """
    parts = _read_parts(op, output, file, at)
    offset = _offset(parts[f".quant_state.bitsandbytes__{QUANT_TYPE}"])
    if problem := _compare_constants(op, parts, offset):
        return problem
    if parts.get(".nested_quant_map", dynamic := reference.dynamic_map().tobytes()) != dynamic:
        return "its nested_quant_map is not bitsandbytes' 8-bit map"
    state = op.state(offset)
    scales = reference.absmax_values(
        state, parts[".absmax"], parts.get(".nested_absmax"), parts.get(".nested_quant_map")
    )
    slack = reference.scale_rounding(state, parts.get(".nested_absmax"))
    first = 0
    for chunk in _quantize_input(source, op):
        count = len(chunk) // qs.WIDTH[op.dtype]
        blocks = -(-count // state.blocksize)
        quantized = parts[""][first // 2 : (first + count + 1) // 2]
        part = slice(first // state.blocksize, first // state.blocksize + blocks)
        if not reference.within_rounding(state, quantized, scales[part], slack[part], bytes(chunk)):
            return f"is not a 4-bit rounding of what it was made from, near element {first:,}"
        first += count
    return None


def compare_split(source: Source, op: Split, output: Source, file: str, at: int) -> str | None:
    """What is wrong with a weight that was cut out of another: its scales and values must be the same, to the bit."""
    parts, state = _read_parts(op, output, file, at), op.state()
    if problem := _compare_constants(op, parts):
        return problem
    made = QuantizedTensor(
        state,
        lambda offset, length: parts[""][offset : offset + length],
        parts[".absmax"],
        parts.get(".nested_absmax"),
        parts.get(".nested_quant_map"),
    )
    origin, first = quantized_rows(source, op.values), op.values.begin % op.values.unit // state.blocksize
    if _scales(made).tobytes() != _scales(origin)[first : first + state.blocks].tobytes():
        return "its scales are not those of the quantized weight that it was cut out of"
    got, want = b"".join(_four_bit(made)), b"".join(cut_values(op.values, _four_bit(origin)))
    if got != want and not reference.same_values(got, want, state.safetensors_dtype):
        return "does not decode to the values of the quantized weight that it was cut out of"
    return None


def _read_parts(op: Quantize | Split, output: Source, file: str, at: int) -> dict[str, bytes]:
    """The bytes of a weight and of its quant-state tensors, by suffix."""
    parts = {}
    for info in op.infos():
        parts[info.name[len(op.name) :]] = output.read(file, [(at, info.nbytes)])[0]
        at += info.nbytes
    return parts


def _compare_constants(op: Quantize | Split, parts: Mapping[str, bytes], offset: float = 0.0) -> str | None:
    """What is wrong with the quant state's JSON and the table of its 4-bit type."""
    quant_type = op.state().quant_type
    if parts[f".quant_state.bitsandbytes__{quant_type}"] != op.state_json(offset):
        return "its quant state is not the one that the plan writes"
    if parts[".quant_map"] != reference.code_table(quant_type).tobytes():
        return f"its quant_map is not {quant_type.upper()}'s"
    return None


def _offset(raw: bytes) -> float:
    """The offset in the JSON of a quant state; 0 where it has none, or is not a quant state."""
    try:
        doc = json.loads(raw)
    except (ValueError, RecursionError):
        return 0.0
    value = doc.get("nested_offset") if isinstance(doc, dict) else None
    return value if isinstance(value, float) and math.isfinite(value) else 0.0


def _quantize_input(source: Source, op: Quantize) -> Iterator[bytes | memoryview]:
    if isinstance(op.values, Slice):
        yield from slice_values(source, op.values)
    else:
        yield from cut_values(op.values, _four_bit(quantized_rows(source, op.values)))


def _values(source: Source, op: Dequantize) -> Iterator[bytes]:
    yield from map(bytes, order_values(op, lambda weight: _values_of(source, weight, op.dtype)))


def _values_of(source: Source, weight: Weight, dtype: str) -> Iterator[bytes]:
    if weight.state is not None:
        yield from _four_bit(quantized_tensor(source, weight))
    elif weight.int8:
        yield from _eight_bit(source, weight, dtype)
    else:
        t = weight.tensor
        yield from copy_range(source, t.shard, t.offset, t.info.nbytes)


def _scales(quantized: QuantizedTensor) -> Any:  # F32 [blocks]
    return reference.absmax_values(
        quantized.state, quantized.absmax, quantized.nested_absmax, quantized.nested_quant_map
    )


def _four_bit(quantized: QuantizedTensor) -> Iterator[bytes]:
    state, scales = quantized.state, _scales(quantized)
    width, blocks = qs.WIDTH[state.dtype], max(1, CHUNK_BYTES // (4 * state.blocksize))
    for first in range(0, state.blocks, blocks):
        begin, end = first * state.blocksize, min((first + blocks) * state.blocksize, state.numel)
        raw = quantized.read(begin // 2, (end - begin + 1) // 2)
        yield reference.decode_chunk(state, raw, scales[first : first + blocks])[: (end - begin) * width]


def _eight_bit(source: Source, weight: Weight, dtype: str) -> Iterator[bytes]:
    rows, columns = weight.shape
    scales = weight.state_tensors[".SCB"].read(source)
    step = max(1, CHUNK_BYTES // (4 * columns))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        at = weight.tensor.offset + first * columns
        raw = source.read(weight.tensor.shard, [(at, count * columns)])[0]
        yield reference.decode_int8(raw, scales[first * 4 : (first + count) * 4], dtype)
