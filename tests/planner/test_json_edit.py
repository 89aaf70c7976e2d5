"""Edits of JSON texts: the value asked for, and every other character as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bnbfix.planner.json_edit import remove_key, set_value

DOC = {
    "first": 1,
    "text": {"deep": {"x": 1e-06, "ü": 'a, "b": {[\\'}, "list": [1, [2, {"k": None}]], "none": None},
    "empty": {},
    "last": "\u2028 €",
}


def dumps(doc: Any, style: str) -> str:
    """A document as different tools write it."""
    if style == "compact":
        return json.dumps(doc, separators=(",", ":"), ensure_ascii=False)
    if style == "one line":
        return json.dumps(doc) + "\n"
    if style == "airy":
        return json.dumps(doc, indent=1, separators=(" , ", " :  ")) + "\n\n"
    if style == "crlf":
        return json.dumps(doc, indent=2, ensure_ascii=False).replace("\n", "\r\n") + "\r\n"
    indent = {"2": 2, "3": 3, "4": 4, "tabs": "\t", "0": 0}[style]
    return json.dumps(doc, indent=indent, ensure_ascii=False) + "\n"


STYLES = ["2", "3", "4", "tabs", "crlf", "0", "one line", "compact", "airy"]


def with_value(doc: Any, path: tuple[str, ...], value: Any) -> Any:
    out = copy.deepcopy(doc)
    at = out
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return out


def without(doc: Any, path: tuple[str, ...]) -> Any:
    out = copy.deepcopy(doc)
    at = out
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return out


def same(a: Any, b: Any) -> bool:
    """Equal, in the order of their keys and in the types of their numbers too."""
    return json.dumps(a) == json.dumps(b)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("path", [("first",), ("last",), ("text", "none"), ("text", "deep", "ü"), ("text", "deep")])
def test_only_the_value_is_replaced(style: str, path: tuple[str, ...]) -> None:
    expected = dumps(with_value(DOC, path, "@"), style).replace('"@"', "7123")
    assert set_value(dumps(DOC, style), path, 7123) == expected


@pytest.mark.parametrize("style", ["2", "3", "4", "tabs", "crlf"])
@pytest.mark.parametrize("path", [("zz",), ("first",), ("text", "zz"), ("text", "list"), ("text", "deep", "zz")])
@pytest.mark.parametrize("value", [["a", "ü"], {"a": [1], "b": {}}, [], "x"])
def test_an_indented_text_stays_as_the_dump_would_be(style: str, path: tuple[str, ...], value: Any) -> None:
    assert set_value(dumps(DOC, style), path, value) == dumps(with_value(DOC, path, value), style)


@pytest.mark.parametrize("path", [("zz",), ("first",), ("text", "list"), ("text", "deep", "zz"), ("empty", "new")])
def test_a_text_of_one_line_stays_one(path: tuple[str, ...]) -> None:
    value = {"a": [1, 2], "b": {}}
    assert set_value(dumps(DOC, "one line"), path, value) == dumps(with_value(DOC, path, value), "one line")


@pytest.mark.parametrize("style", ["2", "3", "4", "tabs", "crlf", "0", "one line", "compact"])
@pytest.mark.parametrize("path", [("first",), ("text",), ("last",), ("text", "deep", "ü"), ("text", "none")])
def test_a_removed_key_leaves_the_text_of_the_rest(style: str, path: tuple[str, ...]) -> None:
    assert remove_key(dumps(DOC, style), path) == dumps(without(DOC, path), style)


@pytest.mark.parametrize("style", STYLES)
def test_the_only_key_leaves_an_empty_object(style: str) -> None:
    doc = {"a": {"only": [1, 2]}, "b": 1}
    assert remove_key(dumps(doc, style), ("a", "only")) == dumps({"a": {}, "b": 1}, style)
    assert json.loads(remove_key(dumps({"only": {}}, style), ("only",))) == {}


@pytest.mark.parametrize("text", ["{}", "{ }", "{\n}", ' {"a": {\n  }}'])
def test_a_key_can_be_added_to_an_empty_object(text: str) -> None:
    path = ("a", "new") if "a" in text else ("new",)
    new = set_value(text, path, {"ü": [1]})
    assert json.loads(new) == with_value(json.loads(text), path, {"ü": [1]})
    assert new[: text.index("{")] == text[: text.index("{")]


def test_the_spelling_of_numbers_and_strings_elsewhere_stays() -> None:
    text = '{"a": 1.0E-6, "b":\t"\\u00fc", "c" : 10000000000000000000000000.5, "d": -0, "e": [ ] ,"f": {"g": 1E5}}'
    assert set_value(text, ("f", "g"), None) == text.replace("1E5", "null")
    assert set_value(text, ("d",), 0) == text.replace("-0", "0")
    assert remove_key(text, ("b",)) == text.replace('"b":\t"\\u00fc", ', "")
    assert remove_key(text, ("e",)) == text.replace('"e": [ ] ,', "")


def test_what_looks_like_json_inside_a_string_is_not_edited() -> None:
    text = '{"a": "{\\"b\\": 1, ", "k": "}", "b": 2, "c": "\\\\"}'
    assert json.loads(set_value(text, ("b",), 3)) == {"a": '{"b": 1, ', "k": "}", "b": 3, "c": "\\"}
    assert json.loads(remove_key(text, ("b",))) == {"a": '{"b": 1, ', "k": "}", "c": "\\"}
    assert json.loads(remove_key(text, ("c",))) == {"a": '{"b": 1, ', "k": "}", "b": 2}


def test_a_key_is_found_however_it_is_escaped() -> None:
    assert set_value('{"\\u00fc": 1}', ("ü",), 2) == '{"\\u00fc": 2}'
    assert remove_key('{"a": 0, "\\u0062": 1}', ("b",)) == '{"a": 0}'


@pytest.mark.parametrize(("text", "path"), [("{}", ("a",)), ('{"a": 1}', ("b",)), ('{"a": {"b": 1}}', ("a", "c"))])
def test_removing_a_key_that_is_not_there_is_an_error(text: str, path: tuple[str, ...]) -> None:
    with pytest.raises(KeyError):
        remove_key(text, path)


@pytest.mark.parametrize("text", ["{}", '{"a": 1}', '{"a": [1]}', '{"a": null}', '{"a": "{}"}'])
def test_a_path_through_a_value_that_is_not_an_object_is_an_error(text: str) -> None:
    with pytest.raises(KeyError):
        set_value(text, ("a", "b"), 1)
    with pytest.raises(KeyError):
        remove_key(text, ("a", "b"))


def test_of_a_key_that_is_there_twice_the_last_counts_as_for_every_reader() -> None:
    text = '{"a": 1, "b": 2, "a": 3}'
    assert set_value(text, ("a",), 4) == '{"a": 1, "b": 2, "a": 4}'
    assert json.loads(set_value(text, ("c",), 5)) == {"a": 3, "b": 2, "c": 5}


KEYS = st.text(st.sampled_from('abü"\\{}[],: \n\u2028😀'), max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4), max_leaves=12)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=5)


@st.composite
def paths(draw: st.DrawFn, existing: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A document and a path in it, whose last key is there, or may be new."""
    doc = draw(OBJECTS.filter(bool) if existing else OBJECTS)
    at, path = doc, []
    while True:
        keys = sorted(at)
        inner = [k for k in keys if isinstance(at[k], dict) and (at[k] or not existing)]
        if inner and draw(st.booleans()):
            key = draw(st.sampled_from(inner))
            path.append(key)
            at = at[key]
            continue
        last = st.sampled_from(keys) if existing else KEYS | (st.sampled_from(keys) if keys else KEYS)
        return doc, (*path, draw(last))


