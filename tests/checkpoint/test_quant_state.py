"""Quant states: what bitsandbytes writes passes, and each inconsistency is an error of its own."""

from __future__ import annotations

import json
import math
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bnbfix.checkpoint.quant_state import (
    BLOCKSIZES,
    DTYPES,
    FOUR_BIT_SUFFIXES,
    INT8_SUFFIXES,
    MAX_STATE_JSON,
    STATE_SUFFIXES,
    NestedState,
    QuantState,
    check_int8_state,
    check_state,
    is_int8,
    parse_state,
    split_state_tensor,
    state_tensor_name,
)
from bnbfix.checkpoint.safetensors import TensorInfo, tensor_nbytes
from bnbfix.errors import QuantStateError

WHERE = "m.safetensors: a.weight"
NF4, FP4 = ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"
SINGLE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 64]}
NESTED = SINGLE | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03125}
QUICK = settings(derandomize=True, database=None)
StateTensors = dict[str, TensorInfo]


def parse(doc: Any, suffix: str = NF4) -> QuantState:
    return parse_state(doc if isinstance(doc, bytes) else json.dumps(doc).encode(), suffix, WHERE)


def error_from_response(words: str, doc: Any, suffix: str = NF4) -> None:
    """Asserts that a quant state is refused, in one line that names the weight and says why."""
    with pytest.raises(QuantStateError) as caught:
        parse(doc, suffix)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: damaged quant state: ") and words in message
    assert "\n" not in message
    assert caught.value.where == WHERE and caught.value.hint == "Quantize the model again."


