"""Skip entries as vLLM and transformers read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bnbfix.engines.skip_entries import Matches, NamedModules, SkipList
from bnbfix.engines.transformers import transformers_skips
from bnbfix.engines.vllm.skip_entries import vllm_skips

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
def test_an_entry_that_is_not_a_regex_counts_as_a_prefix(entry: str) -> None:
    with pytest.raises((re.error, OverflowError, RecursionError)):
        re.compile(entry)
    assert not transformers_skips(entry, HF_Q)
    assert transformers_skips(entry, entry + ".q_proj")
    assert transformers_skips(entry, "model." + entry)


def test_entries_that_name_a_module_keep_the_order_of_the_list() -> None:
    entries = ("qkv_proj", "o_proj", "model.language_model", "language_model.model.layers.3", "layers")
    assert SkipList(entries, vllm_skips).find(V_QKV) == ("qkv_proj", "language_model.model.layers.3", "layers")
    assert SkipList(entries, transformers_skips).find(HF_Q) == ("model.language_model",)
    assert SkipList((), transformers_skips).find(HF_Q) == ()


def ends_with(entry: str, module: str) -> bool:
    """How a reader might read entries that has nothing to look them up by."""
    return module.endswith(entry)


NAMES = st.text("ab.1", max_size=8)
ENTRIES = st.one_of(NAMES, st.text("ab.1*+?|()[]^$\\", max_size=8))


@pytest.mark.parametrize("matches", [vllm_skips, transformers_skips, ends_with])
@given(entries=st.lists(ENTRIES, max_size=8), modules=st.lists(NAMES, max_size=8))
@example(entries=["", ".", "a.", "a.b", "axb", "a.b"], modules=["", "a", "a.b", "aab.1", "b.a.b"])
def test_what_is_looked_up_is_what_comparing_each_with_each_finds(
    matches: Matches, entries: list[str], modules: list[str]
) -> None:
    listed, named = SkipList(entries, matches), NamedModules(modules, matches)
    for module in modules:
        assert listed.find(module) == tuple(e for e in entries if matches(e, module))
    for entry in entries:
        assert named.any_named_by(entry) == any(matches(entry, module) for module in modules)


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
def test_a_pattern_that_could_take_for_ever_counts_as_a_prefix(entry: str) -> None:
    module = "a" * 60 + "!"
    assert not transformers_skips(entry, module)
    assert transformers_skips(entry, entry + ".q_proj")


@pytest.mark.parametrize("entry", [r".*(vision|audio)_tower.*", "model.vision_tower.*|model.audio_tower.*"])
def test_patterns_that_people_write_are_patterns(entry: str) -> None:
    assert transformers_skips(entry, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not transformers_skips(entry, "model.language_model.layers.0.self_attn.q_proj")


def test_an_endless_module_name_is_compared_only_with_prefixes() -> None:
    module = "model." + "a" * 100_000
    assert not transformers_skips(".*.*.*b", module)
    assert transformers_skips("model.a", module) and transformers_skips("aaa", module)
