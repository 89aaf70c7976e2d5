"""Invalid JSON: an object is a tuple of pairs here, so that keys may repeat, and text may go in unchanged."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from bnbfix.checkpoint.safetensors import DTYPE_BITS, tensor_nbytes
from tests.support.surgery import pack


class Raw(str):
    """JSON text that is written unchanged."""


HOSTILE_TEXT = r"""
    -0 -1 -0.0 0.0 1.0 2e0 1E400 01 +1 0x1 1_0 NaN -Infinity true false null [] {} [[]] [0] [0,0] [0,1] [1,0]
    [0,0,0] [-0,0] [1.0] [true] {"U8":null} {"a":1,"a":1} "U8" "u8" "F4" "F6_E2M3" "F8_E8M0" "BF16" "" "\ud800"
    "\udc00x" "\ud83d\ude00" "\u0000" "\x" 2147483648 4294967296 9223372036854775807 9223372036854775808
    18446744073709551615 18446744073709551616 36893488147419103232 99999999999999999999999999999999999999999
    [9223372036854775807,0] [0,9223372036854775807] [4294967296,4294967296,0] [4294967296,4294967296]
    [0,4294967296,4294967296] [2305843009213693952,8] [0,18446744073709551615] [18446744073709551616]
"""
NESTED = ["[" * 120 + "]" * 120, "[" * 130 + "]" * 130]  # around the library's limit of 128
HOSTILE = tuple(Raw(text) for text in (*HOSTILE_TEXT.split(), *NESTED, "7" * 5000, '"\x01"', '"\x7f"'))
KEYS = (*"abx", "", "dtype", "shape", "data_offsets", "__metadata__", *map(Raw, (r'"\u0061"', r'"\ud800"', "1")))
KINDS = ("value", "number", "number", "drop", "twice", "key", "add", "shuffle")


def tree(value: Any) -> Any:
    """A JSON value with its objects as tuples of pairs."""
    if isinstance(value, dict):
        return tuple((k, tree(v)) for k, v in value.items())
    return [tree(v) for v in value] if isinstance(value, list) else value


def write_json(value: Any) -> str:
    """JSON text of strings, numbers, lists, raw text, and objects as tuples of pairs."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, tuple):
        return "{" + ",".join(f"{write_json(k)}:{write_json(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def nodes(value: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The path to every value inside."""
    out = [path] if path else []
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            out += nodes(item[1] if isinstance(value, tuple) else item, (*path, i))
    return out


def some_node(r: Random, value: Any) -> tuple[int, ...]:
    """The path to some value inside; each step down is as likely as to stay."""
    path: tuple[int, ...] = ()
    while isinstance(value, (tuple, list)) and value and (not path or r.random() < 0.6):
        path = (*path, r.randrange(len(value)))
        value = at(value, path[-1:])
    return path


def at(value: Any, path: tuple[int, ...]) -> Any:
    for i in path:
        value = value[i][1] if isinstance(value, tuple) else value[i]
    return value


def put(value: Any, path: tuple[int, ...], new: list[Any]) -> Any:
    """The value at a path replaced by any number of others: pairs in an object, items in a list."""
    i, rest = path[0], path[1:]
    items = list(value)
    if rest and isinstance(value, tuple):
        items[i] = (items[i][0], put(items[i][1], rest, new))
    elif rest:
        items[i] = put(items[i], rest, new)
    else:
        items[i : i + 1] = new
    return tuple(items) if isinstance(value, tuple) else items


def mutate(
    r: Random, doc: Any, path: tuple[int, ...], hostile: tuple[Any, ...] = HOSTILE, keys: tuple[str, ...] = KEYS
) -> Any:
    """One value exchanged, dropped, doubled, moved, given another key or a neighbour."""
    old, parent = at(doc, path), at(doc, path[:-1])
    new = [old]
    kind = r.choice(KINDS)
    if kind == "value" or (kind == "number" and type(old) is not int):
        new = [r.choice(hostile)]
    elif kind == "number":
        new = [max(0, old + r.choice([-8, -4, -2, -1, 1, 2, 4, 8]))]
    elif kind == "drop":
        new = []
    elif kind == "twice":
        new = [old, old]
    elif kind == "add":
        new = [old, r.choice(hostile)]
    elif kind == "shuffle" and isinstance(old, (tuple, list)):
        new = [type(old)(r.sample(old, len(old)))]
    if isinstance(parent, tuple):
        names = [parent[path[-1]][0]] * len(new)
        if names and kind in ("key", "add"):
            names[-1] = r.choice(keys)
        new = list(zip(names, new, strict=True))
    return put(doc, path, new)


def mutated_file(r: Random) -> bytes:
    """A valid safetensors file, or one with a few things in its structure turned wrong."""
    doc: Any = ()
    size = 0
    for name in r.sample(["a", "b", "w.weight", "\u00e9\U0001f600", 'q"\\\n', "", "dtype"], r.randrange(5)):
        dtype, shape = r.choice(sorted(DTYPE_BITS)), [r.randrange(5) for _ in range(r.randrange(3))]
        shape += [4] if DTYPE_BITS[dtype] < 8 else []
        end = size + tensor_nbytes(dtype, shape)
        doc += ((name, (("dtype", dtype), ("shape", shape), ("data_offsets", [size, end]))),)
        size = end
    if r.random() < 0.3:
        doc += (("__metadata__", (("format", "pt"), ("", "\u00e9"))),)
    for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
        if not (paths := nodes(doc)):
            break
        doc = mutate(r, doc, r.choice([p for p in paths if len(p) == 1] if r.random() < 0.3 else paths))
    raw = (write_json(doc) + r.choice([*[""] * 20, " ", "\n\t\r ", "\0", "{}", ","])).encode("utf-8", "surrogatepass")
    data = max(0, size + r.choice([*[0] * 20, -1, 1, 8]))
    length = max(0, len(raw) + r.choice([*[0] * 40, -1, 1, 2**32, 2**63]))
    return pack(raw, bytes(data), length=length)


BYTES = tuple(b'{}[]":,.-+0123456789eE\\u \n\0\x7f\x80\xc3\xff')


def mutated_bytes(r: Random, content: bytes, begin: int, end: int) -> bytes:
    """Bytes changed, put in, taken out, repeated or moved between `begin` and `end`."""
    out = bytearray(content)
    for _ in range(r.choice([1, 1, 1, 1, 1, 2, 2, 3, 8])):
        end = min(end, len(out))
        i = r.randrange(begin, end) if begin < end else begin
        kind = r.choice(["flip", "flip", "set", "set", "insert", "insert", "delete", "cut", "repeat", "swap"])
        span = out[i : min(end, i + r.choice([1, 1, 2, 2, 8, 64, 300]))]
        if kind == "flip" and span:
            out[i] ^= 1 << r.randrange(8)
        elif kind == "set" and span:
            out[i] = r.choice(BYTES)
        elif kind == "insert":
            out[i:i] = bytes([r.choice(BYTES)])
        elif kind == "delete":
            del out[i : i + 1]
        elif kind == "cut":
            del out[i : i + len(span)]
        elif kind == "repeat":
            out[i:i] = span
        elif kind == "swap":
            del out[i : i + len(span)]
            j = r.randrange(begin, max(begin + 1, end - len(span)))
            out[j:j] = span
    return bytes(out)
