"""Edits one value of a JSON text and leaves every other character unchanged: order, spacing, number spelling."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def set_value(text: str, path: Sequence[str], value: Any) -> str:
    """Sets the value at a path of object keys. A last key that is not there is added at the end of its object.

    Raises KeyError when an earlier key is missing. `text` must be valid JSON.
    """
    start, members, end = _object(text, path[:-1])
    newline = "\r\n" if "\r\n" in text else "\n"
    if (span := members.get(path[-1])) is not None:
        new = _dump(value, _indent(text, span[0]), len(path), newline)
        return text[: span[1]] + new + text[span[2] :]
    key = json.dumps(path[-1], ensure_ascii=False) + ": "
    if not members:
        return text[:start] + "{" + key + _dump(value, None, 0, newline) + "}" + text[end:]
    last_key, _, last_end = max(members.values())
    indent = _indent(text, last_key)
    gap = " " if indent is None else newline + indent
    return text[:last_end] + "," + gap + key + _dump(value, indent, len(path), newline) + text[last_end:]


def remove_key(text: str, path: Sequence[str]) -> str:
    """Removes a key and its value, with the comma and the space that held them. Raises KeyError if it is not there.

    A key that is there more than once goes altogether: the last one counts, and without it an earlier one would.
    """
    text = _without_last(text, path)
    while path[-1] in _object(text, path[:-1])[1]:
        text = _without_last(text, path)
    return text


def _without_last(text: str, path: Sequence[str]) -> str:
    _, members, _ = _object(text, path[:-1])
    key_start, _, value_end = members[path[-1]]
    after = _skip(text, value_end)
    if text[after] == ",":
        return text[:key_start] + text[_skip(text, after + 1) :]
    before = text[:key_start].rstrip()
    if before.endswith("{"):
        return before + text[after:]
    return before[:-1] + text[value_end:]  # the comma before it goes


def _object(text: str, path: Sequence[str]) -> tuple[int, dict[str, tuple[int, int, int]], int]:
    """Where the object at a path starts, (key start, value start, value end) of its members, and where it ends."""
    at = _skip(text, 0)
    for key in path:
        members, _ = _members(text, at)
        at = members[key][1]
    members, end = _members(text, at)
    return at, members, end


def _members(text: str, at: int) -> tuple[dict[str, tuple[int, int, int]], int]:
    if text[at] != "{":
        raise KeyError("not an object")
    out: dict[str, tuple[int, int, int]] = {}
    at = _skip(text, at + 1)
    while text[at] != "}":
        key_start = at
        key, at = _DECODER.raw_decode(text, at)
        value_start = _skip(text, _skip(text, at) + 1)  # over the colon
        _, value_end = _DECODER.raw_decode(text, value_start)
        out[key] = (key_start, value_start, value_end)
        at = _skip(text, value_end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return out, at + 1


def _skip(text: str, at: int) -> int:
    m = _SPACE.match(text, at)
    return m.end() if m else at


def _indent(text: str, at: int) -> str | None:
    """The white space that a key's line starts with; None when something else stands before it on the line."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line if not line.strip() and "\n" in text[:at] else None


def _dump(value: Any, indent: str | None, depth: int, newline: str) -> str:
    """A value for a key whose line starts with `indent`, `depth` objects deep."""
    if indent is None:
        return json.dumps(value, ensure_ascii=False)
    step = indent[: len(indent) // depth]
    return json.dumps(value, indent=step, ensure_ascii=False).replace("\n", newline + indent)