def tensor(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo("t", dtype, shape, 0, tensor_nbytes(dtype, shape))


def fitting(state: QuantState) -> tuple[TensorInfo, StateTensors]:
    """Return a weight and quant-state tensors that match a state by the rules of bitsandbytes."""
    numel = math.prod(state.shape)
    blocks = math.ceil(numel / state.blocksize)
    state_tensors = {
        f".quant_state.bitsandbytes__{state.quant_type}": tensor("U8", 200),
        ".quant_map": tensor("F32", 16),
    }
    state_tensors[".absmax"] = tensor("F32" if state.nested is None else "U8", blocks)
    if state.nested is not None:
        state_tensors[".nested_absmax"] = tensor("F32", math.ceil(blocks / state.nested.blocksize))
        state_tensors[".nested_quant_map"] = tensor("F32", 256)
    return tensor("U8", math.ceil(numel / 2), 1), state_tensors


def refuses(words: str, state: QuantState, weight: TensorInfo, state_tensors: StateTensors) -> None:
    """Asserts that the parts of a weight are refused, in one line that names the weight and says why."""
    with pytest.raises(QuantStateError) as caught:
        check_state(state, weight, state_tensors, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and words in message
    assert "\n" not in message
    assert caught.value.hint == "Quantize the model again; no kernel may see this weight."


# Names


@pytest.mark.parametrize("suffix", FOUR_BIT_SUFFIXES)
def test_a_state_tensor_of_a_4_bit_weight_has_its_whole_name_in_front(suffix: str) -> None:
    assert split_state_tensor(f"m.q_proj.weight{suffix}") == ("m.q_proj.weight", suffix)
    assert split_state_tensor(f"m.experts.down_proj{suffix}") == ("m.experts.down_proj", suffix)
    assert state_tensor_name("m.q_proj.weight", suffix) == f"m.q_proj.weight{suffix}"


@pytest.mark.parametrize("suffix", INT8_SUFFIXES)
def test_a_state_tensor_of_an_int8_weight_has_the_name_of_its_module_in_front(suffix: str) -> None:
    assert split_state_tensor(f"m.q_proj{suffix}") == ("m.q_proj.weight", suffix)
    assert state_tensor_name("m.q_proj.weight", suffix) == f"m.q_proj{suffix}"


@pytest.mark.parametrize(
    "name",
    [
        "m.q_proj.weight",
        "m.q_proj.bias",
        "m.weight.absmax2",
        "m.weight_absmax",
        "m.absmax.weight",
        "m.weight.quant_state",
        "m.weight.quant_state.bitsandbytes__int4",
        "m.weight.quant_state.bitsandbytes__nf4.x",
        "m.weight.bitsandbytes__nf4",
        "m.weight.nested_offset",
        "m.weight.scb",
        "m.weight.ABSMAX",
        "SCB",
        "",
    ],
)
def test_other_names_are_not_quant_state_tensors(name: str) -> None:
    assert split_state_tensor(name) is None


def test_nested_statistics_are_not_taken_for_those_of_another_weight() -> None:
    assert split_state_tensor("w.nested_absmax") == ("w", ".nested_absmax")
    assert split_state_tensor("w.nested_quant_map") == ("w", ".nested_quant_map")
    assert split_state_tensor("w.absmax.absmax") == ("w.absmax", ".absmax")


@QUICK
@given(st.text(max_size=12), st.sampled_from([*FOUR_BIT_SUFFIXES, *INT8_SUFFIXES]))
def test_a_state_tensor_that_is_split_is_put_together_again(start: str, suffix: str) -> None:
    split = split_state_tensor(start + suffix)
    assert split is not None and split[1] == suffix
    assert state_tensor_name(*split) == start + suffix


@QUICK
@given(st.text(max_size=12), st.sampled_from([*FOUR_BIT_SUFFIXES, *INT8_SUFFIXES]))
def test_the_name_of_a_state_tensor_is_split_into_its_weight(start: str, suffix: str) -> None:
    weight = f"{start}.weight"
    assert split_state_tensor(state_tensor_name(weight, suffix)) == (weight, suffix)


# The JSON


def test_a_state_is_read() -> None:
    assert parse(SINGLE) == QuantState("nf4", 64, "bfloat16", (48, 64), None)


def test_a_nested_state_is_read() -> None:
    assert parse(NESTED) == QuantState("nf4", 64, "bfloat16", (48, 64), NestedState(256, 0.03125))


def test_an_fp4_state_is_read_from_a_tensor_of_that_name() -> None:
    assert parse(SINGLE | {"quant_type": "fp4"}, FP4).quant_type == "fp4"


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_has_its_safetensors_name(dtype: str) -> None:
    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    assert parse(SINGLE | {"dtype": dtype}).safetensors_dtype == name


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_each_blocksize_of_bitsandbytes_is_read(blocksize: int) -> None:
    assert parse(SINGLE | {"blocksize": blocksize}).blocksize == blocksize
    assert parse(NESTED | {"nested_blocksize": blocksize}).nested == NestedState(blocksize, 0.03125)


@pytest.mark.parametrize(
    ("shape", "numel", "quantized", "blocks"),
    [
        ((48, 64), 3072, 1536, 48),
        ((1,), 1, 1, 1),
        ((3, 43), 129, 65, 3),
        ((8, 8), 64, 32, 1),
        ((2, 3, 65), 390, 195, 7),
    ],
)
def test_sizes_follow_from_shape_and_blocksize(shape: tuple[int, ...], numel: int, quantized: int, blocks: int) -> None:
    state = QuantState("nf4", 64, "bfloat16", shape, None)
    assert (state.numel, state.quantized_nbytes, state.blocks) == (numel, quantized, blocks)


@pytest.mark.parametrize("offset", [0, 0.0, -1.5, 3, 1e-300, -(2 - 2**-23) * 2.0**127, (2 - 2**-23) * 2.0**127])
def test_an_offset_that_f32_can_hold_is_read(offset: float) -> None:
    assert parse(NESTED | {"nested_offset": offset}).nested == NestedState(256, float(offset))


@pytest.mark.parametrize(
    "raw",
    [
        b"\0",
        b"nonsense",
        b"{",
        b"{'blocksize': 64}",
        b'{"a": 1} {"a": 1}',
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"[" * 4096,
        b'{"a":' * 800,
        b"9" * (MAX_STATE_JSON * 2),
        json.dumps(SINGLE).encode()[:-1],
        json.dumps(SINGLE).encode() + b"\0",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_not_json(raw: bytes) -> None:
    error_from_response("not JSON (", raw)


def test_a_state_of_no_bytes() -> None:
    error_from_response("damaged quant state: empty", b"")


@pytest.mark.parametrize("doc", [[], [SINGLE], "nf4", 64, None, True, {}])
def test_json_that_is_not_a_state(doc: Any) -> None:
    error_from_response("needs the keys blocksize, dtype, quant_type, shape", doc)


@pytest.mark.parametrize("key", SINGLE)
def test_a_key_that_is_missing(key: str) -> None:
    error_from_response("needs the keys", {k: v for k, v in NESTED.items() if k != key})


@pytest.mark.parametrize(
    "key", ["", "x", "Blocksize", "absmax", "nested_absmax", "quant_state", "x.blocksize", ".shape"]
)
def test_a_key_that_bitsandbytes_does_not_write(key: str) -> None:
    error_from_response(f"unknown key {key!r}", NESTED | {key: 128})
    error_from_response(f"unknown key {key!r}", SINGLE | {key: 128})


def test_a_key_could_overrule_another_in_bitsandbytes() -> None:
    """Why unknown keys are refused: bitsandbytes takes a key for what is after its last dot, and the last one wins."""
    parts = {f"w.{suffix}": torch.zeros(1) for suffix in ("absmax", "quant_map")}
    raw = json.dumps(SINGLE | {"x.blocksize": 128}).encode()
    state = parts | {f"w{NF4}": torch.tensor(list(raw), dtype=torch.uint8)}
    assert bnb.QuantState.from_dict(state, torch.device("cpu")).blocksize == 128


@pytest.mark.parametrize(
    ("quant_type", "suffix"),
    [
        ("fp4", NF4),
        ("nf4", FP4),
        ("int8", NF4),
        ("NF4", NF4),
        ("", NF4),
        (None, NF4),
        (4, NF4),
        (["nf4"], NF4),
        ({}, NF4),
    ],
)
def test_a_quant_type_that_is_unknown_or_not_that_of_the_name(quant_type: Any, suffix: str) -> None:
    error_from_response(
        f"quant_type {quant_type!r} in a tensor named {suffix}", NESTED | {"quant_type": quant_type}, suffix
    )


WRONG_BLOCKSIZES = [0, 1, -64, 16, 63, 65, 96, 8192, 2**70, 64.0, "64", None, True, [64], {}]


@pytest.mark.parametrize("value", WRONG_BLOCKSIZES)
def test_a_blocksize_that_bitsandbytes_has_not(value: Any) -> None:
    error_from_response(f"blocksize {value!r} is not one of 32, 64,", NESTED | {"blocksize": value})


@pytest.mark.parametrize("value", WRONG_BLOCKSIZES)
def test_a_nested_blocksize_that_bitsandbytes_has_not(value: Any) -> None:
    error_from_response(f"nested_blocksize {value!r} is not one of 32, 64,", NESTED | {"nested_blocksize": value})


@pytest.mark.parametrize(
    "value", ["int8", "uint8", "float64", "BF16", "torch.bfloat16", "", None, 16, ["bfloat16"], {}]
)
def test_a_dtype_that_no_weight_is_decoded_to(value: Any) -> None:
    error_from_response(f"dtype {value!r} is not one of bfloat16, float16, float32", NESTED | {"dtype": value})


@pytest.mark.parametrize(
    "value",
    [
        [],
        None,
        3072,
        "48x64",
        {},
        [48, 0],
        [0],
        [-48, 64],
        [-48, -64],
        [48.0, 64],
        ["48", 64],
        [True, 64],
        [None],
        [[48, 64]],
        [2**40, 1],
        [10**18, 10**18],
    ],
)
def test_a_shape_that_is_not_a_list_of_sizes(value: Any) -> None:
    error_from_response(f"shape {value!r} is not a list of sizes", NESTED | {"shape": value})


@pytest.mark.parametrize("value", [[2**39, 2**39], [2**32, 2**31], [2] * 64, [2**39] * 300])
def test_a_shape_of_more_elements_than_can_be_counted(value: Any) -> None:
    error_from_response("is more than 64 bits can count", NESTED | {"shape": value})


def test_a_shape_of_as_many_elements_as_can_be_counted_is_read() -> None:
    assert parse(NESTED | {"shape": [2**32, 2**30, 1]}).numel == 2**62


@pytest.mark.parametrize("key", [*NESTED, "unknown"])
@pytest.mark.parametrize("value", ["x" * 3000, [1] * 1000, ["x" * 1000] * 3, 10**3000, {"x": "y" * 3000}], ids=type)
def test_thousands_of_characters_make_a_short_message(key: str, value: Any) -> None:
    doc = NESTED | {key: value}
    with pytest.raises(QuantStateError) as caught:
        check_state(parse(doc), *fitting(parse(NESTED)), WHERE)
    assert len(str(caught.value)) < 300


def test_a_long_key_makes_a_short_message() -> None:
    with pytest.raises(QuantStateError, match="unknown key 'xxx") as caught:
        parse(NESTED | {"x" * 3000: 1})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["float16", "bfloat16", "float64", "F32", "", None, 32, ["float32"]])
def test_a_nested_dtype_other_than_float32(value: Any) -> None:
    error_from_response(f"nested_dtype {value!r} is not float32", NESTED | {"nested_dtype": value})


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "3.5e38",
        "3.4028235677973366e38",
        "-3.5e38",
        "1" + "0" * 400,
        "null",
        "true",
        '"0.1"',
        "[0.1]",
    ],
)
def test_an_offset_that_f32_cannot_hold(text: str) -> None:
    raw = json.dumps(NESTED).replace("0.03125", text).encode()
    error_from_response("nested_offset ", raw)
    error_from_response("is not a finite number", raw)


@pytest.mark.parametrize("key", ["nested_blocksize", "nested_dtype", "nested_offset"])
def test_a_nested_state_that_is_half_there(key: str) -> None:
    error_from_response("nested_", {k: v for k, v in NESTED.items() if k != key})
    error_from_response("nested_", SINGLE | {key: NESTED[key]})


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(QUICK, max_examples=300)
@given(
    st.sampled_from(sorted(NESTED)), ANY_JSON | st.sampled_from([*NESTED.values(), 128, [1], "fp4", "float16", -0.0])
)
def test_whatever_one_key_holds_a_state_is_right_or_refused(key: str, value: Any) -> None:
    try:
        state = parse(NESTED | {key: value})
    except QuantStateError:
        return
    assert state.quant_type == "nf4" and state.blocksize in BLOCKSIZES and state.dtype in DTYPES
    assert state.shape and all(type(n) is int and n > 0 for n in state.shape)
    assert state.nested is not None and state.nested.blocksize in BLOCKSIZES and math.isfinite(state.nested.offset)


@settings(QUICK, max_examples=150)
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_a_quant_state_error(raw: bytes) -> None:
    with pytest.raises(QuantStateError):
        parse(raw)


# The sizes


@st.composite
def states(draw: st.DrawFn) -> QuantState:
    shape = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
    nested = draw(st.none() | st.builds(NestedState, st.sampled_from(BLOCKSIZES), st.floats(-1, 1)))
    quant_type, dtype = draw(st.sampled_from(["nf4", "fp4"])), draw(st.sampled_from(sorted(DTYPES)))
    return QuantState(quant_type, draw(st.sampled_from(BLOCKSIZES)), dtype, shape, nested)


def written(values: torch.Tensor, **options: Any) -> tuple[QuantState, TensorInfo, StateTensors]:
    """What bitsandbytes makes of a weight, as it would be read from a file."""
    quantized, real = bnb.quantize_4bit(values, **options)
    names = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    parts = {f".{key}": value for key, value in real.as_dict(packed=True).items()}
    suffix = next(s for s in STATE_SUFFIXES if s in parts)
    state_tensors = {key: tensor(names[value.dtype], *value.shape) for key, value in parts.items()}
    return parse(bytes(parts[suffix].tolist()), suffix), tensor(names[quantized.dtype], *quantized.shape), state_tensors


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_what_bitsandbytes_writes_passes(blocksize: int, dtype: str, quant_type: str, nested: bool) -> None:
    values = torch.ones(65, 64, dtype=getattr(torch, dtype))
    state, weight, state_tensors = written(
        values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    assert (state.quant_type, state.blocksize, state.dtype, state.shape) == (quant_type, blocksize, dtype, (65, 64))
    assert (state.nested is not None) == nested
    check_state(state, weight, state_tensors, WHERE)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 129), (3, 7, 11), (130, 130)])
