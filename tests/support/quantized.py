"""Random quantized weights, and their values by two independent ways."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import bitsandbytes.functional as bnb
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from bnbfix.checkpoint.quant_state import BLOCKSIZES, DTYPES, NestedState, QuantState
from bnbfix.kernels import bnb as kernels
from bnbfix.kernels import reference as decode
from bnbfix.kernels.bnb import QuantizedTensor

torch.set_num_threads(1)  # more would only wait for each other over tensors of this size

WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}
INTEGER = {2: "<u2", 4: "<u4"}


def examples(n: int) -> settings:
    return settings(max_examples=n)


@dataclass
class Quantized:
    """A quantized weight of random bytes, so that every code comes up, with the reads that were made of it."""

    state: QuantState
    raw: bytes
    absmax: bytes
    nested_absmax: bytes | None = None
    nested_quant_map: bytes | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        assert offset + length <= len(self.raw), "reads past the end of the quantized bytes"
        return self.raw[offset : offset + length]

    @property
    def tensor(self) -> QuantizedTensor:
        return QuantizedTensor(self.state, self.read, self.absmax, self.nested_absmax, self.nested_quant_map)

    @property
    def codes(self) -> np.ndarray:
        halves = np.frombuffer(self.raw, np.uint8)
        return np.stack([halves >> 4, halves & 15], axis=1).reshape(-1)[: self.state.numel]


def random_weight(state: QuantState, seed: int = 0, scales: tuple[float, ...] | None = None) -> Quantized:
    """Random quantized bytes and statistics for a state; `scales` are repeated over the blocks where they are given."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, state.quantized_nbytes, dtype=np.uint8).tobytes()
    if state.nested is None:
        values = rng.uniform(1e-3, 4.0, state.blocks) if scales is None else np.resize(scales, state.blocks)
        return Quantized(state, raw, values.astype("<f4").tobytes())
    outer = rng.uniform(1e-3, 0.5, -(-state.blocks // state.nested.blocksize)).astype("<f4")
    table = bnb.create_dynamic_map().numpy().astype("<f4")
    absmax = rng.integers(0, 256, state.blocks, dtype=np.uint8)
    return Quantized(state, raw, absmax.tobytes(), outer.tobytes(), table.tobytes())


def kernel_bytes(quantized: Quantized, device: str = "cpu", chunk_bytes: int = 4 << 20) -> bytes:
    return b"".join(kernels.dequantize(quantized.tensor, device, chunk_bytes))


def decoded_bytes(quantized: Quantized) -> bytes:
    state = quantized.state
    scales = decode.absmax_values(state, quantized.absmax, quantized.nested_absmax, quantized.nested_quant_map)
    return decode.decode_chunk(state, quantized.raw, scales)[: state.numel * WIDTH[state.dtype]]


def f32(x: float) -> float:
    """Rounds once to float32, to infinity where it is too large."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def naive_bytes(quantized: Quantized) -> bytes:
    """One number after another, with the table that bitsandbytes writes next to a weight (`quant_map`)."""
    state = quantized.state
    table = [f32(v) for v in bnb.get_4bit_type(state.quant_type, device="cpu").tolist()]
    if state.nested is None:
        scales = list(struct.unpack(f"<{state.blocks}f", quantized.absmax))
    else:
        assert quantized.nested_absmax is not None and quantized.nested_quant_map is not None
        inner = struct.unpack("<256f", quantized.nested_quant_map)
        outer = struct.unpack(f"<{len(quantized.nested_absmax) // 4}f", quantized.nested_absmax)
        size, offset = state.nested.blocksize, f32(state.nested.offset)
        scales = [f32(f32(inner[code] * outer[i // size]) + offset) for i, code in enumerate(quantized.absmax)]
    out = bytearray()
    for i in range(state.numel):
        code = quantized.raw[i // 2] >> 4 if i % 2 == 0 else quantized.raw[i // 2] & 15
        value = f32(table[code] * scales[i // state.blocksize])  # exact in double, so this rounds once
        out += naive_round(value, state.dtype)
    return bytes(out)


def naive_round(value: float, dtype: str) -> bytes:
    if dtype == "float32":
        return struct.pack("<f", value)
    if dtype == "float16":
        try:
            return struct.pack("<e", value)
        except OverflowError:
            return struct.pack("<e", math.copysign(math.inf, value))
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low, high = bits & 0xFFFF, bits >> 16
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high % 2 == 1)))


def differences(a: bytes, b: bytes, quantized: Quantized) -> list[tuple[int, int, int, int]]:
    """(element, code, bits in a, bits in b) of the first few elements that differ."""
    assert len(a) == len(b) == quantized.state.numel * WIDTH[quantized.state.dtype]
    kind = INTEGER[WIDTH[quantized.state.dtype]]
    x, y = np.frombuffer(a, kind), np.frombuffer(b, kind)
    return [(int(i), int(quantized.codes[i]), int(x[i]), int(y[i])) for i in np.nonzero(x != y)[0][:5]]


quant_types, dtypes = st.sampled_from(["nf4", "fp4"]), st.sampled_from(list(DTYPES))
blocksizes = st.sampled_from(BLOCKSIZES)
nested_states = st.one_of(st.none(), st.builds(NestedState, blocksizes, st.floats(0.001, 10)))
shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 150)),
    st.tuples(st.just(1), st.integers(1, 9000)),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40)),
    st.tuples(st.integers(1, 6000)),
)
states = st.builds(QuantState, quant_types, blocksizes, dtypes, shapes, nested_states)
