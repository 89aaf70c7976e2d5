"""The layout of output shards: what each tensor is made from, and where its bytes go. Offsets are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint import quant_state as qs
from ..checkpoint import safetensors as st
from ..checkpoint.checkpoint import Tensor, Weight

QUANT_TYPE = "nf4"  # what weights are quantized to: vLLM decodes experts with this table whatever they say
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256  # bitsandbytes' own choice (functional.py, `quantize_4bit`)
STATE_JSON = 256  # bytes at least; space-padded, since the offset's length is known only when it has been computed
ALIGNMENT = 8


class Slice(NamedTuple):
    """A matrix inside an unquantized tensor: `begin` and `nbytes` count from the tensor's first byte.

    With `columns`, (the first, the one after the last), it is these of the tensor's matrix there, as rows.
    """

    tensor: Tensor
    begin: int
    nbytes: int
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rows:
    """A matrix inside a quantized weight: so many values of it, from the one of number `begin` on."""

    weight: Weight
    begin: int
    count: int

    @property
    def state(self) -> qs.QuantState:
        assert self.weight.state is not None
        return self.weight.state

    @property
    def unit(self) -> int:
        """How many values have statistics of their own: those of a block, or of a block of blocks."""
        nested = self.state.nested
        return self.state.blocksize * (nested.blocksize if nested else 1)


class Copy(NamedTuple):
    """The bytes of a tensor of the source."""

    origin: Tensor


class Dequantize(NamedTuple):
    """The values of weights, dequantized where they are quantized, one after the other, in one dtype."""

    weights: tuple[Weight, ...]
    dtype: str  # safetensors name
    transposed: int = 0  # so many weights, one below the other, by their columns


@dataclass(frozen=True)
class MadeWeight:
    """A weight and its quant-state tensors, made together as one run of bytes."""

    name: str
    shape: tuple[int, int]

    def state(self, offset: float = 0.0) -> qs.QuantState:
        """Its quant state. The offset of a double quantization that is still to be made is known only afterwards."""
        raise NotImplementedError

    def infos(self) -> tuple[st.TensorInfo, ...]:
        """Its tensors, widest first, all sizes known; a multiple of 8 bytes together: what follows is aligned."""
        state = self.state()
        parts = [(".absmax", "F32", state.blocks)]
        if state.nested:
            outer = -(-state.blocks // state.nested.blocksize)
            parts = [(".nested_absmax", "F32", outer), (".nested_quant_map", "F32", 256)]
        parts.append((".quant_map", "F32", 16))
        parts.append(("", "U8", state.quantized_nbytes))
        if state.nested:
            parts.append((".absmax", "U8", state.blocks))
        used = sum(st.tensor_nbytes(dtype, [n]) for _, dtype, n in parts)
        suffix = f".quant_state.bitsandbytes__{state.quant_type}"
        parts.append((suffix, "U8", STATE_JSON + -(used + STATE_JSON) % ALIGNMENT))
        out, at = [], 0
        for suffix, dtype, n in parts:
            end = at + st.tensor_nbytes(dtype, [n])
            out.append(st.TensorInfo(self.name + suffix, dtype, (n, 1) if suffix == "" else (n,), at, end))
            at = end
        return tuple(out)

    def state_json(self, offset: float = 0.0) -> bytes:
        """The JSON as `QuantState.as_dict(packed=True)` writes it, padded to its tensor's size."""
        state = self.state(offset)
        doc: dict[str, object] = {
            "quant_type": state.quant_type,
            "blocksize": state.blocksize,
            "dtype": state.dtype,
            "shape": list(state.shape),
        }
        if nested := state.nested:
            doc |= {"nested_blocksize": nested.blocksize, "nested_dtype": "float32", "nested_offset": nested.offset}
        return json.dumps(doc).encode().ljust(self.infos()[-1].nbytes)


@dataclass(frozen=True)
class Quantize(MadeWeight):
    """A matrix quantized to NF4."""

    dtype: str  # torch name of the values' dtype
    values: Slice | Rows
    double: bool  # with double quantization

    def state(self, offset: float = 0.0) -> qs.QuantState:
        nested = qs.NestedState(NESTED_BLOCKSIZE, offset) if self.double else None
        return qs.QuantState(QUANT_TYPE, BLOCKSIZE, self.dtype, self.shape, nested)


