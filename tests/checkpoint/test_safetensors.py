"""The header of a safetensors file: each rule on its own, round trips, and the safetensors library as the judge."""

from __future__ import annotations

import json
import struct
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from bnbfix.checkpoint.safetensors import (
    DTYPE_BITS,
    MAX_HEADER,
    MAX_USEFUL_HEADER,
    Header,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
    tensor_nbytes,
)
from bnbfix.errors import HeaderError
from tests.fuzz.cases import SMALL_FILES
from tests.fuzz.judges import judge_header, library_accepts, parse_file
from tests.fuzz.structure import HOSTILE, mutated_file
from tests.support.surgery import pack

GOOD = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
QUICK = settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def parse(raw: bytes, data: int = 0) -> Header:
    """The header of a file with these header bytes, and so many bytes of data."""
    return parse_header(raw, 8 + len(raw) + data, "m.safetensors")


def error_from_response(raw: bytes, data: int, words: str) -> None:
    """Asserts that header bytes are refused, in one line that names the file and says why."""
    with pytest.raises(HeaderError) as caught:
        parse(raw, data)
    message = str(caught.value)
    assert message.startswith("m.safetensors: ") and words in message
    assert "\n" not in message and len(message) < 1000


# The length


def test_the_length_is_read_from_eight_little_endian_bytes() -> None:
    assert header_length(b"\x35\x01\x00\x00\x00\x00\x00\x00", 8 + 0x135, "m") == 0x135


@pytest.mark.parametrize("first", [b"", b"\x02", b"\x02\0\0\0\0\0\0"])
def test_a_file_of_less_than_eight_bytes_is_too_short(first: bytes) -> None:
    with pytest.raises(HeaderError, match=r"^m: too short for a safetensors file \(no header length\)$"):
        header_length(first, len(first), "m")


def test_a_header_over_25_megabytes_is_too_long_even_where_the_file_holds_it() -> None:
    assert header_length(struct.pack("<Q", 25_000_000), 25_000_008, "m") == 25_000_000
    with pytest.raises(HeaderError, match=r"^m: header of 25,000,001 bytes exceeds the limit of 25,000,000$"):
        header_length(struct.pack("<Q", 25_000_001), 25_000_009, "m")


@pytest.mark.parametrize("n", [100_000_001, 2**63, 2**64 - 1])
def test_an_absurd_length_is_too_long_whatever_the_file_holds(n: int) -> None:
    with pytest.raises(HeaderError, match=r"^m: header of [\d,]+ bytes exceeds the limit"):
        header_length(struct.pack("<Q", n), 20, "m")


@pytest.mark.parametrize("n", [3, 30_000_000, 100_000_000])
def test_a_length_beyond_the_end_of_the_file_is_a_truncation(n: int) -> None:
    with pytest.raises(HeaderError, match=rf"^m: truncated: the header needs {n + 8:,} bytes, the file has 10$") as e:
        header_length(struct.pack("<Q", n), 10, "m")
    assert e.value.hint == "Download or copy the file again."


def test_the_limits_are_not_above_those_of_the_library() -> None:
    assert MAX_USEFUL_HEADER <= MAX_HEADER == 100_000_000


# The text


def test_a_good_header_is_read() -> None:
    header = parse(GOOD, 2)
    assert dict(header.tensors) == {"a": TensorInfo("a", "U8", (2,), 0, 2)}
    assert dict(header.metadata) == {}
    assert header.data_start == 8 + len(GOOD)
    assert header.file_size == 8 + len(GOOD) + 2
    assert library_accepts(pack(GOOD, b"xx"))


@pytest.mark.parametrize(
    ("raw", "byte"),
    [(b'{"\xff":{}}', 2), (b'\xfe{"a":1}', 0), (b'{"\xc3', 2), (b'{"\xed\xa0\x80":{}}', 2), (b'{"\xc0\xaf":{}}', 2)],
    ids=["latin-1", "BOM of UTF-16", "cut inside a character", "surrogate", "overlong"],
)
def test_not_utf_8(raw: bytes, byte: int) -> None:
    error_from_response(raw, 0, f"header is not UTF-8 (byte {byte})")


@pytest.mark.parametrize(
    "raw", [b"[]", b'"a"', b"0", b"null", b'[{"a":1}]'], ids=["list", "string", "number", "null", "object in a list"]
)
def test_what_is_not_an_object_is_not_a_header(raw: bytes) -> None:
    error_from_response(raw, 0, "header is not a JSON object")


