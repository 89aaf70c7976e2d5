"""Read, validate and build safetensors headers. Standard library only.

A file is: 8 bytes little-endian header length N, N bytes of JSON, then the data. Every tensor's `data_offsets`
count from the start of the data; together they must cover it without overlap, hole or rest. The rules are those of
the safetensors library (tensor.rs, `validate`), and stricter ones: no duplicate names, no unknown keys.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import HeaderError

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_USEFUL_HEADER = 25_000_000  # bytes; the longest that the Hub parses, and far above real ones
LENGTH_BYTES = 8

# Bits for each element. F4 and F6 elements take less than one byte.
_NAMES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "F64 I64 U64 C64",
}
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}
)


class TensorInfo(NamedTuple):
    """One tensor of a shard: `shape` in elements, `begin` and `end` in bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Header(NamedTuple):
    """A validated header: tensors in the order of their bytes, the free-form metadata, and where the data starts."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def file_size(self) -> int:
        return self.data_start + max((t.end for t in self.tensors.values()), default=0)


def header_length(first: bytes, file_size: int, where: str) -> int:
    """Return the number of header bytes, from a file's first 8 bytes.

    Raises HeaderError when the file cannot hold such a header, or the header exceeds the limit.
    """
    if len(first) < LENGTH_BYTES:
        raise HeaderError("too short for a safetensors file (no header length)", where=where)
    n = int.from_bytes(first[:LENGTH_BYTES], "little")
    if n > MAX_HEADER or (n > MAX_USEFUL_HEADER and n + LENGTH_BYTES <= file_size):
        raise HeaderError(f"header of {n:,} bytes exceeds the limit of {MAX_USEFUL_HEADER:,}", where=where)
    if n + LENGTH_BYTES > file_size:
        raise HeaderError(
            f"truncated: the header needs {n + LENGTH_BYTES:,} bytes, the file has {file_size:,}",
            where=where,
            hint="Download or copy the file again.",
        )
    return n


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Validate the JSON bytes of a header against the size of its file.

    Raises HeaderError for whatever the safetensors library rejects, for duplicate names and for unknown keys.
    """
    data_start = LENGTH_BYTES + len(raw)
    doc = _load_json(raw, where)
    metadata = _metadata(doc.pop("__metadata__", {}), where)
    _check_text((*doc, *metadata, *metadata.values()), where)
    infos = sorted((_tensor(name, entry, where) for name, entry in doc.items()), key=lambda t: (t.begin, t.end))
    at = 0
    for t in infos:
        if t.begin != at:
            problem = "overlaps the tensor before it" if t.begin < at else "leaves a hole before it"
            raise HeaderError(f"tensor {_show(t.name)} {problem} (starts at {t.begin}, expected {at})", where=where)
        at = t.end
    size = file_size - data_start
    if at > size:
        raise HeaderError(
            f"truncated: the tensors need {at:,} bytes of data, the file has {size:,}",
            where=where,
            hint="Download or copy the file again.",
        )
    if at < size:
        raise HeaderError(f"{size - at:,} bytes left over after the last tensor", where=where)
    return Header(MappingProxyType({t.name: t for t in infos}), MappingProxyType(metadata), data_start)


def build_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return header bytes, length prefix included, padded with spaces so that the data starts at a multiple of 8."""
    doc: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for t in tensors:
        doc[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
    raw = json.dumps(doc, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes that a tensor takes."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _load_json(raw: bytes, where: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            # `add` returns None: a name seen for the first time is put down, and does not count.
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise HeaderError(f"{_show(twice)} is in the header twice", where=where)
        return out

    def no_constant(text: str) -> Any:
        raise HeaderError(f"header is not valid JSON ({text} is not a number)", where=where)

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise HeaderError(f"header is not UTF-8 (byte {e.start})", where=where) from e
    try:
        doc = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_int=_integer)
    except (ValueError, RecursionError) as e:
        raise HeaderError(f"header is not valid JSON ({e})", where=where) from e
    if not isinstance(doc, dict):
        raise HeaderError("header is not a JSON object", where=where)
    return doc


def _integer(text: str) -> int | float:
    # "-0" is a float to the library, and so not a size.
    return -0.0 if text == "-0" else int(text)


def _check_text(strings: Iterable[str], where: str) -> None:
    # JSON can spell half a surrogate pair, "\ud800", which no text can hold.
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as e:
        raise HeaderError("header has a name or metadata with half a surrogate pair in it", where=where) from e


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise HeaderError("__metadata__ must map strings to strings", where=where)
    return value


def _tensor(name: str, entry: Any, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {_show(name)} needs exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"tensor {_show(name)} has an unknown dtype ({_show(dtype)})", where=where)
    if not _sizes(shape):
        raise HeaderError(f"tensor {_show(name)} has a shape that is not a list of sizes", where=where)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {_show(name)} has data_offsets that are not [begin, end]", where=where)
    bits, held = _bits(dtype, shape), offsets[1] - offsets[0]
    if bits is None:
        raise HeaderError(f"tensor {_show(name)}: {dtype} {_show(shape)} is more than 64 bits can count", where=where)
    if bits % 8:
        raise HeaderError(f"tensor {_show(name)}: {dtype} {_show(shape)} does not fill whole bytes", where=where)
    if bits // 8 != held:
        raise HeaderError(
            f"tensor {_show(name)}: {dtype} {_show(shape)} takes {bits // 8:,} bytes, its data_offsets hold {held:,}",
            where=where,
        )
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    # bool is an int in Python, and not a size; from 2**63 on no file is that long.
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110 - asked twice of every tensor, and `all` takes twice as long
        if type(n) is not int or not 0 <= n < 2**63:
            return False
    return True


def _bits(dtype: str, shape: list[int]) -> int | None:
    # Like the library, from the left: what overflows on the way is rejected even where a 0 follows.
    count = 1
    for n in (*shape, DTYPE_BITS[dtype]):
        count *= n
        if count >= 2**64:
            return None
    return count


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist = 300, 8


def _show(value: Any) -> str:
    # A hostile header can hold megabytes of one name or shape; an error is one line.
    return _SHORT.repr(value)
