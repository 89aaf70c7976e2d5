"""Groups a quantized weight with its quant-state tensors and checks every size in them. Standard library only.

bitsandbytes trusts a quant state: a short absmax or a wrong blocksize gives wrong numbers or reads past the buffer,
without an error. So nothing reaches a kernel before `check_state` has passed. Layout of the quant-state tensors:
bitsandbytes/functional.py, `QuantState.as_dict(packed=True)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from reprlib import repr as shorten  # the JSON may hold thousands of characters; an error is one line
from typing import Any, NamedTuple

from ..errors import QuantStateError
from .safetensors import TensorInfo

QUANT_TYPES = ("nf4", "fp4")
STATE_SUFFIXES = tuple(f".quant_state.bitsandbytes__{q}" for q in QUANT_TYPES)
FOUR_BIT_SUFFIXES = (*STATE_SUFFIXES, ".nested_absmax", ".nested_quant_map", ".absmax", ".quant_map")
WEIGHT_FORMAT = ".weight_format"
INT8_SUFFIXES = (".SCB", WEIGHT_FORMAT)
WEIGHT_FORMATS = ("row", "col32", "col_turing", "col_ampere")  # of bitsandbytes/utils.py, by number
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The dtypes that a weight is decoded to, with their safetensors names.
WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes for each value
DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
F32_MAX = (2 - 2**-23) * 2.0**127
MAX_STATE_JSON = 4096  # bytes; real ones take about 200

_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


class NestedState(NamedTuple):
    """Double quantization: absmax itself is 8 bit, in blocks of `blocksize`, around `offset`."""

    blocksize: int
    offset: float


class QuantState(NamedTuple):
    """What the JSON of a quantized weight says; `shape` and `dtype` are those of the weight before quantization."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested: NestedState | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def quantized_nbytes(self) -> int:
        return (self.numel + 1) // 2

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize)

    @property
    def safetensors_dtype(self) -> str:
        """The safetensors name of the dtype that the weight is decoded to."""
        return DTYPES[self.dtype]


def split_state_tensor(name: str) -> tuple[str, str] | None:
    """Return (weight name, suffix) if `name` is a quant-state tensor, else None."""
    for suffix in FOUR_BIT_SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)], suffix
    for suffix in INT8_SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)] + ".weight", suffix
    return None


def state_tensor_name(weight: str, suffix: str) -> str:
    """Return the tensor name that `split_state_tensor` splits.

    4-bit suffixes are appended to the weight's name, LLM.int8 ones replace "weight".
    """
    return (weight.removesuffix(".weight") if suffix in INT8_SUFFIXES else weight) + suffix


def parse_state(raw: bytes, suffix: str, where: str) -> QuantState:
    """Decode the JSON of a `.quant_state.bitsandbytes__*` tensor.

    Raises QuantStateError when it is not JSON, lacks a key, has an unknown one, or a value that bitsandbytes never
    writes.
    """

    def bad(why: str) -> QuantStateError:
        return QuantStateError(f"damaged quant state: {why}", where=where, hint="Quantize the model again.")

    if not raw:
        raise bad("empty")
    try:
        doc: Any = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise bad(f"not JSON ({e})") from e
    if not isinstance(doc, dict) or not set(doc) >= _KEYS:
        raise bad(f"needs the keys {', '.join(sorted(_KEYS))}")
    # bitsandbytes takes "x.blocksize" for "blocksize", so a key left unread could overrule one that was checked.
    if unknown := set(doc) - _KEYS - _NESTED_KEYS:
        raise bad(f"unknown key {shorten(min(unknown))}")
    quant_type, blocksize, dtype, shape = doc["quant_type"], doc["blocksize"], doc["dtype"], doc["shape"]
    if quant_type not in QUANT_TYPES or not suffix.endswith(f"__{quant_type}"):
        raise bad(f"quant_type {shorten(quant_type)} in a tensor named {suffix}")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise bad(f"blocksize {shorten(blocksize)} is not one of {', '.join(map(str, BLOCKSIZES))}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"dtype {shorten(dtype)} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 < n < 2**40 for n in shape):
        raise bad(f"shape {shorten(shape)} is not a list of sizes")
    if math.prod(shape) >= 2**63:
        raise bad(f"shape {shorten(shape)} is more than 64 bits can count")
    nested = None
    if _NESTED_KEYS & set(doc):
        size, offset = doc.get("nested_blocksize"), doc.get("nested_offset", "missing")
        if type(size) is not int or size not in BLOCKSIZES:
            raise bad(f"nested_blocksize {shorten(size)} is not one of {', '.join(map(str, BLOCKSIZES))}")
        if doc.get("nested_dtype") != "float32":
            raise bad(f"nested_dtype {shorten(doc.get('nested_dtype'))} is not float32")
        # What F32 cannot hold becomes infinite there; the comparison refuses NaN too.
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) <= F32_MAX:
            raise bad(f"nested_offset {shorten(offset)} is not a finite number")
        nested = NestedState(size, float(offset))
    return QuantState(quant_type, blocksize, dtype, tuple(shape), nested)