@pytest.mark.parametrize(
    "raw",
    [b"", b" ", b"\xef\xbb\xbf{}", b"\0{}", b"\x0b{}", b"\xc2\xa0{}"],
    ids=["empty", "blank", "BOM of UTF-8", "NUL", "vertical tab", "no-break space"],
)
def test_only_json_may_be_in_a_header(raw: bytes) -> None:
    error_from_response(raw, 0, "header is not valid JSON (")


@pytest.mark.parametrize("blanks", [b" ", b"\t", b"\n", b"\r", b" \r\n\t "], ids=repr)
def test_blanks_before_the_brace_are_json(blanks: bytes) -> None:
    header = parse(blanks + GOOD + blanks, 2)
    assert list(header.tensors) == ["a"] and header.data_start == 8 + len(GOOD) + 2 * len(blanks)
    assert judge_header(pack(blanks + GOOD + blanks, b"xx")) == "accepted"


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"{}}",
        b"{} {}",
        b"{'a':1}",
        b"{a:1}",
        b'{"a":1,}',
        b'{"a" 1}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":0x10}',
        b'{"a":1_0}',
        b'{"a\n":1}',
        b'{"a":"\\x41"}',
        GOOD[:-1],
        GOOD + b"\0\0\0",
        GOOD + b",",
        b"{/**/}",
    ],
)
def test_not_json(raw: bytes) -> None:
    error_from_response(raw, 2, "header is not valid JSON (")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "form", ['{"a":%s}', '{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,2]}}', '{"__metadata__":{"a":%s}}']
)
def test_constants_that_python_takes_for_json_are_not_json(form: str, constant: str) -> None:
    error_from_response((form % constant).encode(), 2, f"header is not valid JSON ({constant} is not a number)")


@pytest.mark.parametrize("deep", [b'{"a":' * 100_000, b'{"a":' + b"[" * 1_000_000, b"{" + b'"a":[{' * 50_000])
def test_deep_nesting_is_an_error_and_no_crash(deep: bytes) -> None:
    error_from_response(deep, 0, "header is not valid JSON (")


@pytest.mark.parametrize("digits", [4301, 1_000_000])
def test_numbers_of_thousands_of_digits_are_refused_without_being_computed(digits: int) -> None:
    start = time.perf_counter()
    error_from_response(GOOD.replace(b"[2]", b"[" + b"9" * digits + b"]"), 2, "header is not valid JSON (")
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "raw",
    [
        b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"x\\uDFFFy":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"__metadata__":{"a":"\\udc00\\ud800"},' + GOOD[1:],
        b'{"__metadata__":{"\\ud800":"a"},' + GOOD[1:],
    ],
    ids=["name", "inside a name", "metadata value", "metadata key"],
)
def test_half_a_surrogate_pair_is_refused(raw: bytes) -> None:
    error_from_response(raw, 2, "half a surrogate pair")


def test_a_whole_surrogate_pair_is_one_character() -> None:
    raw = b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    assert list(parse(raw, 2).tensors) == ["\U0001f600"]


# Names and keys


def test_a_name_that_is_there_twice() -> None:
    entry = b'"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    error_from_response(b"{" + entry + b"," + entry + b"}", 2, "'w' is in the header twice")


def test_a_name_that_is_there_twice_in_two_spellings() -> None:
    one = b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    two = b'"\\u0077":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}'
    error_from_response(b"{" + one + b"," + two + b"}", 2, "'w' is in the header twice")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_key_that_is_twice_inside_an_entry(key: str) -> None:
    value = {"dtype": '"U8"', "shape": "[2]", "data_offsets": "[0,2]"}[key]
    error_from_response(GOOD[:-2] + f',"{key}":{value}}}}}'.encode(), 2, f"'{key}' is in the header twice")


@pytest.mark.parametrize("raw", [b'{"__metadata__":{},"__metadata__":{}}', b'{"__metadata__":{"k":"1","k":"1"}}'])
def test_metadata_or_a_key_of_it_twice(raw: bytes) -> None:
    error_from_response(raw, 0, "is in the header twice")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_key_that_is_missing(key: str) -> None:
    entry = {k: v for k, v in json.loads(GOOD)["a"].items() if k != key}
    error_from_response(json.dumps({"a": entry}).encode(), 2, "tensor 'a' needs exactly dtype, shape and data_offsets")


