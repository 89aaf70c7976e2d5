"""What a config says of a model, and what every tensor name is: on the names and configs of real checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bnbfix.engines.registry import find_ranges
from bnbfix.engines.targets import resolve_target
from bnbfix.errors import InputError, NotApplicable
from bnbfix.models.detect import read_model
from bnbfix.models.family import FULL, SLIDING, Model, TensorRole
from bnbfix.models.roles import KINDS, canonical, classify_tensor
from tests.support.build import Make, opened

TEXT: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL]}


def config(architecture: str | None = "Gemma4ForConditionalGeneration", **text: Any) -> dict[str, Any]:
    named = {"architectures": [architecture]} if architecture else {}
    return named | {"text_config": TEXT | text}


def nest(depth: int) -> list[Any]:
    """Lists in lists."""
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


def model(**text: Any) -> Model:
    return read_model(config(**text))


@pytest.mark.parametrize(
    ("family", "name", "k_eq_v", "first_shared", "moe", "types"),
    [
        ("dense31b", "gemma4", True, 6, False, "SSFSSF"),
        ("e4b", "gemma4", False, 4, False, "SFSFSF"),
        ("e4b-noshared", "gemma4", False, 4, False, "SFSFSF"),
        ("e2b", "gemma4", False, 4, False, "SFSFSF"),
        ("moe26b", "gemma4", True, 6, True, "SSFSSF"),
        ("unified12b", "gemma4_unified", True, 6, False, "SSFSSF"),
        ("text", "gemma4_text", True, 6, False, "SSFSSF"),
    ],
)
def test_a_family_is_read_off_its_config(
    family: str, name: str, k_eq_v: bool, first_shared: int, moe: bool, types: str, pristine: Make
) -> None:
    found = read_model(json.loads((pristine(family, "bf16") / "config.json").read_text()))
    assert found.family.name == name
    assert (found.k_eq_v, found.first_shared, found.moe) == (k_eq_v, first_shared, moe)
    assert "".join(t[0].upper() for t in found.layer_types) == types
    assert found.family.text_only == (family == "text")
    assert found.text_config["hidden_size"] == 128


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_text", "gemma4_unified"])
def test_without_architectures_the_model_type_says_the_family(model_type: str) -> None:
    doc = config(None) | TEXT | {"model_type": model_type}
    assert read_model(doc).family.name == model_type


@pytest.mark.parametrize(
    ("doc", "words"),
    [
        ({}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": "Gemma4ForCausalLM"}, "names no architecture"),
        ({"architectures": [{"a": 1}]}, "names no architecture"),
        ({"model_type": "gemma3"}, "is 'gemma3', without a class in architectures"),
        ({"model_type": ["gemma4"]}, "is ['gemma4'], without a class in architectures"),
        ({"model_type": "x" * 10**6}, "xxx, without a class in architectures"),
        ({"architectures": ["MambaForCausalLM"]}, "is a MambaForCausalLM, which bnbfix does not know"),
        ({"architectures": ["x" * 10**6], "model_type": "gemma4"}, "xxx, which bnbfix does not know"),
        ({"architectures": ["../../setup"]}, "is a ../../setup, which bnbfix does not know"),
    ],
)
def test_another_model_is_not_applicable(doc: dict[str, Any], words: str) -> None:
    with pytest.raises(NotApplicable) as caught:
        find_ranges(read_model(doc), resolve_target(None))
    assert str(caught.value).startswith("config.json: ") and words in str(caught.value)
    assert len(str(caught.value)) < 200, "an error is one line"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is None, not a count"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"num_hidden_layers": 10_001, "layer_types": None}, "num_hidden_layers is 10001"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1"),
        ({"num_kv_shared_layers": [1]}, "num_kv_shared_layers is [1]"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4, of 3 layers"),
        ({"layer_types": [SLIDING, FULL]}, "for each of 3 layers"),
        ({"layer_types": [SLIDING, FULL, "chunked_attention"]}, "layer_types must name"),
        ({"layer_types": [SLIDING, FULL, None]}, "layer_types must name"),
        ({"layer_types": [[SLIDING], {}, FULL]}, "layer_types must name"),
        ({"layer_types": {"0": FULL}}, "layer_types must name"),
        ({"layer_types": FULL}, "layer_types must name"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_input_error(text: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        model(**text)
    assert words in str(caught.value) and caught.value.where == "config.json"


@pytest.mark.parametrize("text_config", [None, [], "gemma4_text"])
def test_a_config_without_text_config_is_an_input_error(text_config: Any) -> None:
    with pytest.raises(InputError, match="text_config is missing"):
        read_model(config() | {"text_config": text_config})


def test_layer_types_default_to_transformers_own() -> None:
    assert model(num_hidden_layers=12, layer_types=None).layer_types == ((SLIDING,) * 5 + (FULL,)) * 2
    found = model(num_hidden_layers=8, layer_types=None).layer_types
    assert [i for i, kind in enumerate(found) if kind == FULL] == [5, 7]
    assert model(num_hidden_layers=0, layer_types=None).layer_types == ()


def test_the_last_layer_attends_to_everything_whatever_the_config_says() -> None:
    found = model(layer_types=[FULL, SLIDING, SLIDING], attention_k_eq_v=True)
    assert found.layer_types == (FULL, SLIDING, FULL)
    assert [found.k_serves_as_v(i) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize("shared", [None, 0])
def test_no_layer_shares_unless_the_config_says_so(shared: int | None) -> None:
    found = model(num_kv_shared_layers=shared)
    assert [found.kv_shared(i) for i in range(3)] == [False] * 3


def test_layers_that_share_take_k_and_v_from_the_last_one_of_their_kind_before_them() -> None:
    types = [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]
    found = model(num_hidden_layers=7, layer_types=types, num_kv_shared_layers=2)
    assert [found.kv_shared(i) for i in range(9)] == [False] * 5 + [True] * 2 + [False] * 2
    assert found.kv_donors(5) == [3, 2, 0]
    assert found.kv_donors(6) == [4, 1]
    assert model(num_kv_shared_layers=3).kv_donors(0) == []


def test_k_serves_as_v_only_in_full_attention_layers_with_their_own_k() -> None:
    types = [FULL, SLIDING, FULL, FULL]
    found = model(num_hidden_layers=4, layer_types=types, num_kv_shared_layers=1, attention_k_eq_v=True)
    assert [found.k_serves_as_v(i) for i in range(6)] == [True, False, True, False, False, False]
    assert not any(model(num_hidden_layers=4, layer_types=types).k_serves_as_v(i) for i in range(6))


L = "model.language_model.layers.11."
NAMES = {  # real names: (role, layer, part)
    L + "self_attn.q_proj.weight": ("attention", 11, "q_proj"),
    L + "self_attn.k_proj.weight": ("attention", 11, "k_proj"),
    L + "self_attn.v_proj.weight": ("attention", 11, "v_proj"),
    L + "self_attn.o_proj.weight": ("attention", 11, "o_proj"),
    L + "mlp.gate_proj.weight": ("mlp", 11, "gate_proj"),
    L + "mlp.up_proj.weight": ("mlp", 11, "up_proj"),
    L + "mlp.down_proj.weight": ("mlp", 11, "down_proj"),
    L + "per_layer_input_gate.weight": ("per_layer", 11, None),
    L + "per_layer_projection.weight": ("per_layer", 11, None),
    "model.language_model.per_layer_model_projection.weight": ("per_layer", None, None),
    "model.language_model.per_layer_projection_norm.weight": ("other", None, None),
    L + "router.proj.weight": ("router", 11, None),
    L + "router.scale": ("other", None, None),
    L + "experts.gate_up_proj": ("fused_experts", 11, "gate_up_proj"),
    L + "experts.down_proj": ("fused_experts", 11, "down_proj"),
    L + "experts.127.gate_proj.weight": ("expert", 11, "gate_proj"),
    L + "moe.experts.0.down_proj.weight": ("expert", 11, "down_proj"),
    L + "experts.gate_up_proj_4bit.12.weight": ("expert_linear", 11, "gate_up_proj"),
    L + "experts.down_projs.0.weight": ("expert_linear", 11, "down_proj"),
    L + "experts.down_projs.0.bias": ("expert_bias", 11, "down_proj"),
    L + "self_attn.q_norm.weight": ("other", None, None),
    L + "self_attn.k_norm.weight": ("other", None, None),
    L + "input_layernorm.weight": ("other", None, None),
    L + "layer_scalar": ("other", None, None),
    "model.language_model.embed_tokens.weight": ("other", None, None),
    "model.language_model.embed_tokens_per_layer.weight": ("other", None, None),
    "model.language_model.norm.weight": ("other", None, None),
    "lm_head.weight": ("lm_head", None, None),
    "model.vision_tower.patch_embedder.input_proj.weight": ("pixel_projection", None, None),
    "model.vision_tower.patch_embedder.position_embedding_table": ("other", None, None),
    "model.vision_tower.encoder.layers.26.self_attn.q_proj.linear.weight": ("vision_tower", None, None),
    "model.vision_tower.encoder.layers.26.mlp.down_proj.linear.weight": ("vision_tower", None, None),
    "model.vision_tower.encoder.layers.26.mlp.down_proj.input_min": ("other", None, None),
    "model.vision_tower.std_bias": ("other", None, None),
    "model.embed_vision.embedding_projection.weight": ("embedder", None, None),
    "model.embed_audio.embedding_projection.weight": ("embedder", None, None),
    "model.audio_tower.layers.3.self_attn.relative_k_proj.weight": ("audio_tower", None, None),
    "model.audio_tower.layers.3.feed_forward1.ffw_layer_1.linear.weight": ("audio_tower", None, None),
    "model.audio_tower.subsample_conv_projection.input_proj_linear.weight": ("audio_tower", None, None),
    "model.audio_tower.output_proj.weight": ("audio_tower", None, None),
    "model.audio_tower.output_proj.bias": ("other", None, None),
    "model.vision_embedder.patch_dense.weight": ("patch_dense", None, None),
    "model.vision_embedder.patch_dense.bias": ("other", None, None),
    "model.vision_embedder.patch_ln1.weight": ("other", None, None),
    "model.vision_embedder.pos_embedding": ("other", None, None),
}


def older(name: str) -> str:
    """The name as checkpoints of the older prefix spell it."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return "language_model." + name if name.startswith("lm_head") else name.removeprefix("model.")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_its_role_layer_and_part_under_either_prefix(name: str) -> None:
    number = next((int(part) for part in name.partition("experts.")[2].split(".") if part.isdecimal()), None)
    expected = TensorRole(name, *NAMES[name], prefix=classify_tensor(name).prefix, number=number)
    assert classify_tensor(name) == expected
    assert classify_tensor(older(name)) == expected
    assert canonical(older(name)) == canonical(name) == name


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("model.language_model.")])
def test_a_text_only_checkpoint_has_the_same_roles(name: str) -> None:
    short = name.replace("model.language_model.", "model.", 1)
    assert classify_tensor(short) == classify_tensor(name)