def test_what_bitsandbytes_writes_of_any_shape_passes(shape: tuple[int, ...]) -> None:
    state, weight, state_tensors = written(torch.ones(shape), compress_statistics=True, blocksize=64)
    assert state.shape == shape
    check_state(state, weight, state_tensors, WHERE)


def test_what_bitsandbytes_writes_in_other_storage_passes() -> None:
    state, weight, state_tensors = written(torch.ones(48, 64), quant_storage=torch.bfloat16, blocksize=64)
    assert (weight.dtype, weight.shape) == ("BF16", (768, 1))
    check_state(state, weight, state_tensors, WHERE)


@settings(QUICK, max_examples=150)
@given(states(), st.data())
def test_parts_that_fit_pass_and_none_of_them_may_be_missing(state: QuantState, data: st.DataObject) -> None:
    weight, state_tensors = fitting(state)
    check_state(state, weight, state_tensors, WHERE)
    missing = data.draw(st.sampled_from(sorted(s for s in state_tensors if ".quant_state." not in s)))
    with pytest.raises(QuantStateError, match=missing[1:]):
        check_state(state, weight, {s: t for s, t in state_tensors.items() if s != missing}, WHERE)


@settings(QUICK, max_examples=200)
@given(states(), st.data())
def test_any_one_tensor_of_another_size_is_refused(state: QuantState, data: st.DataObject) -> None:
    weight, state_tensors = fitting(state)
    which = data.draw(st.sampled_from(["weight", *(s for s in state_tensors if s not in STATE_SUFFIXES)]))
    old = weight if which == "weight" else state_tensors[which]
    count = math.prod(old.shape)
    new = data.draw(st.integers(0, 4 * count + 8).filter(lambda n: n != count))
    changed = tensor(old.dtype, new)
    if which == "weight":
        refuses(f"the weight has {new:,}", state, changed, state_tensors)
    else:
        refuses(f"{which[1:]} is {old.dtype} [{new}]", state, weight, state_tensors | {which: changed})