@pytest.mark.parametrize("key", ["device", "Dtype", "", "__metadata__"])
def test_an_unknown_key(key: str) -> None:
    entry = json.loads(GOOD)["a"] | {key: 1}
    error_from_response(json.dumps({"a": entry}).encode(), 2, "tensor 'a' needs exactly dtype, shape and data_offsets")


@pytest.mark.parametrize("entry", ["null", "1", '"U8"', "[]", '["U8",[2],[0,2]]', "true", "{}"])
def test_an_entry_that_is_not_an_object_with_the_three_keys(entry: str) -> None:
    error_from_response(f'{{"a":{entry}}}'.encode(), 2, "tensor 'a' needs exactly dtype, shape and data_offsets")


# Dtypes, shapes, offsets


@pytest.mark.parametrize(
    "dtype", ['"u8"', '"uint8"', '"U8 "', '""', '"F128"', "8", "null", "[]", "{}", '{"U8":null}', '["U8"]', "true"]
)
def test_an_unknown_dtype(dtype: str) -> None:
    error_from_response(GOOD.replace(b'"U8"', dtype.encode()), 2, "tensor 'a' has an unknown dtype (")


@pytest.mark.parametrize(
    "shape",
    [
        "null",
        "2",
        '"2"',
        "{}",
        "[true]",
        "[false]",
        "[-1]",
        "[-0]",
        "[2.0]",
        "[2e0]",
        "[1e400]",
        "[null]",
        '["2"]',
        "[[2]]",
        "[9223372036854775808]",
        "[18446744073709551616]",
        "[0,-2]",
        "[0,9223372036854775808]",
    ],
)
def test_a_shape_that_is_not_a_list_of_sizes(shape: str) -> None:
    error_from_response(GOOD.replace(b"[2]", shape.encode()), 2, "tensor 'a' has a shape that is not a list of sizes")


@pytest.mark.parametrize(
    "shape",
    [[10**18, 10**18], [10**18] * 300, [2**63 - 1] * 8, [2**32, 2**32, 0], [2**61, 1], [2] * 1_000_000],
    ids=["two", "300", "eight", "a zero after the overflow", "overflow only in bits", "a million"],
)
def test_a_shape_whose_product_overflows(shape: list[int]) -> None:
    raw = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    start = time.perf_counter()
    error_from_response(raw, 0, "is more than 64 bits can count")
    assert time.perf_counter() - start < 10
    assert not library_accepts(pack(raw))


def test_a_zero_before_huge_sizes_makes_an_empty_tensor_as_it_does_for_the_library() -> None:
    raw = b'{"a":{"dtype":"F64","shape":[0,1000000000000000000,1000000000000000000],"data_offsets":[0,0]}}'
    assert parse(raw).tensors["a"].nbytes == 0
    assert library_accepts(pack(raw))


@pytest.mark.parametrize(
    "offsets",
    [
        "null",
        "2",
        '"02"',
        "{}",
        "[]",
        "[2]",
        "[0,2,2]",
        "[2,0]",
        "[1,0]",
        "[-2,0]",
        "[-0,2]",
        "[0,2.0]",
        "[0,true]",
        '["0","2"]',
        "[0,null]",
        "[[0,2]]",
        "[0,9223372036854775808]",
        "[0,18446744073709551618]",
    ],
)
def test_data_offsets_that_are_not_begin_and_end(offsets: str) -> None:
    error_from_response(
        GOOD.replace(b"[0,2]", offsets.encode()), 2, "tensor 'a' has data_offsets that are not [begin, end]"
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "takes"),
    [("U8", "[3]", 3), ("U8", "[]", 1), ("U8", "[0]", 0), ("F16", "[2]", 4), ("F64", "[1]", 8), ("C64", "[1]", 8)],
)
def test_dtype_times_shape_is_not_what_the_offsets_hold(dtype: str, shape: str, takes: int) -> None:
    raw = GOOD.replace(b'"U8"', f'"{dtype}"'.encode()).replace(b"[2]", shape.encode())
    words = json.dumps(json.loads(shape))
    error_from_response(raw, 2, f"tensor 'a': {dtype} {words} takes {takes} bytes, its data_offsets hold 2")


