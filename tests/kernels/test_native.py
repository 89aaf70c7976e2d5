"""bitsandbytes' library called without torch, against the same kernels through torch."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bnbfix.checkpoint.quant_state import NestedState, QuantState
from bnbfix.kernels import bnb as kernels
from bnbfix.kernels import native
from tests.support.quantized import Quantized, differences, examples, kernel_bytes, random_weight, states

here = pytest.mark.skipif(native.load_library() is None, reason="this release of bitsandbytes is called through torch")


@pytest.fixture
def loaded_again() -> Iterator[None]:
    """Makes the library be searched for again, in the test and after it."""
    native.load_library.cache_clear()
    yield
    native.load_library.cache_clear()


def through_torch(quantized: Quantized, chunk_bytes: int) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_library", lambda: None)
        return kernel_bytes(quantized, "cpu", chunk_bytes)


@here
@examples(150)
@given(states, st.integers(0, 2**32 - 1), st.integers(1, 100_000))
@example(QuantState("fp4", 4096, "float16", (3, 5000), NestedState(256, 0.25)), 1, 4 << 20)
@example(QuantState("nf4", 32, "float16", (1, 1185), None), 340, 1)  # differs where the build is one for CUDA
def test_with_and_without_torch_is_the_same_to_the_bit(state: QuantState, seed: int, chunk_bytes: int) -> None:
    quantized = random_weight(state, seed)
    assert kernels.native_decoder(quantized.tensor) is not None
    assert (
        differences(kernel_bytes(quantized, "cpu", chunk_bytes), through_torch(quantized, chunk_bytes), quantized) == []
    )


@pytest.mark.parametrize("scales", [(1.0, 1e-39), (float("nan"), 1e-39), (-1e-37,)])
def test_scales_whose_values_the_kernel_would_flush_to_zero_go_through_torch(scales: tuple[float, ...]) -> None:
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (2, 64), None), scales=scales)
    assert kernels.native_decoder(quantized.tensor) is None


@here
@pytest.mark.parametrize("scales", [(1.0, 0.0), (float("nan"), float("inf")), (-1.0, -0.0)])
def test_other_scales_do_not(scales: tuple[float, ...]) -> None:
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (2, 64), None), scales=scales)
    assert kernels.native_decoder(quantized.tensor) is not None


@here
def test_threads_change_no_bit() -> None:
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (999, 640), NestedState(256, 0.1)))
    made = set()
    for count in (1, 2, 3):
        kernels.use_threads(count)
        made.add(kernel_bytes(quantized))
    kernels.use_threads(1)
    assert len(made) == 1


def test_without_the_library_torchs_number_of_threads_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "load_library", lambda: None)
    kernels.use_threads(before + 1)
    try:
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("loaded_again")
def test_a_release_that_was_not_tested_is_called_through_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "version", lambda name: "0.51.0")
    with caplog.at_level("INFO", "bnbfix.kernels"):
        assert native.load_library() is None
    assert caplog.messages == [f"bitsandbytes 0.51.0 on {sys.platform} is called through torch"]
    quantized = random_weight(QuantState("nf4", 64, "bfloat16", (8, 64), None))
    assert kernel_bytes(quantized) == through_torch(quantized, 4 << 20)


@pytest.mark.usefixtures("loaded_again")
def test_without_bitsandbytes_or_on_another_system_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise native.PackageNotFoundError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "version", missing)
        assert native.load_library() is None
    native.load_library.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert native.load_library() is None


@here
@pytest.mark.usefixtures("loaded_again")
def test_openmp_is_taken_from_torch_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(path: str) -> ctypes.CDLL:
        asked.append(Path(path).name)
        if len(asked) == 1:
            raise OSError("libgomp.so.1: cannot open shared object file")
        return CDLL(path)

    CDLL = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert native.load_library() is not None
    assert asked == ["libbitsandbytes_cpu.so", "libgomp.so.1", "libbitsandbytes_cpu.so"]


@pytest.mark.usefixtures("loaded_again")
def test_a_library_that_cannot_be_loaded_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> ctypes.CDLL:
        raise OSError("wrong ELF class")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with caplog.at_level("INFO", "bnbfix.kernels"):
        assert native.load_library() is None
    if native.version("bitsandbytes") in native.RELEASES:
        assert caplog.messages[0].endswith("is called through torch: wrong ELF class")


@here
def test_decoding_imports_neither_torch_nor_bitsandbytes() -> None:
    code = (
        "import sys\nfrom bnbfix.kernels import bnb as kernels\nfrom bnbfix.checkpoint.quant_state import QuantState\n"
        "state = QuantState('nf4', 64, 'bfloat16', (2, 64), None)\nkernels.use_threads(1)\n"
        "quantized = kernels.QuantizedTensor(state, lambda at, n: bytes(range(n)), b'\\0\\0\\x80?' * 2, None, None)\n"
        "print(b''.join(kernels.dequantize(quantized, 'cpu')).hex())\n"
        "print({'torch', 'bitsandbytes'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    values, left = done.stdout.split()
    assert (np.frombuffer(bytes.fromhex(values), "<u2")[:2] == 0xBF80).all(), "code 0 of NF4 is -1"
    assert left == "set()"