def check_state(state: QuantState, weight: TensorInfo, state_tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Cross-check a weight, its quant-state tensors (by suffix) and what its JSON says.

    Raises QuantStateError for the first size or dtype that does not match, or a missing quant-state tensor.
    """

    def bad(why: str) -> QuantStateError:
        return QuantStateError(why, where=where, hint="Quantize the model again; no kernel may see this weight.")

    if weight.nbytes != state.quantized_nbytes:
        raise bad(
            f"quant state says shape {shorten(list(state.shape))}, which quantizes to "
            f"{state.quantized_nbytes:,} bytes; the weight has {weight.nbytes:,}"
        )
    nested = state.nested
    expected: dict[str, tuple[str, int]] = {
        ".absmax": ("F32" if nested is None else "U8", state.blocks),
        ".quant_map": ("F32", 16),
    }
    if nested is not None:
        expected[".nested_absmax"] = ("F32", -(-state.blocks // nested.blocksize))
        expected[".nested_quant_map"] = ("F32", 256)
    for suffix, (dtype, count) in expected.items():
        t = state_tensors.get(suffix)
        if t is None:
            raise bad(f"its quant-state tensor {suffix[1:]} is missing")
        if t.dtype != dtype or math.prod(t.shape) != count:
            raise bad(f"{suffix[1:]} is {t.dtype} {list(t.shape)}; the quant state asks for {dtype} [{count}]")
    for suffix in state_tensors:
        if suffix in INT8_SUFFIXES:
            raise bad(f"it has both a 4-bit quant state and {suffix[1:]}, of two quantizations")
        if suffix not in expected and suffix not in STATE_SUFFIXES:
            raise bad(f"{suffix[1:]} is there, but the quant state names no double quantization")
    if sum(suffix in state_tensors for suffix in STATE_SUFFIXES) != 1:
        raise bad("it has both an nf4 and an fp4 quant state")


def is_int8(state_tensors: Mapping[str, Any]) -> bool:
    """Return True for the quant-state tensors of an LLM.int8 weight."""
    return ".SCB" in state_tensors


def check_int8_state(weight: TensorInfo, state_tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Cross-check an LLM.int8 weight [out, in] with its scales, SCB [out] in F32.

    Raises QuantStateError when they do not match, or the weight has 4-bit quant-state tensors too.
    """
    if strange := sorted(set(state_tensors) - set(INT8_SUFFIXES)):
        raise QuantStateError(f"it has both SCB and {strange[0][1:]}, of two quantizations", where=where)
    scales = state_tensors[".SCB"]
    if 0 in weight.shape:
        raise QuantStateError(f"LLM.int8 weight of shape {list(weight.shape)} is empty", where=where)
    if weight.dtype != "I8" or len(weight.shape) != 2 or scales.dtype != "F32" or scales.shape != weight.shape[:1]:
        raise QuantStateError(
            f"SCB is {scales.dtype} {list(scales.shape)} next to a weight of {weight.dtype} {list(weight.shape)}; "
            "LLM.int8 has I8 [out, in] and F32 [out]",
            where=where,
        )
    layout = state_tensors.get(WEIGHT_FORMAT)
    if layout is not None and (layout.dtype, math.prod(layout.shape)) != ("U8", 1):
        raise QuantStateError(f"weight_format is {layout.dtype} {list(layout.shape)[:8]}, not one U8", where=where)


def check_weight_format(raw: bytes, where: str) -> None:
    """Raise QuantStateError for an LLM.int8 weight whose bytes are not in row order.

    `raw` is its weight_format. bitsandbytes before 0.45 had tiled formats, each for one type of GPU.
    """
    if (number := raw[0]) != WEIGHT_FORMATS.index("row"):
        name = WEIGHT_FORMATS[number] if number < len(WEIGHT_FORMATS) else number
        raise QuantStateError(f"its weight_format is {name}, and bitsandbytes reads only row", where=where)
