"""A matrix inside a quantized weight is read with the blocks that it is in, and decodes to its part of the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from bnbfix.checkpoint.checkpoint import Tensor, Weight
from bnbfix.checkpoint.quant_state import QuantState
from bnbfix.checkpoint.safetensors import TensorInfo
from bnbfix.checkpoint.source import Source
from bnbfix.kernels.bnb import dequantize
from bnbfix.planner.layout import Rows, Split
from bnbfix.writer.tensor_data import cut_values, made_parts, quantized_rows
from tests.support.quantized import WIDTH, examples, kernel_bytes, random_weight, states


class Memory:
    """A source of one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        assert all(offset >= 0 and offset + length <= len(self.data) for offset, length in ranges)
        return [self.data[offset : offset + length] for offset, length in ranges]


def in_memory(state: QuantState) -> tuple[Source, Weight, bytes]:
    """A random weight in a source, and its values."""
    quantized, data, tensors = random_weight(state), b"", {}
    found = {"": quantized.raw, ".absmax": quantized.absmax}
    if quantized.nested_absmax is not None and quantized.nested_quant_map is not None:
        found |= {".nested_absmax": quantized.nested_absmax, ".nested_quant_map": quantized.nested_quant_map}
    for suffix, part in found.items():
        tensors[suffix] = Tensor("file", TensorInfo(f"w{suffix}", "U8", (len(part),), 0, len(part)), len(data))
        data += part
    weight = Weight("w", tensors.pop(""), tensors, state)
    return cast("Source", Memory(data)), weight, kernel_bytes(quantized)


@given(states, st.data())
@examples(150)
def test_any_run_of_values(state: QuantState, data: Any) -> None:
    source, weight, values = in_memory(state)
    begin = data.draw(st.integers(0, state.numel - 1))
    count = data.draw(st.integers(1, state.numel - begin))
    rows, width = Rows(weight, begin, count), WIDTH[state.dtype]
    chunk = data.draw(st.sampled_from([256, 4096, 4 << 20]))
    got = b"".join(cut_values(rows, dequantize(quantized_rows(source, rows), "cpu", chunk)))
    assert got == values[begin * width : (begin + count) * width]


@given(states, st.integers(1, 5), st.integers(1, 5), st.data())
@examples(150)
def test_matrices_of_whole_blocks_are_cut_out(state: QuantState, matrices: int, blocks: int, data: Any) -> None:
    count = blocks * state.blocksize
    whole = QuantState(state.quant_type, state.blocksize, state.dtype, (matrices * count,), state.nested)
    source, weight, values = in_memory(whole)
    number, width = data.draw(st.integers(0, matrices - 1)), WIDTH[state.dtype]
    op = Split("m", (blocks, state.blocksize), Rows(weight, number * count, count))
    made = dict(zip((info.name[1:] for info in op.infos()), made_parts(source, op, "cpu"), strict=True))
    assert [len(part) for part in made.values()] == [info.nbytes for info in op.infos()]
    assert (".nested_absmax" in made) == (op.state().nested is not None)
    again = random_weight(op.state())
    again.raw, again.absmax = made[""], made[".absmax"]
    again.nested_absmax, again.nested_quant_map = made.get(".nested_absmax"), made.get(".nested_quant_map")
    assert kernel_bytes(again) == values[number * count * width : (number + 1) * count * width]