def test_every_role_is_among_the_names_above() -> None:
    assert {role for role, _, _ in NAMES.values()} == {kind for kind, *_ in KINDS} - {"linear"} | {"other"}


@pytest.mark.parametrize(
    ("name", "kind", "layer", "part"),
    [
        ("model.layers.3.mlp.experts.gate_up_proj", "fused_experts", 3, "gate_up_proj"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "expert", 3, "down_proj"),
        ("language_model.model.layers.3.feed_forward.experts.down_proj", "fused_experts", 3, "down_proj"),
        ("model.layers.3.self_attn.qkv_proj.weight", "linear", None, None),
        ("model.visual.blocks.0.attn.qkv.weight", "linear", None, None),
        ("model.visual.blocks.0.norm1.weight", "other", None, None),
        ("model.visual.patch_embed.proj.bias", "other", None, None),
        ("model.layers.3.self_attn.k_proj.weight", "attention", 3, "k_proj"),
    ],
)
def test_names_of_other_classes(name: str, kind: str, layer: int | None, part: str | None) -> None:
    role = classify_tensor(name)
    assert (role.kind, role.layer, role.part) == (kind, layer, part)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        (L + "experts.3.up_proj.weight", "experts"),
        (L + "moe.experts.3.up_proj.weight", "moe.experts"),
        (L + "experts.gate_up_proj", None),
        (L + "mlp.up_proj.weight", None),
    ],
)
def test_the_prefix_of_an_expert_is_kept(name: str, prefix: str | None) -> None:
    assert classify_tensor(name).prefix == prefix


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.x.mlp.up_proj.weight",
        "model.language_model.layers.01.mlp.up_proj.weight",
        "model.language_model.layers.-1.mlp.up_proj.weight",
        "model.language_model.layers.\u0663.mlp.up_proj.weight",
        f"model.language_model.layers.{'9' * 5000}.mlp.up_proj.weight",
        f"model.language_model.layers.1.experts.{'9' * 5000}.up_proj.weight",
        "model.language_model.layers.1.mlp.up_proj.weight.absmax",
        "model.language_model.layers.1.mlp.up_proj",
        "a.model.language_model.layers.1.mlp.up_proj.weight",
        "lm_head.bias",
        "",
    ],
)
def test_what_no_model_has_is_in_no_layer(name: str) -> None:
    role = classify_tensor(name)
    assert role.kind in ("other", "linear") and role.layer is None


