"""The bytes that operations make: ranges copied, weights decoded or quantized, a few MB at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from ..checkpoint import quant_state as qs
from ..checkpoint.checkpoint import Tensor, Weight
from ..checkpoint.source import Source
from ..kernels.bnb import Quantized, QuantizedTensor, block_scales, dequantize, dequantize_int8, quantize
from ..planner.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Dequantize, Quantize, Rows, Slice, Split

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
        read=_reader(source, weight.tensor),
        absmax=parts[".absmax"].read(source),
        nested_absmax=nested.get(".nested_absmax"),
        nested_quant_map=nested.get(".nested_quant_map"),
    )


def weight_values(source: Source, op: Dequantize, device: str) -> Iterator[bytes | memoryview]:
    """The values of weights, in order, little-endian.

    4-bit weights are decoded in the dtype their quant state names, which must be the operation's; so must the dtype of
    unquantized weights.
    """
    yield from order_values(op, lambda weight: _values_of(source, weight, op.dtype, device))


def _values_of(source: Source, weight: Weight, dtype: str, device: str) -> Iterator[bytes | memoryview]:
    if weight.state is not None:
        yield from dequantize(quantized_tensor(source, weight), device, CHUNK_BYTES)
    elif weight.int8:
        rows, columns = weight.shape
        scales = weight.state_tensors[".SCB"].read(source)
        torch_dtype = next(torch for torch, name in qs.DTYPES.items() if name == dtype)
        yield from dequantize_int8(_reader(source, weight.tensor), (rows, columns), scales, torch_dtype, CHUNK_BYTES)
    else:
        yield from copy_range(source, weight.tensor.shard, weight.tensor.offset, weight.tensor.info.nbytes)


def order_values(
    op: Dequantize, values_of: Callable[[Weight], Iterable[bytes | memoryview]]
) -> Iterator[bytes | memoryview]:
    """The values of an operation's weights, in the order in which its tensor has them."""
    if not op.transposed:
        for weight in op.weights:
            yield from values_of(weight)
        return
    for at in range(0, len(op.weights), op.transposed):
        together = op.weights[at : at + op.transposed]
        rows, columns = sum(weight.shape[0] for weight in together), together[0].shape[1]
        yield from _cut_columns(chain.from_iterable(map(values_of, together)), (rows, columns), 0, columns)


def _cut_columns(values: Iterable[bytes | memoryview], shape: tuple[int, int], first: int, end: int) -> Iterator[bytes]:
    """Columns of a matrix of values, one after the other. It is in memory whole; what comes of it is not."""
    from ..kernels.reference import cut_columns  # here, since it imports numpy

    data, (rows, columns) = b"".join(values), shape
    step = max(1, CHUNK_BYTES * columns // max(1, len(data)))
    for at in range(first, end if data else first, step):
        yield cut_columns(data, rows, columns, at, min(step, end - at))


def _reader(source: Source, tensor: Tensor) -> Callable[[int, int], bytes]:
    """Reads (offset, length) of a tensor."""

    def read(offset: int, length: int) -> bytes:
        return source.read(tensor.shard, [(tensor.offset + offset, length)])[0]

    return read


def made_parts(source: Source, op: Quantize | Split, device: str) -> Iterator[bytes]:
    """The tensors of a weight that is made with its quant state, in the order of `op.infos()`."""
    if isinstance(op, Split):
        made = _cut_matrix(source, op)
    else:
        nested_blocksize = NESTED_BLOCKSIZE if op.double else None
        values = quantize_input(source, op, device)
        made = quantize(values, op.dtype, blocksize=BLOCKSIZE, nested_blocksize=nested_blocksize)
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
        yield from slice_values(source, op.values)
    else:
        yield from cut_values(op.values, dequantize(quantized_rows(source, op.values), device, CHUNK_BYTES))


def slice_values(source: Source, values: Slice) -> Iterator[bytes]:
    """The values of a matrix inside an unquantized tensor."""
    tensor = values.tensor
    matrix = copy_range(source, tensor.shard, tensor.offset + values.begin, values.nbytes)
    if values.columns is None:
        yield from matrix
    else:
        rows, columns = tensor.info.shape[-2:]
        yield from _cut_columns(matrix, (rows, columns), *values.columns)


def quantized_rows(source: Source, rows: Rows) -> QuantizedTensor:
    """The quantized weight of which rows are part, cut down to the blocks that they are in."""
    weight, state = rows.weight, rows.state
    begin = rows.begin // rows.unit * rows.unit
    end = min(-(-(rows.begin + rows.count) // rows.unit) * rows.unit, state.numel)

    def cut(suffix: str, values: int, width: int) -> bytes:
        first, last = begin // values, -(-end // values)
        return _reader(source, weight.state_tensors[suffix])(first * width, (last - first) * width)

    read = _reader(source, weight.tensor)
    return QuantizedTensor(
        state=state._replace(shape=(end - begin,)),
        read=lambda offset, length: read(begin // 2 + offset, length),
        absmax=cut(".absmax", state.blocksize, 1 if state.nested else 4),
        nested_absmax=cut(".nested_absmax", rows.unit, 4) if state.nested else None,
        nested_quant_map=weight.state_tensors[".nested_quant_map"].read(source) if state.nested else None,
    )


def cut_values(rows: Rows, decoded: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The values of rows, out of those of `quantized_rows`."""
    width = qs.WIDTH[rows.state.dtype]
    skip, left = rows.begin % rows.unit * width, rows.count * width
    for chunk in decoded:
        part = chunk[skip : skip + left]
        skip, left = max(0, skip - len(chunk)), left - len(part)
        if part:
            yield part


def _cut_matrix(source: Source, op: Split) -> Quantized:
    from ..kernels.reference import code_table  # here, since it imports numpy

    quantized, state = quantized_rows(source, op.values), op.state()
    skip = op.values.begin % op.values.unit
    weight, quant_map = quantized.read(skip // 2, state.quantized_nbytes), code_table(state.quant_type).tobytes()
    if state.nested or not quantized.state.nested:
        nested = quantized.nested_absmax, quantized.nested_quant_map
        return Quantized(weight, quantized.absmax, quant_map, *nested, offset=None)
    first = skip // state.blocksize
    absmax = block_scales(quantized)[4 * first : 4 * (first + state.blocks)]
    return Quantized(weight, absmax, quant_map, None, None, None)
