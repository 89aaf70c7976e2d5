"""The bytes that operations make: ranges copied, weights decoded or quantized, a few MB at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Weight
from ..checkpoint.source import Source
from ..kernels.bnb import QuantizedTensor, dequantize, dequantize_int8, quantize
from ..planner.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Quantize, Slice

CHUNK_BYTES = 4 << 20  # at a time; a multiple of every blocksize in every dtype


def copy_range(source: Source, file: str, offset: int, length: int) -> Iterator[bytes]:
    """Bytes of a file of the source."""
    for at in range(offset, offset + length, CHUNK_BYTES):
        yield source.read(file, [(at, min(CHUNK_BYTES, offset + length - at))])[0]


def quantized_tensor(source: Source, weight: Weight) -> QuantizedTensor:
    """A quantized weight of a source, as the kernels take it: statistics in memory, quantized bytes by ranges."""
    assert weight.state is not None
    parts = weight.state_tensors
    nested = {s: parts[s].read(source) for s in (".nested_absmax", ".nested_quant_map") if s in parts}
    return QuantizedTensor(
        state=weight.state,
        read=_reader(source, weight),
        absmax=parts[".absmax"].read(source),
        nested_absmax=nested.get(".nested_absmax"),
        nested_quant_map=nested.get(".nested_quant_map"),
    )


def weight_values(source: Source, weights: tuple[Weight, ...], dtype: str, device: str) -> Iterator[bytes | memoryview]:
    """The values of weights, in order, little-endian in `dtype` (safetensors name).

    4-bit weights are decoded in the dtype their quant state names, which must be `dtype`; so must the dtype of
    unquantized weights.
    """
    for weight in weights:
        if weight.state is not None:
            yield from dequantize(quantized_tensor(source, weight), device, CHUNK_BYTES)
        elif weight.int8:
            rows, columns = weight.shape
            scales = weight.state_tensors[".SCB"].read(source)
            torch_dtype = next(torch for torch, name in qs.DTYPES.items() if name == dtype)
            yield from dequantize_int8(_reader(source, weight), (rows, columns), scales, torch_dtype, CHUNK_BYTES)
        else:
            yield from copy_range(source, weight.tensor.shard, weight.tensor.offset, weight.tensor.info.nbytes)


def _reader(source: Source, weight: Weight) -> Callable[[int, int], bytes]:
    """Reads (offset, length) of a weight's own tensor."""

    def read(offset: int, length: int) -> bytes:
        return source.read(weight.tensor.shard, [(weight.tensor.offset + offset, length)])[0]

    return read


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