@pytest.mark.parametrize("family", ["dense31b", "e4b", "moe26b", "unified12b", "text"])
def test_both_prefixes_of_a_whole_checkpoint_mean_the_same(family: str, pristine: Make) -> None:
    names = list(opened(pristine(family, "bf16")).tensors)
    other = list(opened(pristine(family, "bf16", prefix="language_model.model.")).tensors)
    assert (set(names) == set(other)) == (family == "text"), "a text-only checkpoint has only one spelling"
    assert {canonical(n) for n in names} == {canonical(n) for n in other}
    roles = {classify_tensor(n).kind for n in names}
    assert {"attention", "mlp", "other"} <= roles
    assert ("router" in roles) == ("fused_experts" in roles) == (family == "moe26b")
    assert ("patch_dense" in roles) == (family == "unified12b")
    assert ("audio_tower" in roles) == ("per_layer" in roles) == (family == "e4b")
    assert ("pixel_projection" in roles) == (family in ("dense31b", "e4b", "moe26b"))


@pytest.mark.parametrize("value", [10**5000, nest(10_000)], ids=["digits", "depth"])
def test_a_config_that_cannot_be_written_as_json_is_equal_to_no_other(value: Any) -> None:
    one, other = (read_model(config() | {"more": value}) for _ in range(2))
    assert one.key == one.key and len({one.key, other.key}) == 2
    assert model().key == model().key