@dataclass(frozen=True)
class Split(MadeWeight):
    """A matrix cut out of a quantized weight between two blocks: the same quantized bytes and scales.

    Where a block of a double quantization would be cut, the scales are stored in float32.
    """

    values: Rows

    def state(self, offset: float = 0.0) -> qs.QuantState:
        state = self.values.state
        return state._replace(shape=self.shape, nested=None if self.values.count % self.values.unit else state.nested)


Op = Copy | Dequantize | Quantize | Split


def tensors_read(op: Op) -> list[Tensor]:
    """The tensors of the source that an operation reads, quant-state tensors included."""
    if isinstance(op, Copy):
        return [op.origin]
    if isinstance(op, Dequantize):
        weights = op.weights
    elif isinstance(op.values, Slice):
        return [op.values.tensor]
    else:
        weights = (op.values.weight,)
    return [t for w in weights for t in (w.tensor, *w.state_tensors.values())]


def bytes_read(op: Op) -> int:
    """How many bytes of the source an operation reads."""
    values = op.values if isinstance(op, Quantize | Split) else None
    if isinstance(values, Slice):
        return values.nbytes
    whole = sum(t.info.nbytes for t in tensors_read(op))
    return whole * values.count // values.state.numel if isinstance(values, Rows) else whole


class TensorPlan(NamedTuple):
    """One tensor of an output shard and what it is made from. All tensors of one MadeWeight are next to each other."""

    info: st.TensorInfo  # name, dtype, shape and offsets in the output
    op: Op

    @property
    def copied(self) -> bool:
        return isinstance(self.op, Copy)


class ShardPlan(NamedTuple):
    """One output shard: header bytes, then its tensors in order. `copied`: equal to its source file, header and all."""

    name: str
    header: bytes
    tensors: tuple[TensorPlan, ...]
    copied: bool
    size: int  # bytes of the file

    @property
    def data_start(self) -> int:
        return self.size - sum(t.info.nbytes for t in self.tensors)

    def runs(self) -> Iterable[tuple[TensorPlan, ...]]:
        """Its tensors in order, those of one MadeWeight together."""
        run: list[TensorPlan] = []
        for t in self.tensors:
            if run and not (isinstance(t.op, MadeWeight) and t.op is run[-1].op):
                yield tuple(run)
                run = []
            run.append(t)
        if run:
            yield tuple(run)


def plan_copy(origin: Tensor, name: str | None = None, *, column: bool = False) -> TensorPlan:
    """A tensor copied byte for byte, perhaps under another name; `column` declares it U8 [N, 1]."""
    info = origin.info._replace(name=name) if name else origin.info
    return TensorPlan(info._replace(dtype="U8", shape=(info.nbytes, 1)) if column else info, Copy(origin))


def plan_dequantize(
    name: str, weights: tuple[Weight, ...], dtype: str, shape: tuple[int, ...], transposed: int = 0
) -> TensorPlan:
    """A tensor of the values of weights, in `dtype` (safetensors name)."""
    info = st.TensorInfo(name, dtype, shape, 0, st.tensor_nbytes(dtype, shape))
    return TensorPlan(info, Dequantize(weights, dtype, transposed))


def plan_made(op: Quantize | Split) -> list[TensorPlan]:
    """The tensors of a weight that is made with its quant state."""
    return [TensorPlan(info, op) for info in op.infos()]


def lay_out_shard(
    name: str, tensors: Iterable[TensorPlan], metadata: Mapping[str, str], old: st.Header | None
) -> ShardPlan:
    """Gives every tensor its offsets. `old` is the header of the source file of that name, if there is one.

    Widest dtype first, as the safetensors library lays files out: readers view a tensor's bytes in place, so its offset
    has to be a multiple of its element size. Within a dtype the order of the source keeps copies adjacent. Weights made
    with their quant states come before all: each such run keeps its own order and is a multiple of 8 bytes long.
    """

    def order(t: TensorPlan) -> int:
        return 0 if isinstance(t.op, MadeWeight) else 1000 - st.DTYPE_BITS[t.info.dtype]

    placed, at = [], 0
    for t in sorted(tensors, key=order):
        if t.info.begin != at:
            t = TensorPlan(t.info._replace(begin=at, end=at + t.info.nbytes), t.op)
        placed.append(t)
        at = t.info.end
    if old is not None and all(t.copied for t in placed) and [t.info for t in placed] == list(old.tensors.values()):
        return ShardPlan(name, b"", tuple(placed), True, old.file_size)
    header = st.build_header([t.info for t in placed], metadata)
    return ShardPlan(name, header, tuple(placed), False, len(header) + at)
