"""The kernels against bitsandbytes' decode of whole tensors, the independent decode, and a naive one."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bnbfix.checkpoint.quant_state import DTYPES, NestedState, QuantState
from bnbfix.errors import QuantStateError, UsageError
from bnbfix.kernels import bnb as kernels
from bnbfix.kernels import reference as decode
from tests.support.quantized import (
    WIDTH,
    Quantized,
    blocksizes,
    decoded_bytes,
    differences,
    dtypes,
    examples,
    kernel_bytes,
    naive_bytes,
    nested_states,
    quant_types,
    random_weight,
    states,
)


@examples(150)
@given(states, st.integers(0, 2**32 - 1), st.one_of(st.just(4 << 20), st.integers(1, 20_000)))
@example(QuantState("fp4", 32, "bfloat16", (3, 100), None), 0, 4 << 20)  # code 8 in the rest of a row
@example(QuantState("nf4", 64, "bfloat16", (1152, 4304 // 16), None), 0, 4 << 20)  # columns like 31B's vision tower
@example(QuantState("nf4", 64, "float32", (7, 9), None), 0, 1)
@example(QuantState("nf4", 64, "bfloat16", (1, 1), NestedState(256, 0.5)), 1, 1)
def test_every_shape_equals_the_independent_decode(state: QuantState, seed: int, chunk_bytes: int) -> None:
    quantized = random_weight(state, seed)
    assert differences(kernel_bytes(quantized, chunk_bytes=chunk_bytes), decoded_bytes(quantized), quantized) == []


small = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.tuples(st.just(1), st.integers(1, 600)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20)),
)


@examples(80)
@given(st.builds(QuantState, quant_types, blocksizes, dtypes, small, nested_states), st.integers(0, 2**32 - 1))
@example(QuantState("fp4", 32, "float32", (3, 100), None), 0)
def test_every_shape_equals_a_naive_decode(state: QuantState, seed: int) -> None:
    quantized = random_weight(state, seed)
    want = naive_bytes(quantized)
    assert differences(kernel_bytes(quantized, chunk_bytes=512), want, quantized) == []
    assert differences(decoded_bytes(quantized), want, quantized) == []


@st.composite
def whole_rows(draw: st.DrawFn) -> QuantState:
    size = draw(blocksizes)
    shape = (draw(st.integers(1, 6)), size * draw(st.integers(1, max(1, 4096 // size))))
    return QuantState(draw(quant_types), size, draw(dtypes), shape, draw(nested_states))


@examples(80)
@given(whole_rows(), st.integers(0, 2**32 - 1), st.integers(1, 20_000))
def test_whole_rows_of_blocks_equal_bitsandbytes_on_the_whole_tensor(state: QuantState, seed: int, chunk: int) -> None:
    quantized = random_weight(state, seed)
    got, want = kernel_bytes(quantized, chunk_bytes=chunk), bitsandbytes_bytes(quantized, "cpu")
    if state.quant_type == "fp4":  # the sign of code 8's zero depends on bitsandbytes' kernel; here it never does
        dtype = getattr(torch, state.dtype)
        a, b = (torch.frombuffer(bytearray(x), dtype=dtype) for x in (got, want))
        zeros = torch.from_numpy(quantized.codes == 8)
        assert torch.all(a[zeros] == 0) and torch.all(b[zeros] == 0)
        got, want = (x.masked_fill(zeros, 0.0).view(torch.uint8).numpy().tobytes() for x in (a, b))
    assert differences(got, want, quantized) == []


def bitsandbytes_bytes(quantized: Quantized, device: str) -> bytes:
    """bitsandbytes' decode of the whole tensor at once."""
    state = quantized.state

    def floats(data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.float32).to(device)

    nested = None
    absmax = (
        floats(quantized.absmax) if state.nested is None else torch.tensor(list(quantized.absmax), dtype=torch.uint8)
    )
    if state.nested is not None:
        assert quantized.nested_absmax is not None and quantized.nested_quant_map is not None
        nested = bnb.QuantState(
            absmax=floats(quantized.nested_absmax),
            code=floats(quantized.nested_quant_map),
            blocksize=state.nested.blocksize,
            dtype=torch.float32,
        )
    whole = bnb.QuantState(
        absmax=absmax.to(device),
        shape=torch.Size(state.shape),
        blocksize=state.blocksize,
        state2=nested,
        quant_type=state.quant_type,
        dtype=getattr(torch, state.dtype),
        code=bnb.get_4bit_type(state.quant_type, device=device),
        offset=torch.tensor(state.nested.offset, dtype=torch.float32).to(device) if state.nested else None,
    )
    column = torch.frombuffer(bytearray(quantized.raw), dtype=torch.uint8).view(-1, 1).to(device)
    with torch.compiler.set_stance("force_eager"):
        out = bnb.dequantize_4bit(column, whole)
    assert tuple(out.shape) == state.shape or quantized.state.quantized_nbytes == 1
    return out.contiguous().view(torch.uint8).cpu().numpy().tobytes()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_quantizes_comes_back_close_to_what_it_was(quant_type: str, nested: bool) -> None:
    weight = torch.randn((48, 128), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    raw, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    doc = state.as_dict(packed=False)
    inner = NestedState(doc["nested_blocksize"], float(doc["nested_offset"])) if nested else None
    ours = QuantState(quant_type, doc["blocksize"], "bfloat16", (48, 128), inner)
    quantized = Quantized(
        ours,
        raw.numpy().tobytes(),
        doc["absmax"].numpy().tobytes(),
        doc["nested_absmax"].numpy().tobytes() if nested else None,
        doc["nested_quant_map"].numpy().tobytes() if nested else None,
    )
    values = torch.frombuffer(bytearray(kernel_bytes(quantized)), dtype=torch.bfloat16).view(48, 128)
    error = (values.float() - weight.float()).abs().mean() / weight.float().abs().mean()
    assert 0.01 < error < 0.2
    assert torch.equal(values, bnb.dequantize_4bit(raw, state))


EXTREMES = [
    (0.0,),
    (-0.0,),
    (-1e-3, 1.0),
    (1e-30,),
    (1e-37, 1.0),
    (1e-39,),
    (3e-41, 0.5),
    (6e-5,),
    (7e4,),
    (1e30,),
    (3e38,),
]


@pytest.mark.parametrize("scales", EXTREMES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_extreme_scales_equal_a_naive_decode(
    quant_type: str, scales: tuple[float, ...], recwarn: pytest.WarningsRecorder
) -> None:
    for dtype in DTYPES:
        for shape, size in (((4, 64), 64), ((3, 100), 32), ((7, 9), 64), ((2, 1030), 2048)):
            quantized = random_weight(QuantState(quant_type, size, dtype, shape, None), 3, scales)
            want = naive_bytes(quantized)
            assert differences(kernel_bytes(quantized), want, quantized) == [], (dtype, shape)
            assert differences(decoded_bytes(quantized), want, quantized) == [], (dtype, shape)
    assert [str(w.message) for w in recwarn] == []


def test_code_8_of_fp4_is_plus_zero_wherever_it_stands() -> None:
    state = QuantState("fp4", 32, "float32", (3, 100), None)
    quantized = replace(random_weight(state, scales=(2.0,)), raw=b"\x88" * state.quantized_nbytes)
    assert kernel_bytes(quantized) == bytes(300 * 4)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_torchs_default_dtype_changes_nothing(quant_type: str, default: torch.dtype) -> None:
    state = QuantState(quant_type, 64, "float32", (33, 50), NestedState(32, 0.123456789))
    quantized = random_weight(state, 5)
    want = kernel_bytes(quantized)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = kernel_bytes(quantized)
    finally:
        torch.set_default_dtype(before)
    assert differences(got, want, quantized) == []


def test_a_code_table_that_bitsandbytes_cached_under_bfloat16_changes_nothing() -> None:
    # In a process of its own: bitsandbytes keeps the first table that its fallback made, in that time's default dtype.
    done = python(
        "import torch; torch.set_default_dtype(torch.bfloat16)\n"
        "from bitsandbytes.backends.utils import _get_4bit_code\n"
        "assert _get_4bit_code('nf4', torch.device('cpu')).dtype == torch.bfloat16, 'nothing was tested'\n"
        "from bnbfix.kernels import bnb as kernels, reference as decode\n"
        "from bnbfix.checkpoint.quant_state import QuantState\nimport numpy as np\n"
        "for size, count in ((64, 1001), (4096, 8192)):\n"
        "    state = QuantState('nf4', size, 'float32', (count,), None)\n"
        "    raw = np.random.default_rng(0).bytes(state.quantized_nbytes); scales = np.full(state.blocks, 1.1, '<f4')\n"
        "    quantized = kernels.QuantizedTensor(state, lambda at, n: raw[at:at + n], scales.tobytes(), None, None)\n"
        "    got = b''.join(kernels.dequantize(quantized, 'cpu'))\n"
        "    assert got == decode.decode_chunk(state, raw, scales)[:len(got)], size\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_short_read_never_reaches_the_kernel() -> None:
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (8, 64), None))
    short = replace(quantized.tensor, read=lambda offset, length: quantized.raw[offset : offset + length // 2])
    with pytest.raises(QuantStateError, match="a read of 256 quantized bytes returned 128"):
        list(kernels.dequantize(short, "cpu"))


@examples(60)
@given(states, st.integers(1, 30_000))
def test_chunks_and_reads_are_bounded_and_cover_every_byte_once(state: QuantState, chunk_bytes: int) -> None:
    quantized, width = random_weight(state), WIDTH[state.dtype]
    limit = max(chunk_bytes, state.blocksize * width)
    sizes = [chunk.nbytes for chunk in kernels.dequantize(quantized.tensor, "cpu", chunk_bytes)]
    assert max(sizes) <= limit
    assert sum(sizes) == state.numel * width
    at = 0
    for offset, length in quantized.reads:
        assert offset == at and 0 < length <= -(-limit // width // 2)
        at += length
    assert at == state.quantized_nbytes


def test_the_cpu_reads_nothing_ahead_of_the_chunk_that_is_drawn() -> None:
    state = QuantState("nf4", 64, "bfloat16", (64, 64), None)
    quantized = random_weight(state)
    chunks = kernels.dequantize(quantized.tensor, "cpu", 1024)
    assert quantized.reads == []
    next(chunks)
    assert quantized.reads == [(0, 256)]


def test_with_one_chunk_ahead_the_next_is_started_before_one_is_waited_for() -> None:
    quantized, log = random_weight(QuantState("nf4", 64, "bfloat16", (31, 64), None)), []
    values = kernel_bytes(quantized)

    def start(raw: bytes, first: int, rows: int) -> Callable[[], memoryview]:
        log.append(f"start {first}")

        def wait() -> memoryview:
            log.append(f"wait {first}")
            return memoryview(values)[first * 128 : (first + rows) * 128]

        return wait

    chunks = []
    for chunk in kernels.decode_chunks(quantized.tensor, start, 1024, ahead=1):
        log.append("use")
        chunks.append(bytes(chunk))
    assert log == [
        "start 0",
        "start 8",
        "wait 0",
        "use",
        "start 16",
        "wait 8",
        "use",
        "start 24",
        "wait 16",
        "use",
        "wait 24",
        "use",
    ]
    assert b"".join(chunks) == values


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 20 MiB.", "no kernel image\nSearch", ""])
def test_an_error_of_the_gpu_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def fails(*arguments: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError(words)

    monkeypatch.setattr(torch, "frombuffer", fails)
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (31, 64), None)).tensor
    with pytest.raises(UsageError) as e:
        list(kernels.dequantize(quantized, "cuda:1"))
    assert str(e.value) == f"device cuda:1: {words.partition(chr(10))[0] or 'OutOfMemoryError'}"
    assert "--device cpu" in str(e.value.hint)


def random_values(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Values with blocks of very different scales, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand((math.prod(shape) + 31) // 32, generator=generator).repeat_interleave(32)[: math.prod(shape)]
    values = torch.randn(math.prod(shape), generator=generator) * torch.where(spread < 0.1, 0.0, spread**4)
    return values.to(getattr(torch, dtype)).reshape(shape)


def as_bytes(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def in_chunks(data: bytes, size: int) -> Iterator[bytes]:
    yield from (data[at : at + size] for at in range(0, len(data), size))


@examples(50)
@given(
    st.integers(1, 20),
    st.integers(1, 700),
    dtypes,
    st.sampled_from([64, 128, 1024]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
@example(1, 1, "bfloat16", 64, True, 1, 0)
def test_quantizing_in_chunks_equals_bitsandbytes_on_the_whole_tensor(
    rows: int, columns: int, dtype: str, size: int, nested: bool, blocks: int, seed: int
) -> None:
    values = random_values((rows, columns), dtype, seed)
    made = kernels.quantize(
        in_chunks(as_bytes(values), size * blocks * WIDTH[dtype]),
        dtype,
        blocksize=size,
        nested_blocksize=256 if nested else None,
    )
    with torch.compiler.set_stance("force_eager"):
        quantized, state = bnb.quantize_4bit(values, blocksize=size, compress_statistics=nested, quant_type="nf4")
        _, plain = bnb.quantize_4bit(values, blocksize=size, compress_statistics=False, quant_type="nf4")
    assert made.weight == as_bytes(quantized)
    assert made.quant_map == as_bytes(state.code)
    if not nested:
        assert made.absmax == as_bytes(state.absmax)
        assert (made.nested_absmax, made.nested_quant_map, made.offset) == (None, None, None)
        return
    # bitsandbytes' mean depends on the processor in its last bits, and so does all that it is subtracted from.
    assert made.offset == pytest.approx(state.offset.item(), rel=1e-6, abs=0)
    table = torch.from_numpy(decode.dynamic_map().copy())
    inner, outer = bnb.quantize_blockwise(plain.absmax - made.offset, code=table, blocksize=256)
    assert (made.absmax, made.nested_absmax) == (as_bytes(inner), as_bytes(outer.absmax))
    assert made.nested_quant_map == decode.dynamic_map().tobytes()


def test_the_8_bit_map_is_bitsandbytes_own() -> None:
    table = decode.dynamic_map()
    assert np.allclose(table, bnb.create_dynamic_map().numpy(), rtol=1.2e-7, atol=0)
    # In published checkpoints, quantized on processors with AVX2 or AVX-512.
    assert (
        hashlib.sha256(table.tobytes()).hexdigest()
        == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    )


QUANTIZE = """
import hashlib, sys, torch
from bnbfix.kernels import bnb
values = torch.randn(300, 700, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
raw = values.view(torch.uint8).numpy().tobytes()
made = bnb.quantize([raw], "bfloat16", blocksize=64, nested_blocksize=256)
print(hashlib.sha256(repr(made).encode()).hexdigest())
"""


def test_every_vector_unit_makes_the_same_bytes() -> None:
    found = set()
    for capability in ("default", "avx2", "avx512"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", QUANTIZE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_is_quantized_decodes_to_within_rounding_and_nothing_else_does(dtype: str, nested: int | None) -> None:
    values = random_values((40, 130), dtype, 3)
    made = kernels.quantize([as_bytes(values)], dtype, blocksize=64, nested_blocksize=nested)
    state = QuantState("nf4", 64, dtype, (40, 130), NestedState(nested, made.offset or 0.0) if nested else None)
    scales = decode.absmax_values(state, made.absmax, made.nested_absmax, made.nested_quant_map)
    slack = decode.scale_rounding(state, made.nested_absmax)
    raw = as_bytes(values)
    assert decode.within_rounding(state, made.weight, scales, slack, raw)
    block = int(np.argmax(scales))
    spoilt = bytearray(made.weight)
    spoilt[block * 32] ^= 0x80
    assert not decode.within_rounding(state, bytes(spoilt), scales, slack, raw)
    for factor in (0.5, 0.97, 1.03, 3.0):
        wrong = scales.copy()
        wrong[block] *= factor
        assert not decode.within_rounding(state, made.weight, wrong, slack, raw), factor


def test_quantizing_does_not_depend_on_torchs_default_dtype() -> None:
    raw = as_bytes(random_values((30, 100), "bfloat16", 1))
    before, made = torch.get_default_dtype(), []
    for default in (before, torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            made.append(kernels.quantize([raw], "bfloat16", blocksize=64, nested_blocksize=256))
        finally:
            torch.set_default_dtype(before)
    assert made[1:] == made[:1] * 2


def test_the_thread_that_ends_first_leaves_the_other_its_settings() -> None:
    raw, seen = as_bytes(random_values((20, 64), "bfloat16", 1)), []
    want = kernels.quantize([raw], "bfloat16", blocksize=64, nested_blocksize=256)
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first() -> Iterator[bytes]:
        yield raw
        first_is_in.set()
        assert second_is_in.wait(60)

    def second() -> Iterator[bytes]:
        second_is_in.set()
        other.join()
        seen.append(torch.get_default_dtype())
        yield raw

    def quantize(values: Iterator[bytes]) -> kernels.Quantized:
        return kernels.quantize(values, "bfloat16", blocksize=64, nested_blocksize=256)

    other = threading.Thread(target=lambda: seen.append(quantize(first())))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other.start()
        assert first_is_in.wait(60)
        assert (quantize(second()), torch.get_default_dtype()) == (want, torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert seen == [want, torch.float32]


@examples(40)
@given(st.integers(1, 60), st.integers(1, 300), dtypes, st.integers(1, 20_000), st.integers(0, 2**32 - 1))
def test_int8_rows_equal_bitsandbytes_and_the_independent_decode(
    rows: int, columns: int, dtype: str, chunk_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, generator=generator) * 3
    raw, reads = as_bytes(weight), []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return raw[offset : offset + length]

    chunks = [bytes(c) for c in kernels.dequantize_int8(read, (rows, columns), as_bytes(scales), dtype, chunk_bytes)]
    want = as_bytes(bnb.int8_vectorwise_dequant(weight, scales).to(getattr(torch, dtype)))
    assert b"".join(chunks) == want == decode.decode_int8(raw, as_bytes(scales), DTYPES[dtype])
    assert sum(n for _, n in reads) == len(raw)
    assert max(map(len, chunks)) <= max(chunk_bytes, columns * 4)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
def test_an_empty_int8_weight_has_no_values(shape: tuple[int, int]) -> None:
    def read(offset: int, length: int) -> bytes:
        raise AssertionError("there is nothing to read")

    assert list(kernels.dequantize_int8(read, shape, bytes(4 * shape[0]), "bfloat16")) == []


def test_int8_does_not_depend_on_torchs_default_dtype() -> None:
    raw, scales = bytes(range(256)) * 4, as_bytes(torch.linspace(0.1, 3, 8))

    def made() -> bytes:
        chunks = kernels.dequantize_int8(lambda at, n: raw[at : at + n], (8, 128), scales, "float32", 1000)
        return b"".join(chunks)

    want, before = made(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert made() == want
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_extreme_int8_scales_decode_alike_and_silently(dtype: str, recwarn: pytest.WarningsRecorder) -> None:
    codes = torch.tensor([-127, -1, 0, 1, 127], dtype=torch.int8)
    scales = torch.tensor([0.0, 1e-39, 6e-5, 7e4, 1e30, 3e38, math.inf])
    raw = as_bytes(codes.repeat(len(scales)))
    decoded = decode.decode_int8(raw, as_bytes(scales), DTYPES[dtype])
    chunks = kernels.dequantize_int8(lambda at, n: raw[at : at + n], (len(scales), len(codes)), as_bytes(scales), dtype)
    got, want = (torch.frombuffer(bytearray(x), dtype=getattr(torch, dtype)) for x in (b"".join(chunks), decoded))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(nan=1.0, posinf=math.inf), want.nan_to_num(nan=1.0, posinf=math.inf))
    assert want.isinf().any() and [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_within_rounding_of_nothing(value: float, recwarn: pytest.WarningsRecorder) -> None:
    values = random_values((4, 64), "float32", 1)
    values[2, 5] = value
    made = kernels.quantize([as_bytes(values)], "float32", blocksize=64, nested_blocksize=None)
    scales = np.frombuffer(made.absmax, "<f4")
    state = QuantState("nf4", 64, "float32", (4, 64), None)
    slack = decode.scale_rounding(state, None)
    assert not decode.within_rounding(state, made.weight, scales, slack, as_bytes(values))
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_nan_equals_every_nan_and_nothing_else(dtype: str) -> None:
    kind = getattr(torch, dtype)
    values = torch.tensor([1.0, math.nan, math.inf, -0.0], dtype=kind)
    other = values.clone().view(torch.int32 if dtype == "float32" else torch.int16)
    other[1] ^= 1  # another NaN
    assert decode.same_values(as_bytes(values), as_bytes(other.view(kind)), DTYPES[dtype])
    for at, value in ((0, 1.5), (1, 1.0), (2, math.nan), (2, -math.inf), (3, 0.0)):
        changed = values.clone()
        changed[at] = value
        assert not decode.same_values(as_bytes(values), as_bytes(changed), DTYPES[dtype])
    assert not decode.same_values(as_bytes(values), as_bytes(values[:3]), DTYPES[dtype])


def test_quantize_is_not_misled_by_tables_that_others_made_under_bfloat16() -> None:
    # In a process of its own: bitsandbytes keeps its first tables, made in the default dtype of that moment.
    code = (
        "import hashlib, torch\nimport bitsandbytes.functional as bnb\nfrom bnbfix.kernels import bnb as kernels\n"
        "values = torch.linspace(-3, 3, 2048).pow(3).to(torch.bfloat16)\n"
        "if {poison}:\n"
        "    torch.set_default_dtype(torch.bfloat16)\n"
        "    bnb.quantize_4bit(values.view(32, 64), quant_type='nf4', compress_statistics=True)\n"
        "raw = values.view(torch.uint8).numpy().tobytes()\n"
        "made = kernels.quantize([raw], 'bfloat16', blocksize=64, nested_blocksize=256)\n"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())\n"
    )
    right, poisoned = (python(code.format(poison=poison)) for poison in (False, True))
    assert right.returncode == poisoned.returncode == 0, poisoned.stderr
    assert poisoned.stdout == right.stdout


def python(code: str, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    extra = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, *options, "-c", extra + code], capture_output=True, text=True, timeout=120)


def test_bitsandbytes_neither_asks_for_the_kernels_package_nor_warns(tmp_path: Path) -> None:
    # A stand-in for the package is there to be found, and bitsandbytes would find it and call it.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('kernels was imported')\n")
    done = python(
        "import sys, logging\nfrom bnbfix.kernels import bnb as kernels\n"
        "assert len(list(kernels.dequantize_int8(lambda at, n: bytes(n), (1, 4), bytes(4), 'float32'))) == 1\n"
        "assert 'bitsandbytes.backends.cpu.ops' in sys.modules, 'nothing was tested'\n"
        "assert 'kernels' not in sys.modules, 'the mark was left behind'\n"
        "assert logging.getLogger('bitsandbytes.backends.cpu.ops').level == logging.NOTSET\n",
        "-W",
        "error::UserWarning:bitsandbytes",
        path=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_kernels_package_that_is_loaded_already_stays() -> None:
    done = python(
        "import sys\nimport bitsandbytes.functional\nmine = sys.modules['kernels'] = type(sys)('kernels')\n"
        "from bnbfix.kernels import bnb as kernels\n"
        "assert len(list(kernels.dequantize_int8(lambda at, n: bytes(n), (1, 4), bytes(4), 'float32'))) == 1\n"
        "assert sys.modules['kernels'] is mine\n"
    )
    assert done.returncode == 0, done.stderr


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.cuda
@needs_cuda
def test_cuda_equals_the_cpu() -> None:
    shapes = (((64, 256), 64), ((33, 50), 32), ((7, 9), 64), ((1, 501), 128), ((3, 5000), 4096))
    for quant_type, dtype, nested, (shape, size) in product(
        ("nf4", "fp4"), DTYPES, (None, NestedState(256, 0.25)), shapes
    ):
        quantized = random_weight(QuantState(quant_type, size, dtype, shape, nested), 9)
        assert differences(kernel_bytes(quantized, "cuda:0", 4096), kernel_bytes(quantized), quantized) == [], (
            quantized.state
        )


@pytest.mark.cuda
@needs_cuda
def test_chunks_from_cuda_stay_valid_while_others_come() -> None:
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (4096, 1024), NestedState(256, 0.25)))
    for chunk_bytes in (4096, 100_000, 4 << 20):
        chunks = list(kernels.dequantize(quantized.tensor, "cuda:0", chunk_bytes))
        assert b"".join(chunks) == kernel_bytes(quantized), chunk_bytes


@pytest.mark.cuda
@needs_cuda
def test_cuda_equals_a_naive_decode_at_extreme_scales() -> None:
    for quant_type, dtype, scales in product(("nf4", "fp4"), DTYPES, EXTREMES):
        quantized = random_weight(QuantState(quant_type, 32, dtype, (3, 100), None), 3, scales)
        assert differences(kernel_bytes(quantized, "cuda:0"), naive_bytes(quantized), quantized) == [], (dtype, scales)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_code_8_of_fp4_has_the_same_sign_on_cuda(scale: float) -> None:
    state = QuantState("fp4", 64, "float32", (5, 100), None)
    quantized = replace(random_weight(state, scales=(scale,)), raw=b"\x88" * state.quantized_nbytes)
    assert kernel_bytes(quantized, "cuda:0") == kernel_bytes(quantized)


def test_memory_of_the_cpu_that_runs_out_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = iter([bytes(64)])
    monkeypatch.setattr(torch, "frombuffer", lambda *arguments, **options: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(MemoryError, match="allocate memory"):
        kernels.quantize(chunks, "bfloat16", blocksize=64, nested_blocksize=None)
