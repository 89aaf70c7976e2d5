"""The skip entries that a repair adds: the fewest that say one thing to vLLM and to transformers."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bnbfix.engines.skip_entries import Matches
from bnbfix.engines.transformers import transformers_skips
from bnbfix.engines.vllm.skip_entries import vllm_skips
from bnbfix.rules.skip_list import shortest_prefixes


def covered(unquantized: list[str], quantized: list[str], matches: Matches) -> list[str]:
    return shortest_prefixes(unquantized, matches, lambda entry: any(matches(entry, module) for module in quantized))


@pytest.mark.parametrize(
    ("unquantized", "quantized", "expected"),
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
def test_the_shortest_prefixes_are_taken(
    unquantized: list[str], quantized: list[str], expected: list[str], matches: Matches
) -> None:
    assert covered(unquantized, quantized, matches) == expected
    assert covered(unquantized[::-1], quantized[::-1], matches) == expected


def test_layer_1_is_not_named_by_what_names_layer_10_too() -> None:
    unquantized = ["m.layers.1.mlp", "m.layers.1.o_proj"]
    assert covered(unquantized, ["m.layers.10.mlp"], vllm_skips) == ["m.layers.1"]
    assert covered(unquantized, ["m.layers.10.mlp"], transformers_skips) == unquantized


def test_an_entry_is_refused_for_whatever_the_caller_names() -> None:
    assert shortest_prefixes(["a.b.c"], vllm_skips, lambda entry: entry != "a.b.c") == ["a.b.c"]
    assert shortest_prefixes(["a.b.c"], vllm_skips, lambda entry: entry == "a") == ["a.b"]
    assert shortest_prefixes(["a.b.c"], vllm_skips, lambda entry: True) == []


@pytest.mark.parametrize("matches", [vllm_skips, transformers_skips])
def test_layers_are_sorted_by_their_numbers(matches: Matches) -> None:
    unquantized = [f"m.layers.{n}.mlp.down_proj" for n in (10, 2, 11, 0, 3)]
    quantized = [f"m.layers.{n}.self_attn.o_proj" for n in range(12)]
    assert covered(unquantized, quantized, matches) == [f"m.layers.{n}.mlp" for n in (0, 2, 3, 10, 11)]


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
@example(states={f"model.layers.{n}.{linear}": n != 1 for n in range(20) for linear in LINEARS})
@example(states={f"model.layers.{n}.{linear}": n == 1 for n in range(20) for linear in LINEARS})
def test_prefixes_name_every_unquantized_module_and_no_quantized_one(matches: Matches, states: dict[str, bool]) -> None:
    unquantized = [module for module, quantize in states.items() if not quantize]
    quantized = [module for module, quantize in states.items() if quantize]
    entries = tuple(covered(unquantized, quantized, matches))
    assert [m for m in unquantized if not any(matches(e, m) for e in entries)] == []
    assert [m for m in quantized if any(matches(e, m) for e in entries)] == []
    assert all(any(m == e or m.startswith(e + ".") for m in unquantized) for e in entries), "every entry is a prefix"
    assert len(set(entries)) == len(entries)
