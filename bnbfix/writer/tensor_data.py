"""The bytes that operations make: ranges copied, weights decoded or quantized, a few MB at a time."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Tensor, Weight
from ..checkpoint.source import Source
from ..kernels.bnb import QuantizedTensor, dequantize, dequantize_int8, quantize
from ..planner.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Quantize, Slice

CHUNK = 4 << 20  # bytes at a time; a multiple of every blocksize in every dtype


def copy_range(source: Source, file: str, offset: int, length: int) -> Iterator[bytes]:
    """Bytes of a file of the source."""
    for at in range(offset, offset + length, CHUNK):
        yield source.read(file, [(at, min(CHUNK, offset + length - at))])[0]


def quantized_tensor(source: Source, weight: Weight) -> QuantizedTensor:
    """A quantized weight of a source, as the kernels take it: statistics in memory, quantized bytes by ranges."""
    assert weight.state is not None

    def read(offset: int, length: int) -> bytes:
        return source.read(weight.tensor.shard, [(weight.tensor.offset + offset, length)])[0]

    return QuantizedTensor(
        state=weight.state,
        read=read,
        absmax=_whole(source, weight.state_tensors[".absmax"]),
        nested_absmax=_maybe(source, weight.state_tensors.get(".nested_absmax")),
        nested_quant_map=_maybe(source, weight.state_tensors.get(".nested_quant_map")),
    )


def weight_values(source: Source, weights: tuple[Weight, ...], dtype: str, device: str) -> Iterator[bytes | memoryview]:
    """The values of weights, one after the other, little-endian in `dtype` (safetensors name).

    4-bit weights are decoded in the dtype their quant state names and must be of `dtype`, as plain ones must.
    """
    for weight in weights:
        if weight.state is not None:
            yield from dequantize(quantized_tensor(source, weight), device, CHUNK)
        elif weight.int8:
            yield from _int8(source, weight, dtype)
        else:
            yield from copy_range(source, weight.tensor.shard, weight.tensor.offset, weight.tensor.info.nbytes)


def _int8(source: Source, weight: Weight, dtype: str) -> Iterator[memoryview]:
    def read(offset: int, length: int) -> bytes:
        return source.read(weight.tensor.shard, [(weight.tensor.offset + offset, length)])[0]

    rows, columns = weight.shape
    kind = next(torch for torch, name in qs.DTYPES.items() if name == dtype)
    yield from dequantize_int8(read, (rows, columns), _whole(source, weight.state_tensors[".SCB"]), kind, CHUNK)


def quantized_parts(source: Source, op: Quantize, device: str) -> Iterator[bytes]:
    """The tensors of a quantized weight, in the order of `op.infos()`."""
    made = quantize(
        quantize_input(source, op, device),
        op.dtype,
        device,
        blocksize=BLOCKSIZE,
        nested_blocksize=NESTED_BLOCKSIZE if op.double else None,
    )
    parts = {
        "": made.weight,
        ".absmax": made.absmax,
        ".quant_map": made.quant_map,
        ".nested_absmax": made.nested_absmax,
        ".nested_quant_map": made.nested_quant_map,
    }
    for info in op.infos():
        suffix = info.name[len(op.name) :]
        yield op.state_json(made.offset or 0.0) if ".quant_state." in suffix else parts[suffix] or b""


def quantize_input(source: Source, op: Quantize, device: str) -> Iterator[bytes | memoryview]:
    """The values that a weight is quantized from."""
    if isinstance(op.values, Slice):
        tensor = op.values.tensor
        yield from copy_range(source, tensor.shard, tensor.offset + op.values.begin, op.values.nbytes)
    else:
        yield from weight_values(source, (op.values,), qs.DTYPES[op.dtype], device)


def _whole(source: Source, t: Tensor) -> bytes:
    return source.read(t.shard, [(t.offset, t.info.nbytes)])[0]


def _maybe(source: Source, t: Tensor | None) -> bytes | None:
    return _whole(source, t) if t is not None else None
