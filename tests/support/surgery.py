"""Take safetensors files apart and put them together, so that a test can damage one thing and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Header = dict[str, Any]  # as in the file: name -> {"dtype", "shape", "data_offsets"}, perhaps "__metadata__"
LENGTH_BYTES = 8
METADATA = "__metadata__"


def pack(header: Header | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file. Nothing is checked: header text may be anything, and `length` may be wrong."""
    text = json.dumps(header, separators=(",", ":")) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(LENGTH_BYTES, "little") + raw + data


def read_file(path: Path) -> tuple[Header, bytes]:
    """The header and the data of a file."""
    content = path.read_bytes()
    start = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    return json.loads(content[LENGTH_BYTES:start]), content[start:]


def write_file(path: Path, header: Header | str | bytes, data: bytes) -> None:
    """Writes what `pack` makes of header and data."""
    path.write_bytes(pack(header, data))


def names(path: Path) -> list[str]:
    """The tensors of a file."""
    return [name for name in read_file(path)[0] if name != METADATA]


def tensor_bytes(path: Path, name: str) -> bytes:
    """The bytes of a tensor."""
    header, data = read_file(path)
    begin, end = header[name]["data_offsets"]
    return data[begin:end]


def replace_tensor(
    path: Path, name: str, content: bytes, *, dtype: str | None = None, shape: list[int] | None = None
) -> None:
    """Gives a tensor other bytes, and a dtype or shape that go with them; the offsets of all tensors follow."""
    parts, metadata = _take_apart(path)
    entry, _ = parts[name]
    parts[name] = ({"dtype": dtype or entry["dtype"], "shape": entry["shape"] if shape is None else shape}, content)
    _put_together(path, parts, metadata)


def add_tensor(path: Path, name: str, dtype: str, shape: list[int], content: bytes) -> None:
    """Puts a tensor behind the others."""
    parts, metadata = _take_apart(path)
    _put_together(path, parts | {name: ({"dtype": dtype, "shape": shape}, content)}, metadata)


def drop_tensor(path: Path, name: str) -> None:
    """Takes a tensor out; the data closes over it."""
    parts, metadata = _take_apart(path)
    del parts[name]
    _put_together(path, parts, metadata)


def rename(path: Path, old: str, new: str) -> None:
    """Gives a tensor another name; the bytes stay where they are."""
    header, data = read_file(path)
    write_file(path, {new if name == old else name: entry for name, entry in header.items()}, data)


def edit_header(path: Path, change: Callable[[Header], object]) -> None:
    """Lets `change` alter the header in place; the data stays unchanged, whether it still matches or not."""
    header, data = read_file(path)
    change(header)
    write_file(path, header, data)


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Lets `change` alter a JSON file in place."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def edit_state(path: Path, weight: str, **keys: Any) -> None:
    """Sets keys in the JSON of a weight's quant state; None takes a key out."""
    name = next(n for n in names(path) if n.startswith(f"{weight}.quant_state."))
    state = json.loads(tensor_bytes(path, name)) | keys
    raw = json.dumps({key: value for key, value in state.items() if value is not None}).encode()
    replace_tensor(path, name, raw, shape=[len(raw)])


def _take_apart(path: Path) -> tuple[dict[str, tuple[Header, bytes]], dict[str, str] | None]:
    header, data = read_file(path)
    metadata = header.pop(METADATA, None)
    parts = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        parts[name] = ({"dtype": entry["dtype"], "shape": entry["shape"]}, data[begin:end])
    return parts, metadata


def _put_together(path: Path, parts: dict[str, tuple[Header, bytes]], metadata: dict[str, str] | None) -> None:
    header: Header = {} if metadata is None else {METADATA: metadata}
    at = 0
    for name, (entry, content) in parts.items():
        header[name] = entry | {"data_offsets": [at, at + len(content)]}
        at += len(content)
    write_file(path, header, b"".join(content for _, content in parts.values()))
