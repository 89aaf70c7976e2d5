"""Skip entries as vLLM and transformers read them, and the entries that say one thing to both."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bnbfix.engines.engine import Matches, matching_entries
from bnbfix.engines.transformers import transformers_skips
from bnbfix.engines.vllm.parameters import vllm_skips
from bnbfix.rules.skip_list import shortest_prefixes

V_QKV = "language_model.model.layers.3.self_attn.qkv_proj"
V_TOWER = "vision_tower.encoder.layers.0.self_attn.qkv_proj"
HF_Q = "model.language_model.layers.3.self_attn.q_proj"
HF_TOWER = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"


@pytest.mark.parametrize(
    ("entry", "vllm", "skipped"),
    [
        ("model.vision_tower", V_TOWER, False),
        ("vision_tower", V_TOWER, True),
        ("vision_tower.encoder", V_TOWER, True),
        ("vision_tower.enc", V_TOWER, False),
        ("vision", V_TOWER, False),
        ("model.language_model.layers.3.self_attn", V_QKV, False),
        ("language_model.model.layers.3.self_attn.qkv_proj", V_QKV, True),
        ("language_model.model.layers.3.self_attn.q_proj", V_QKV, False),
        ("model.language_model.layers.3.self_attn.q_proj", V_QKV, False),
        ("language_model.model.layers.3", V_QKV, True),
        ("language_model.model.layers.3.", V_QKV, False),
        ("language_model.model.layers.3", V_QKV.replace(".3.", ".30."), False),
        ("language_model.model.layers.*", V_QKV, False),
        ("qkv_proj", V_QKV, True),
        ("q_proj", V_QKV, False),
        ("3", V_QKV, True),
        ("layers.3", V_QKV, False),
        ("self_attn.qkv_proj", V_QKV, False),
        ("router.proj", "language_model.model.layers.0.router.proj", False),
        ("lm_head", "language_model.lm_head", True),
        ("", V_QKV, False),
    ],
)
def test_vllm_takes_a_component_or_a_dotted_prefix_of_its_own_name(entry: str, vllm: str, skipped: bool) -> None:
    assert vllm_skips(entry, vllm) is skipped


@pytest.mark.parametrize(
    ("entry", "hf", "skipped"),
    [
        ("model.vision_tower", HF_TOWER, True),
        ("vision_tower", HF_TOWER, False),
        ("model.language_model.layers.3.self_attn", HF_Q, True),
        ("model.language_model.layers.3.self_attn.q_proj", HF_Q, True),
        ("language_model.model.layers.3.self_attn.qkv_proj", HF_Q, False),
        ("model.language_model.layers.3", HF_Q.replace(".3.", ".30."), True),
        (r"model.language_model.layers.3\.", HF_Q.replace(".3.", ".30."), False),
        (r"model\.language_model\.layers\.\d+\.self_attn", HF_Q, True),
        (r".*\.self_attn", HF_Q, True),
        ("self_attn", HF_Q, False),
        ("q_proj", HF_Q, True),
        ("proj", HF_Q, True),
        ("k_proj", HF_Q, False),
        ("router.proj", "model.language_model.layers.0.router.proj", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_heads", False),
        ("", HF_Q, True),
    ],
)
def test_transformers_takes_a_regex_for_the_start_or_a_suffix(entry: str, hf: str, skipped: bool) -> None:
    assert transformers_skips(entry, hf) is skipped


@pytest.mark.parametrize("entry", ["(", "a{99999999999999999999}", "(" * 2000, "(?P<x>a)(?P<x>b)"])
def test_an_entry_that_is_no_regex_counts_as_plain_text(entry: str) -> None:
    with pytest.raises((re.error, OverflowError, RecursionError)):
        re.compile(entry)
    assert not transformers_skips(entry, HF_Q)
    assert transformers_skips(entry, entry + ".q_proj")
    assert transformers_skips(entry, "model." + entry)


def test_honoured_keeps_the_order_of_the_list() -> None:
    entries = ("qkv_proj", "o_proj", "model.language_model", "language_model.model.layers.3", "layers")
    assert matching_entries(entries, V_QKV, vllm_skips) == ("qkv_proj", "language_model.model.layers.3", "layers")
    assert matching_entries(entries, HF_Q, transformers_skips) == ("model.language_model",)
    assert matching_entries((), HF_Q, transformers_skips) == ()


def covered(plain: list[str], quantized: list[str], matches: Matches) -> list[str]:
    return shortest_prefixes(plain, matches, lambda entry: any(matches(entry, module) for module in quantized))


@pytest.mark.parametrize(
    ("plain", "quantized", "expected"),
    [
        ([], ["a.b"], []),
        (["vision_tower.x", "vision_tower.y.z"], ["layers.0.mlp"], ["vision_tower"]),
        (["m.layers.1.mlp", "m.layers.1.o"], ["m.layers.0.mlp"], ["m.layers.1"]),
        (["m.layers.1.mlp"], ["m.layers.0.mlp", "m.layers.1.o"], ["m.layers.1.mlp"]),
        (["b", "a.c", "a.d"], [], ["a", "b"]),
        (["m.layers.1.qkv_proj", "m.layers.2.qkv_proj"], ["m.layers.3.qkv_proj"], ["m.layers.1", "m.layers.2"]),
    ],
)
@pytest.mark.parametrize("matches", [vllm_skips, transformers_skips])
def test_cover_takes_the_shortest_prefixes(
    plain: list[str], quantized: list[str], expected: list[str], matches: Matches
) -> None:
    assert covered(plain, quantized, matches) == expected
    assert covered(plain[::-1], quantized[::-1], matches) == expected


def test_layer_1_is_not_named_by_what_names_layer_10_too() -> None:
    plain = ["m.layers.1.mlp", "m.layers.1.o_proj"]
    assert covered(plain, ["m.layers.10.mlp"], vllm_skips) == ["m.layers.1"]
    assert covered(plain, ["m.layers.10.mlp"], transformers_skips) == plain


def test_an_entry_is_refused_for_whatever_the_caller_names() -> None:
    assert shortest_prefixes(["a.b.c"], vllm_skips, lambda entry: entry != "a.b.c") == ["a.b.c"]
    assert shortest_prefixes(["a.b.c"], vllm_skips, lambda entry: entry == "a") == ["a.b"]
    assert shortest_prefixes(["a.b.c"], vllm_skips, lambda entry: True) == []


LINEARS = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "per_layer_projection"]
MODULES = st.one_of(
    st.builds(
        "{}.layers.{}.{}".format,
        st.sampled_from(["language_model.model", "model.language_model", "model"]),
        st.integers(0, 31),
        st.sampled_from(LINEARS),
    ),
    st.builds(
        "{}.encoder.layers.{}.{}.linear".format,
        st.sampled_from(["vision_tower", "model.vision_tower"]),
        st.integers(0, 12),
        st.sampled_from(LINEARS[:4]),
    ),
    st.sampled_from(
        [
            "model.embed_vision.embedding_projection",
            "embed_vision.embedding_projection",
            "lm_head",
            "model.language_model.per_layer_model_projection",
        ]
    ),
)


@pytest.mark.parametrize("matches", [vllm_skips, transformers_skips])
@given(states=st.dictionaries(MODULES, st.booleans(), min_size=1, max_size=40))
@example(states={f"model.layers.{n}.{linear}": n == 1 for n in range(20) for linear in LINEARS})
@example(states={f"model.layers.{n}.{linear}": n != 1 for n in range(20) for linear in LINEARS})
def test_cover_names_every_plain_module_and_no_quantized_one(matches: Matches, states: dict[str, bool]) -> None:
    plain = [module for module, is_plain in states.items() if is_plain]
    quantized = [module for module, is_plain in states.items() if not is_plain]
    entries = tuple(covered(plain, quantized, matches))
    assert [m for m in plain if not matching_entries(entries, m, matches)] == []
    assert [m for m in quantized if matching_entries(entries, m, matches)] == []
    assert all(any(m == e or m.startswith(e + ".") for m in plain) for e in entries), "every entry is a prefix"
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize(
    "entry",
    [
        r"(a+)+$",
        r"(.*a){20}",
        r"(a|aa)*b",
        r"(\w*)*\1!",
        "a*" * 20 + "b",
        "a?" * 30 + "a" * 30,
        "(|)" * 40 + "b",
        "(aa|aa)" * 28 + "b",
        "(aa?)(?#)*b",
        "(?x)(aa?)#\n*b",
    ],
)
def test_a_pattern_that_could_take_for_ever_counts_as_a_plain_prefix(entry: str) -> None:
    module = "a" * 60 + "!"
    assert not transformers_skips(entry, module)
    assert transformers_skips(entry, entry + ".q_proj")


@pytest.mark.parametrize("entry", [r".*(vision|audio)_tower.*", "model.vision_tower.*|model.audio_tower.*"])
def test_patterns_that_people_write_are_patterns(entry: str) -> None:
    assert transformers_skips(entry, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not transformers_skips(entry, "model.language_model.layers.0.self_attn.q_proj")


def test_a_module_whose_name_has_no_end_is_held_against_prefixes_alone() -> None:
    module = "model." + "a" * 100_000
    assert not transformers_skips(".*.*.*b", module)
    assert transformers_skips("model.a", module) and transformers_skips("aaa", module)