@settings(QUICK, max_examples=200)
@given(states(), st.data())
def test_any_one_size_in_the_state_that_asks_for_other_tensors_is_refused(
    state: QuantState, data: st.DataObject
) -> None:
    weight, state_tensors = fitting(state)
    field = data.draw(st.sampled_from(["shape", "blocksize", "nested_blocksize"]))
    if field == "shape":
        i = data.draw(st.integers(0, len(state.shape) - 1))
        shape = list(state.shape)
        shape[i] = data.draw(st.integers(1, 200))
        wrong = state._replace(shape=tuple(shape))
    elif field == "blocksize":
        wrong = state._replace(blocksize=data.draw(st.sampled_from(BLOCKSIZES)))
    else:
        assume(state.nested is not None)
        assert state.nested is not None
        wrong = state._replace(nested=state.nested._replace(blocksize=data.draw(st.sampled_from(BLOCKSIZES))))
    assume(fitting(wrong) != (weight, state_tensors))
    refuses("", wrong, weight, state_tensors)


@settings(QUICK, max_examples=200)
@given(states(), st.data())
def test_any_one_state_tensor_of_another_dtype_is_refused(state: QuantState, data: st.DataObject) -> None:
    weight, state_tensors = fitting(state)
    suffix = data.draw(st.sampled_from([s for s in state_tensors if s not in STATE_SUFFIXES]))
    dtype = data.draw(
        st.sampled_from(["F32", "U8", "I8", "BF16", "F16", "F64"]).filter(lambda d: d != state_tensors[suffix].dtype)
    )
    refuses(
        f"{suffix[1:]} is {dtype}", state, weight, state_tensors | {suffix: tensor(dtype, *state_tensors[suffix].shape)}
    )