@pytest.mark.parametrize(("dtype", "shape"), [("F4", 3), ("F6_E2M3", 3), ("F6_E3M2", 2)])
def test_a_quantized_dtype_that_ends_inside_a_byte(dtype: str, shape: int) -> None:
    raw = GOOD.replace(b'"U8"', f'"{dtype}"'.encode()).replace(b"[2]", f"[{shape}]".encode())
    error_from_response(raw, 2, f"tensor 'a': {dtype} [{shape}] does not fill whole bytes")


def two(a: tuple[int, int], b: tuple[int, int]) -> bytes:
    """A header of two tensors of bytes, a and b, at these offsets."""
    entries = {n: {"dtype": "U8", "shape": [e - s], "data_offsets": [s, e]} for n, (s, e) in {"a": a, "b": b}.items()}
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("a", "b", "first", "starts", "expected"),
    [
        ((0, 4), (2, 6), "b", 2, 4),
        ((2, 6), (0, 4), "a", 2, 4),
        ((0, 4), (0, 4), "b", 0, 4),
        ((0, 6), (1, 2), "b", 1, 6),
    ],
    ids=["partly", "in the other order", "the same bytes", "one inside the other"],
)
def test_tensors_that_overlap(a: tuple[int, int], b: tuple[int, int], first: str, starts: int, expected: int) -> None:
    error_from_response(
        two(a, b), 6, f"tensor '{first}' overlaps the tensor before it (starts at {starts}, expected {expected})"
    )


def test_a_hole_between_two_tensors() -> None:
    error_from_response(two((0, 2), (3, 6)), 6, "tensor 'b' leaves a hole before it (starts at 3, expected 2)")


def test_a_hole_before_the_first_tensor() -> None:
    error_from_response(two((1, 2), (2, 6)), 6, "tensor 'a' leaves a hole before it (starts at 1, expected 0)")


def test_an_empty_tensor_makes_no_hole_and_no_overlap_but_must_touch_its_neighbours() -> None:
    assert [t.name for t in parse(two((0, 2), (2, 2)), 2).tensors.values()] == ["a", "b"]
    assert [t.name for t in parse(two((0, 2), (0, 0)), 2).tensors.values()] == ["b", "a"]
    error_from_response(two((0, 2), (1, 1)), 2, "tensor 'b' overlaps the tensor before it")
    error_from_response(two((0, 2), (3, 3)), 2, "tensor 'b' leaves a hole before it")


@pytest.mark.parametrize("held", [0, 1, 5])
def test_truncated_data(held: int) -> None:
    error_from_response(two((0, 2), (2, 6)), held, f"truncated: the tensors need 6 bytes of data, the file has {held}")


def test_a_truncation_says_what_to_do() -> None:
    with pytest.raises(HeaderError) as caught:
        parse(GOOD, 1)
    assert caught.value.hint == "Download or copy the file again."


@pytest.mark.parametrize(("raw", "data", "rest"), [(GOOD, 3, 1), (GOOD, 4098, 4096), (b"{}", 7, 7)])
def test_bytes_left_over(raw: bytes, data: int, rest: int) -> None:
    error_from_response(raw, data, f"{rest:,} bytes left over after the last tensor")


# Metadata


@pytest.mark.parametrize(
    "metadata", ["1", '"pt"', "[]", "true", '{"a":1}', '{"a":null}', '{"a":["b"]}', '{"a":{}}', '{"a":"b","c":false}']
)
def test_metadata_that_maps_no_strings_to_strings(metadata: str) -> None:
    error_from_response(b'{"__metadata__":' + metadata.encode() + b"}", 0, "__metadata__ must map strings to strings")


@pytest.mark.parametrize(
    ("metadata", "parsed"), [("null", {}), ("{}", {}), ('{"format":"pt","":""}', {"format": "pt", "": ""})]
)
def test_metadata_that_is_fine(metadata: str, parsed: dict[str, str]) -> None:
    raw = b'{"__metadata__":' + metadata.encode() + b"}"
    assert dict(parse(raw).metadata) == parsed
    assert library_accepts(pack(raw))


# What a hostile header may not do to whoever reads the error


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":{"dtype":"' + b"U" * 5_000_000 + b'","shape":[2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"U8","shape":[' + b"1," * 1_000_000 + b'1],"data_offsets":[0,2]}}',
        b'{"' + b"a" * 5_000_000 + b'":{}}',
        b'{"' + b"a" * 5_000_000 + b'":1,"' + b"a" * 5_000_000 + b'":2}',
        b'{"a":{"dtype":' + b'{"x":' * 500 + b"1" + b"}" * 500 + b',"shape":[2],"data_offsets":[0,2]}}',
    ],
    ids=["dtype", "shape", "name", "name twice", "nested dtype"],
)
def test_megabytes_of_nonsense_make_a_short_message(raw: bytes) -> None:
    error_from_response(raw, 2, "")