@given(found=paths(existing=False), value=VALUES, style=st.sampled_from(STYLES))
def test_a_set_value_is_that_of_the_edited_dict(
    found: tuple[dict[str, Any], tuple[str, ...]], value: Any, style: str
) -> None:
    doc, path = found
    assert same(json.loads(set_value(dumps(doc, style), path, value)), with_value(doc, path, value))


@given(found=paths(existing=True), style=st.sampled_from(STYLES))
def test_a_removed_key_is_gone_from_the_dict_and_nothing_else(
    found: tuple[dict[str, Any], tuple[str, ...]], style: str
) -> None:
    doc, path = found
    assert same(json.loads(remove_key(dumps(doc, style), path)), without(doc, path))


@given(found=paths(existing=False), style=st.sampled_from(["2", "3", "4", "tabs", "crlf", "0", "airy"]))
def test_an_added_key_that_is_removed_again_leaves_the_text_as_it_was(
    found: tuple[dict[str, Any], tuple[str, ...]], style: str
) -> None:
    doc, path = found
    at = doc
    for key in path[:-1]:
        at = at[key]
    assume(path[-1] not in at)
    text = dumps(doc, style)
    assert remove_key(set_value(text, path, {"a": [1]}), path) == text


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"a": 1, "a": 2}', "{}"),
        ('{"a": 1, "b": 0, "a": 2}', '{"b": 0}'),
        ('{"b": 0, "a": 1, "\\u0061": {"a": 3}}', '{"b": 0}'),
    ],
)
def test_a_key_that_is_there_twice_is_removed_twice(text: str, rest: str) -> None:
    assert remove_key(text, ["a"]) == rest