@pytest.mark.parametrize("suffix", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_state_tensor_that_is_missing(suffix: str) -> None:
    state = parse(NESTED)
    weight, state_tensors = fitting(state)
    del state_tensors[suffix]
    refuses(f"its quant-state tensor {suffix[1:]} is missing", state, weight, state_tensors)


def test_a_weight_of_another_size() -> None:
    _, state_tensors = fitting(parse(NESTED))
    words = "quant state says shape [48, 64], which quantizes to 1,536 bytes; the weight has 1,535"
    refuses(words, parse(NESTED), tensor("U8", 1535, 1), state_tensors)


def test_an_absmax_that_is_too_short() -> None:
    weight, state_tensors = fitting(parse(NESTED))
    words = "absmax is U8 [47]; the quant state asks for U8 [48]"
    refuses(words, parse(NESTED), weight, state_tensors | {".absmax": tensor("U8", 47)})


def test_a_wrong_shape() -> None:
    refuses("quant state says shape [48, 63]", parse(NESTED | {"shape": [48, 63]}), *fitting(parse(NESTED)))


def test_a_shape_off_by_one_element_shows_where_it_takes_another_byte() -> None:
    state = QuantState("nf4", 64, "bfloat16", (63, 1), None)
    check_state(
        state._replace(shape=(64, 1)), *fitting(state), WHERE
    )  # the spare half of the last byte, in the same block
    refuses("quantizes to 33 bytes; the weight has 32", state._replace(shape=(65, 1)), *fitting(state))


def test_a_wrong_blocksize() -> None:
    words = "absmax is U8 [48]; the quant state asks for U8 [24]"
    refuses(words, parse(NESTED | {"blocksize": 128}), *fitting(parse(NESTED)))


def test_a_wrong_nested_blocksize() -> None:
    words = "nested_absmax is F32 [1]; the quant state asks for F32 [2]"
    refuses(words, parse(NESTED | {"nested_blocksize": 32}), *fitting(parse(NESTED)))


def test_a_state_that_keeps_its_double_quantization_to_itself() -> None:
    words = "absmax is U8 [48]; the quant state asks for F32 [48]"
    refuses(words, parse(SINGLE), *fitting(parse(NESTED)))


def test_a_state_that_makes_a_double_quantization_up() -> None:
    words = "absmax is F32 [48]; the quant state asks for U8 [48]"
    refuses(words, parse(NESTED), *fitting(parse(SINGLE)))


@pytest.mark.parametrize("suffix", [".nested_absmax", ".nested_quant_map"])
def test_a_nested_state_tensor_that_no_state_asks_for(suffix: str) -> None:
    weight, state_tensors = fitting(parse(SINGLE))
    words = f"{suffix[1:]} is there, but the quant state names no double quantization"
    refuses(words, parse(SINGLE), weight, state_tensors | {suffix: tensor("F32", 256)})


def test_two_quant_states_for_one_weight() -> None:
    weight, state_tensors = fitting(parse(NESTED))
    refuses("both an nf4 and an fp4 quant state", parse(NESTED), weight, state_tensors | {FP4: tensor("U8", 200)})


def test_a_quant_state_beside_the_format_of_an_int8_weight() -> None:
    weight, state_tensors = fitting(parse(NESTED))
    words = "it has both a 4-bit quant state and weight_format, of two quantizations"
    refuses(words, parse(NESTED), weight, state_tensors | {".weight_format": tensor("U8")})


# LLM.int8


def test_an_int8_weight_with_its_scales_passes_and_with_one_too_few_does_not() -> None:
    check_int8_state(tensor("I8", 48, 64), {".SCB": tensor("F32", 48)}, WHERE)
    check_int8_state(tensor("I8", 48, 64), {".SCB": tensor("F32", 48), ".weight_format": tensor("U8")}, WHERE)
    with pytest.raises(QuantStateError, match="SCB"):
        check_int8_state(tensor("I8", 48, 64), {".SCB": tensor("F32", 47)}, WHERE)


def test_what_bitsandbytes_writes_in_int8_passes() -> None:
    quantized, scales, _ = bnb.int8_vectorwise_quant(torch.ones(6, 32, dtype=torch.float16))
    assert (quantized.dtype, scales.dtype) == (torch.int8, torch.float32)
    check_int8_state(tensor("I8", *quantized.shape), {".SCB": tensor("F32", *scales.shape)}, WHERE)


def test_scales_are_what_makes_a_weight_int8() -> None:
    assert is_int8({".SCB": None}) and is_int8({".SCB": None, ".absmax": None})
    assert not is_int8({}) and not is_int8({".weight_format": None}) and not is_int8({".absmax": None, NF4: None})


@pytest.mark.parametrize(
    ("weight", "scales"),
    [
        (tensor("I8", 48, 64), tensor("F32", 47)),
        (tensor("I8", 48, 64), tensor("F32", 49)),
        (tensor("I8", 48, 64), tensor("F32", 64)),
        (tensor("I8", 48, 64), tensor("F32")),
        (tensor("I8", 48, 64), tensor("F32", 48, 1)),
        (tensor("I8", 48, 64), tensor("F32", 1, 48)),
        (tensor("I8", 48, 64), tensor("F16", 48)),
        (tensor("I8", 48, 64), tensor("F64", 48)),
        (tensor("U8", 48, 64), tensor("F32", 48)),
        (tensor("BF16", 48, 64), tensor("F32", 48)),
        (tensor("I8", 48), tensor("F32", 48)),
        (tensor("I8", 48, 8, 8), tensor("F32", 48)),
        (tensor("I8"), tensor("F32")),
    ],
)
def test_int8_scales_that_do_not_fit(weight: TensorInfo, scales: TensorInfo) -> None:
    words = (
        f"{WHERE}: SCB is {scales.dtype} {list(scales.shape)} next to a weight of {weight.dtype} {list(weight.shape)}; "
    )
    with pytest.raises(QuantStateError) as caught:
        check_int8_state(weight, {".SCB": scales}, WHERE)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("suffix", FOUR_BIT_SUFFIXES)
def test_int8_scales_beside_a_state_tensor_of_4_bits(suffix: str) -> None:
    with pytest.raises(QuantStateError) as caught:
        check_int8_state(tensor("I8", 48, 64), {".SCB": tensor("F32", 48), suffix: tensor("U8", 48)}, WHERE)
    assert f"it has both SCB and {suffix[1:]}, of two quantizations" in str(caught.value)


@settings(QUICK, max_examples=200)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 400))
def test_int8_scales_fit_only_one_size(rows: int, columns: int, scales: int) -> None:
    state_tensors = {".SCB": tensor("F32", scales)}
    check_int8_state(tensor("I8", rows, columns), {".SCB": tensor("F32", rows)}, WHERE)
    if scales != rows:
        with pytest.raises(QuantStateError):
            check_int8_state(tensor("I8", rows, columns), state_tensors, WHERE)
