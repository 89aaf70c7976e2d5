"""What the recorded profiles say of a class: places of tensors, parameters, and names that are known or refused."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest

from bnbfix.engines.engine import Expectation, ReleaseRange
from bnbfix.engines.manifest import find_slot
from bnbfix.engines.targets import find_range
from bnbfix.engines.transformers import find_module
from bnbfix.engines.vllm.facts import ModelFacts
from bnbfix.engines.vllm.profiles import (
    FOLDER,
    INDEX,
    evaluate_feature,
    evaluate_size,
    find_numbers,
    find_pattern,
    load_profile,
)
from bnbfix.engines.vllm.recorded import expect
from bnbfix.engines.vllm.releases import ranges
from bnbfix.errors import InputError
from bnbfix.models.detect import read_model
from bnbfix.models.family import Model, read_path
from tests.support.build import Make, opened
from tests.support.families import SHAPES

L = "model.language_model.layers.2."
V = "language_model.model.layers.2."


def row(release: str) -> ReleaseRange:
    found = find_range(release)
    assert found is not None
    return found


def expectation(model: Model, release: str) -> Expectation:
    found = expect(model, row(release))
    assert found is not None
    return found


def module(model: Model, release: str, name: str) -> str | None:
    slot = find_slot(name, expectation(model, release))
    return slot.module if slot else None


@pytest.fixture
def models(pristine: Make) -> dict[str, Model]:
    return {
        family: read_model(opened(pristine(family, "skip")).config)
        for family in ("dense31b", "e4b", "moe26b", "unified12b", "text")
    }


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("dense31b", L + "self_attn.q_proj.weight", V + "self_attn.qkv_proj"),
        ("dense31b", L + "self_attn.k_proj.weight", V + "self_attn.qkv_proj"),
        ("dense31b", L + "self_attn.o_proj.weight", V + "self_attn.o_proj"),
        ("dense31b", L + "mlp.gate_proj.weight", V + "mlp.gate_up_proj"),
        ("dense31b", L + "mlp.up_proj.weight", V + "mlp.gate_up_proj"),
        ("dense31b", L + "mlp.down_proj.weight", V + "mlp.down_proj"),
        ("moe26b", L + "router.proj.weight", V + "router.proj"),
        ("moe26b", L + "experts.3.up_proj.weight", V + "experts"),
        (
            "e4b",
            "model.language_model.per_layer_model_projection.weight",
            "language_model.model.per_layer_model_projection",
        ),
        ("dense31b", "model.vision_tower.patch_embedder.input_proj.weight", "vision_tower.patch_embedder.input_proj"),
        ("e4b", "model.audio_tower.output_proj.weight", "audio_tower.output_proj"),
        ("dense31b", "model.embed_vision.embedding_projection.weight", "embed_vision.embedding_projection"),
        ("unified12b", "model.vision_embedder.patch_dense.weight", "vision_embedder.patch_dense"),
        ("text", "model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.qkv_proj"),
    ],
)
def test_vllms_name_of_a_module_in_both_spellings_of_the_file(
    models: dict[str, Model], family: str, name: str, expected: str
) -> None:
    older = re.sub(r"^model\.", "", name.replace("model.language_model.", "language_model.model."))
    assert module(models[family], "0.32.0", name) == expected
    if family != "text":
        assert module(models[family], "0.32.0", older) == expected


@pytest.mark.parametrize("release", [r.first for r in ranges()])
def test_q_of_a_kv_shared_layer_is_a_module_of_its_own_where_the_release_drops_k_and_v(
    models: dict[str, Model], release: str
) -> None:
    attention, fused = "language_model.model.layers.4.self_attn.", row(release).needs_shared_kv
    names = [f"model.language_model.layers.4.self_attn.{part}.weight" for part in ("q_proj", "k_proj")]
    q, k = (module(models["e4b"], release, name) for name in names)
    assert q == attention + ("qkv_proj" if fused else "q_proj")
    assert k == (attention + "qkv_proj" if fused else None)


@pytest.mark.parametrize("release", [r.first for r in ranges()])
def test_traits_of_the_release_table_are_what_the_profiles_recorded(models: dict[str, Model], release: str) -> None:
    here, dense = row(release), expectation(models["dense31b"], release)
    v = dense.place(L + "self_attn.v_proj.weight")
    assert v is not None and v.refused == here.refuses_v
    if here.expert_prefix is not None:
        experts = expectation(models["moe26b"], release)
        taken = {
            prefix
            for prefix in ("experts", "moe.experts")
            if (place := experts.place(f"{L}{prefix}.0.up_proj.weight")) and place.fills
        }
        assert here.expert_prefix in taken
        assert experts.expert_prefix == here.expert_prefix
    known = "Gemma4UnifiedForConditionalGeneration" in here.classes
    assert (expect(models["unified12b"], here) is not None) == known


def test_names_that_no_release_may_stop_at_are_ignored(models: dict[str, Model]) -> None:
    for release in ranges():
        found = expectation(models["dense31b"], release.first)
        for name in (L + "self_attn.rotary_emb.inv_freq", L + "self_attn.q_proj.bias"):
            place = found.place(name)
            assert place is not None and not place.refused and not place.fills, (release.name, name)


@pytest.mark.parametrize(
    "name",
    [
        "score.weight",
        "v_head.summary.weight",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.score.weight",
        f"model.language_model.layers.{'9' * 5000}.mlp.up_proj.weight",
    ],
)
def test_names_that_every_release_stops_at_are_refused(models: dict[str, Model], name: str) -> None:
    for release in ranges():
        place = expectation(models["dense31b"], release.first).place(name)
        assert place is not None
        assert place.refused or "layers.9" in name, release.name


def test_a_layer_beyond_the_last_is_unknown_from_0_31_on(models: dict[str, Model]) -> None:
    name = "model.language_model.layers.6.input_layernorm.weight"
    for release, refused in (("0.32.0", True), ("0.31.0", True), ("0.27.1", False)):
        place = expectation(models["dense31b"], release).place(name)
        assert place is not None and place.refused == refused


def test_shapes_follow_from_the_config(models: dict[str, Model]) -> None:
    found = expectation(models["dense31b"], "0.32.0")
    expected = {
        "model.language_model.embed_tokens.weight": (512, 128),
        "model.language_model.layers.0.self_attn.q_proj.weight": (128, 128),
        L + "self_attn.q_proj.weight": (256, 128),
        "model.language_model.layers.0.self_attn.k_norm.weight": (32,),
        L + "self_attn.k_norm.weight": (64,),
        "model.vision_tower.encoder.layers.1.mlp.down_proj.linear.weight": (64, 128),
    }
    for name, shape in expected.items():
        place = found.place(name)
        assert place is not None and place.shape == shape, name


def test_both_sides_leave_language_model_out_of_a_text_only_class(models: dict[str, Model]) -> None:
    assert module(models["text"], "0.32.0", "model.language_model.layers.2.self_attn.q_proj.weight") == (
        "model.layers.2.self_attn.qkv_proj"
    )
    name = "model.layers.2.self_attn.q_proj.weight"
    assert find_module(name, models["text"].family.architecture) == name.removesuffix(".weight")


@pytest.mark.parametrize("path", sorted(p for p in FOLDER.glob("*.json") if p.name != INDEX), ids=lambda p: p.stem)
def test_every_row_of_a_profile_is_a_range_and_every_size_a_formula(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text("utf-8")
    profile = json.loads(text)
    assert profile["architecture"] == path.stem and profile["schema"] == 1
    assert len(path.read_bytes()) < 200_000
    for kind in ("known", "tensors", "parameters", "unknown", "aliases"):
        found = [profile[kind]] if kind == "known" else profile[kind].values()
        for rows in found:
            for first, last, _ in rows:
                assert find_range(first) and find_range(last) and first <= last
    assert all(formula is not None for formula in profile["stacks"].values())
    assert '"shape":[null' not in text and ",null" not in text  # no size is left unchecked


@pytest.mark.parametrize(
    ("feature", "config", "layer", "value"),
    [
        (["true", "moe"], {"moe": True}, None, "1"),
        (["true", "moe"], {}, 3, "0"),
        (["item", "types", "full"], {"types": ["full", "slide"]}, 1, "0"),
        (["item", "types", "full"], {"types": ["full", "slide"]}, 2, "?"),
        (["last", "shared", "layers"], {"shared": 2, "layers": 6}, 4, "1"),
        (["last", "shared", "layers"], {"shared": 2}, 4, "?"),
        (["first", "dense"], {"dense": 3}, 2, "1"),
        (["in", "cross"], {"cross": [3]}, 3, "1"),
        (["in", "cross"], {}, 3, "0"),
        (["every", "step"], {"step": 2}, 1, "1"),
        (["every", "step"], {"step": 0}, 1, "?"),
        (["number", "2"], {}, 2, "1"),
        (["number", "2"], {}, None, "?"),
    ],
)
def test_features(feature: list[str], config: dict[str, object], layer: int | None, value: str) -> None:
    assert evaluate_feature(feature, config.get, layer) == value


@pytest.mark.parametrize(
    ("formula", "size"),
    [
        ("a", 6),
        ("2*a", 12),
        ("a+-1", 5),
        ("a//b", 1),
        ("a*b", 24),
        ("a*b/4", 6),
        ("a*b+2*b", 32),
        ("b//a", 0),
        ("a//b*a//b+1", 2),
        ("a//c", None),
        ("list.1", 2),
        ("7", 7),
        ("c", None),
        ("list", 3),
        (None, None),
    ],
)
def test_sizes(formula: str | None, size: int | None) -> None:
    config: dict[str, object] = {"a": 6, "b": 4, "list": [1, 2, 3], "c": "x"}
    assert evaluate_size(formula, partial(read_path, config)) == size


def test_numbers_in_names() -> None:
    assert find_pattern("a.0.b.12.c2.03.x") == "a.*.b.*.c2.03.x"
    assert find_numbers("a.0.b.12.c2.03.x") == (0, 12)
    assert find_pattern("a.timm_model.blocks.0.1.x") == "a.timm_model.blocks.0.1.x"
    assert find_numbers("a.timm_model.blocks.0.1.x") == ()


@pytest.mark.parametrize(
    ("sizes", "size"), [([8, 8], 8), (8, 8), ([8, 9], None), ([], None), (None, None), ("8", None)]
)
def test_the_size_of_each_layer(sizes: object, size: int | None) -> None:
    assert evaluate_size("2*sizes.each", partial(read_path, {"sizes": sizes})) == (None if size is None else 2 * size)


def test_what_every_user_downloads_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_000_000


def test_of_a_class_that_was_not_surveyed_nothing_is_known() -> None:
    assert load_profile("NoSuchForCausalLM") is None
    assert find_module("model.layers.0.mlp.up_proj.weight", "NoSuchForCausalLM") == "model.layers.0.mlp.up_proj"
    assert expect(read_model({"architectures": ["NoSuchForCausalLM"]}), row("0.32.0")) is None


def test_layers_times_experts_as_no_model_has_are_an_input_error(pristine: Make) -> None:
    config = opened(pristine("moe26b", "skip")).config
    text = config["text_config"] | {"num_hidden_layers": 1000, "layer_types": ["full_attention"] * 1000}
    model = read_model({**config, "text_config": text | {"num_experts": 1001}})
    with pytest.raises(InputError, match=r"asks for 1,001 .*experts, as no model has"):
        ModelFacts(profile_of(model), model).expand("model.language_model.layers.*.experts.*")


def profile_of(model: Model) -> dict[str, Any]:
    found = load_profile(model.family.architecture)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["LlavaNextForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_a_refused_spelling_is_renamed_to_one_that_is_read(name: str) -> None:
    model, refused = read_model(SHAPES[name]["config"]), 0
    tower = [n.removeprefix("vision_tower.") for n in SHAPES[name]["tensors"] if n.startswith("vision_tower.")]
    for found in filter(None, (expect(model, release) for release in ranges())):
        for bare in [n.removeprefix("vision_model.") for n in tower]:
            for spelling in (f"vision_tower.{bare}", f"vision_tower.vision_model.{bare}"):
                place, other = found.place(spelling), found.rename(spelling)
                if place is not None and place.refused:
                    refused += 1
                    assert other is not None and (to := found.place(other)) is not None and not to.refused, spelling
                else:
                    assert other is None or other.endswith(bare)
    assert refused