def test_a_long_but_real_name_is_quoted_in_full() -> None:
    name = "model.language_model.layers.59.mlp.experts.127.down_proj.weight.quant_state.bitsandbytes__nf4"
    error_from_response(json.dumps({name: {}}).encode(), 0, repr(name))


# Round trips

DTYPES = st.sampled_from(sorted(DTYPE_BITS))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = TEXT.filter(lambda name: name != "__metadata__")


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorInfo]:
    """Tensors stored one after another."""
    at, out = 0, []
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype, shape = draw(DTYPES), draw(st.lists(st.integers(0, 4), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(4)  # whole bytes
        size = tensor_nbytes(dtype, shape)
        out.append(TensorInfo(name, dtype, tuple(shape), at, at + size))
        at += size
    return out


@settings(QUICK, max_examples=400)
@given(layouts(), st.dictionaries(TEXT, TEXT, max_size=3))
def test_what_is_built_is_parsed_again(tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
    built = build_header(tensors, metadata)
    content = built + bytes(tensors[-1].end if tensors else 0)
    header = parse_file(content)
    assert sorted(header.tensors.values(), key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    assert list(header.tensors) == [t.name for t in sorted(tensors, key=lambda t: (t.begin, t.end))]
    assert dict(header.metadata) == metadata
    assert header.data_start == len(built) and len(built) % 8 == 0
    assert header.file_size == len(content)
    assert library_accepts(content)


def test_every_dtype_is_one_the_library_knows_at_the_same_size() -> None:
    for dtype, bits in DTYPE_BITS.items():
        info = TensorInfo("a", dtype, (8,), 0, bits)
        assert library_accepts(build_header([info], {}) + bytes(bits)), dtype


# The safetensors library as the judge: what it refuses is refused, and what is refused beyond that is on a short list
# (fuzz/judges.py). tests/test_fuzz.py does the same at length.


def test_the_library_accepts_whatever_is_accepted_of_structures_turned_wrong() -> None:
    seen: Counter[str] = Counter()

    @settings(QUICK, max_examples=3000)
    @given(st.randoms(use_true_random=True))
    def run(r: Random) -> None:
        seen[judge_header(mutated_file(r))] += 1

    run()
    assert min(seen["accepted"], seen["refused"]) > 500 and seen["stricter"] > 50, seen


@pytest.mark.parametrize("content", SMALL_FILES)
def test_every_prefix_of_a_file_is_refused(content: bytes) -> None:
    for n in range(len(content)):
        assert not library_accepts(content[:n])
        with pytest.raises(HeaderError):
            parse_file(content[:n])


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "place", ["entry", "dtype", "shape", "size", "data_offsets", "begin", "end", "metadata", "key"]
)
def test_the_library_accepts_whatever_is_accepted_of_one_hostile_value(place: str, value: str) -> None:
    good = {"dtype": '"U8"', "shape": "[0]", "data_offsets": "[0,0]"}
    nested = {"size": ("shape", "[%s]"), "begin": ("data_offsets", "[%s,0]"), "end": ("data_offsets", "[0,%s]")}
    key, form = nested.get(place, (place, "%s"))
    entry = ",".join(f'"{k}":{v}' for k, v in (good | {key: form % value}).items() if k in good)
    text = {
        "entry": f'{{"a":{value}}}',
        "metadata": f'{{"__metadata__":{value}}}',
        "key": f'{{"__metadata__":{{{value}:"x"}}}}',
    }.get(place, f'{{"a":{{{entry}}}}}')
    # It raises where one accepts what the other refuses.
    assert judge_header(pack(text.encode("utf-8", "surrogatepass"))) in ("accepted", "refused", "stricter")


def test_safe_open_judges_files_as_deserialize_judges_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"

    @settings(QUICK, max_examples=150)
    @given(st.randoms(use_true_random=True))
    def run(r: Random) -> None:
        content = mutated_file(r)
        path.write_bytes(content)
        try:
            with safe_open(path, "numpy") as f:
                f.keys()
            opened = True
        except SafetensorError:
            opened = False
        assert opened == library_accepts(content)

    run()
