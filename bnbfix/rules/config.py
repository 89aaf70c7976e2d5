"""config.json: what it says and the weights or the release contradict, or a newer transformers spells otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.checkpoint import COMPARED_CHUNK, Checkpoint
from ..models.family import FULL, Model
from ..models.gemma4 import FAMILIES
from .changes import Changes, ConfigEdit, Request
from .rule import Case, Code, Hit, Severity, releases_where, rule

DEFAULT_GLOBAL_HEAD_DIM = 512  # transformers' default where a config names none


@rule(
    Code.PER_LAYER_CONFIG,
    "config.json in a newer form",
    why="transformers 5.19 writes text_config.per_layer_config in place of global_head_dim and "
    "num_global_key_value_heads. Older ones ignore it and take defaults, or stop with "
    "`AmbiguousGlobalPerLayerAttributeError: 'head_dim' is a per-layer attribute`. It calls the vision tower's "
    "rope_type axial, not default, which older ones answer with `KeyError: 'axial'`.",
    fix="per_layer_config is replaced by the two older keys, rope_type axial by default; older and newer "
    "releases read that form alike.",
)
def check_per_layer_config(case: Case) -> Iterator[Hit]:
    model = case.inspection.model
    expectation = case.expectation
    if expectation and expectation.refuses_axial_rope and has_axial_rope(case.inspection.checkpoint.config):
        words = "config.json: vision_config's rope_type \"axial\" is unknown to the release's transformers"
        yield Hit(Severity.FAILS, (), words)
    if case.release.per_layer_config == "read":
        return
    if model.text_config.get("per_layer_config") is None:
        return
    old = legacy_head_config(model)
    if case.release.per_layer_config == "ignored":
        defaults = {"global_head_dim": DEFAULT_GLOBAL_HEAD_DIM, "num_global_key_value_heads": None}
        if old is not None and all(old.get(k, d) == d for k, d in defaults.items()):
            return
    message = "config.json: text_config.per_layer_config is not read by the release's transformers"
    yield Hit(Severity.FAILS, (), message, None if old is not None else "it says more than the older keys can")


_IGNORES = releases_where(lambda r: not r.uses_tied_lm_head)
_USES = releases_where(lambda r: r.uses_tied_lm_head)


@rule(
    Code.TIED_LM_HEAD,
    "lm_head next to tied embeddings",
    severity=Severity.WRONG,
    why="config.json says tie_word_embeddings (which is also the default), but the file holds an lm_head of its own. "
    f"{_IGNORES} ignores it and computes with the embeddings; {_USES} uses it. Where the two differ, as after training "
    "lm_head, the older releases silently answer wrongly. bnbfix compares the bytes; of a repo on the Hub, only the "
    f"first {COMPARED_CHUNK >> 20} MiB.",
    fix="tie_word_embeddings is set to false, which every release obeys.",
    upstream=[51665],
    after_loading=True,
)
def check_tied_lm_head(case: Case) -> Iterator[Hit]:
    inspection = case.inspection
    head = inspection.lm_head
    if head is None or not case.ignores_lm_head:
        return
    ignored = "config.json says that it is tied to the embeddings, so the release ignores it"
    if inspection.lm_head_is_copy is False:
        yield Hit(Severity.WRONG, (head.name,), f"differs from the embeddings; {ignored}")
    elif inspection.lm_head_is_copy:
        yield Hit(Severity.NOTE, (head.name,), f"a copy of the embeddings; {ignored}", "nothing is wrong with that")
    else:
        reason = "if lm_head was trained on its own, set tie_word_embeddings to false in config.json"
        yield Hit(Severity.NOTE, (head.name,), f"not compared with the embeddings; {ignored}", reason)


@rule(
    Code.QUANTIZATION_CONFIG,
    "quantization_config does not describe the weights",
    why="The weights are quantized, but vLLM does not see it, or takes 4 bits for 8: quantization_config is missing or "
    "inside text_config, where vLLM's bitsandbytes loader does not look; it has no quant_method, which transformers "
    "infers and vLLM does not; or load_in_8bit contradicts the weights. Loading stops with `Tried to load weights of "
    "size [N, 1] to a parameter of size [out, in]` or `Blockwise 4bit quantization only supports 16/32-bit floats`.",
    fix="The keys are set to what the quant states say, in a quantization_config at the top of config.json.",
    release_independent=True,
)
def check_quantization_config(case: Case) -> Iterator[Hit]:
    checkpoint = case.inspection.checkpoint
    at_top, wrong = checkpoint.config.get("quantization_config"), _right_keys(checkpoint)
    if not at_top:
        place = "is inside text_config" if checkpoint.quantization else "is missing"
        yield Hit(Severity.FAILS, (), f"config.json: quantization_config {place}, but the weights are quantized")
    elif "quant_method" in wrong:
        yield Hit(Severity.FAILS, (), "config.json: quantization_config has no quant_method")
    if at_top and "load_in_8bit" in wrong:
        said, really = ("4", "8") if wrong["load_in_8bit"] else ("8", "4")
        yield Hit(
            Severity.FAILS, (), f"config.json says load_in_{said}bit, but the weights are quantized to {really} bits"
        )


@rule(
    Code.OTHER_CLASS,
    "text-only class, multimodal config",
    severity=Severity.NOTE,
    why="architectures names the text-only class, and the rest of config.json is that of a multimodal model. vLLM "
    "loads the language model and ignores the towers and embedders.",
    fix="Nothing needs to be done to serve text.",
    release_independent=True,
)
def check_other_class(case: Case) -> Iterator[Hit]:
    family, config = case.inspection.model.family, case.inspection.checkpoint.config
    if family.text_only and _text_path(config):
        whole = next(
            (f for f in FAMILIES if config.get("model_type") in f.model_types and not f.text_only), FAMILIES[0]
        )
        words = f"config.json: architectures says {family.architecture}, the rest is multimodal: only text is served"
        yield Hit(Severity.NOTE, (), words, f"to serve images, set architectures to {whole.architecture}")


@rule(
    Code.FLOAT16,
    "vision tower in float16",
    severity=Severity.NOTE,
    why="config.json says float16, in which the last step of a vision tower with `standardize` overflows: images are "
    "answered with padding, without an error. 31B and 26B-A4B have such a tower, E2B and E4B do not.",
    fix="Nothing in the files; serve it with `--dtype bfloat16`.",
    upstream=[40290],
    release_independent=True,
)
def check_float16(case: Case) -> Iterator[Hit]:
    config, vision = case.inspection.checkpoint.config, case.inspection.checkpoint.config.get("vision_config")
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype == "float16" and isinstance(vision, dict) and vision.get("standardize"):
        if not case.inspection.model.family.text_only:
            words = "config.json says float16, in which the vision tower overflows"
            yield Hit(Severity.NOTE, (), words, "not in the weights: serve it with `--dtype bfloat16`")


@rule(
    Code.SOFT_TOKENS,
    "vision_config without num_soft_tokens",
    why="vLLM reads vision_config.num_soft_tokens of Gemma4Unified, which published configs leave out. They load, "
    "and it stops where it prepares the first image: `'Gemma4UnifiedVisionConfig' object has no attribute "
    "'num_soft_tokens'`.",
    fix="num_soft_tokens is set to default_output_length, the same number under the name that transformers reads.",
    upstream=[44796],
    release_independent=True,
    after_loading=True,
)
def check_soft_tokens(case: Case) -> Iterator[Hit]:
    vision = case.inspection.checkpoint.config.get("vision_config")
    if case.inspection.model.family.name == "gemma4_unified" and isinstance(vision, dict):
        if vision.get("num_soft_tokens") is None:
            known = type(vision.get("default_output_length")) is int
            reason = None if known else "take it from the config.json of the original model"
            yield Hit(Severity.FAILS, (), "config.json: vision_config has no num_soft_tokens", reason)


def write_soft_tokens(request: Request, so_far: Changes) -> Changes:
    """Writes num_soft_tokens next to the key that says the same."""
    vision = request.inspection.checkpoint.config.get("vision_config")
    if request.inspection.model.family.name != "gemma4_unified" or not isinstance(vision, dict):
        return Changes()
    length = vision.get("default_output_length")
    if vision.get("num_soft_tokens") is not None or type(length) is not int:
        return Changes()
    return Changes(config=(ConfigEdit(("vision_config", "num_soft_tokens"), length, Code.SOFT_TOKENS),))


def _text_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where config.json has the language model's keys."""
    return ("text_config",) if isinstance(config.get("text_config"), dict) else ()


def _right_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys of quantization_config that have to be set for the weights to be taken for what they are."""
    said, weights = checkpoint.quantization, checkpoint.weights.values()
    states = [w.state for w in weights if w.state]
    int8 = any(w.int8 for w in weights)
    right: dict[str, Any] = {}
    if said.get("quant_method") is None:
        right["quant_method"] = "bitsandbytes"
    if not said and states:
        right |= {"load_in_4bit": True, "bnb_4bit_quant_type": states[0].quant_type}
        right |= {"bnb_4bit_use_double_quant": states[0].nested is not None, "bnb_4bit_compute_dtype": states[0].dtype}
    if int8 != bool(said.get("load_in_8bit")) and int8 != bool(states):
        right |= {"load_in_8bit": int8, "load_in_4bit": not int8}
    return right


def has_axial_rope(config: Mapping[str, Any]) -> bool:
    """Return True if the vision tower's rope has the name that transformers 5.19 gave it; older ones say "default"."""
    vision = config.get("vision_config")
    rope = vision.get("rope_parameters") if isinstance(vision, dict) else None
    return isinstance(rope, dict) and rope.get("rope_type") == "axial"


def legacy_head_config(model: Model) -> dict[str, int] | None:
    """global_head_dim and num_global_key_value_heads that say the same as per_layer_config.

    None when it says more than these two keys can: a layer of another kind, or full-attention layers that differ.
    """
    per_layer = model.text_config.get("per_layer_config")
    full = {str(i) for i, kind in enumerate(model.layer_types) if kind == FULL}
    if not isinstance(per_layer, dict) or set(per_layer) not in (full, set()):
        return None
    first, *others = per_layer.values() or ({},)
    if not isinstance(first, dict) or any(v != first for v in others):
        return None
    # A layer without a head_dim of its own has that of the others; the older keys have another default.
    old = {"head_dim": model.text_config.get("head_dim")} | first
    keys = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    out = {keys[k]: v for k, v in old.items() if k in keys and type(v) is int}
    return out if len(out) == len(old) else None


def write_legacy_config(request: Request, so_far: Changes) -> Changes:
    """Writes the older form of the config where a release of the target does not read the newer one."""
    edits = []
    model, code = request.inspection.model, Code.PER_LAYER_CONFIG
    refused = any(e.refuses_axial_rope for e in request.expectations)
    if refused and has_axial_rope(request.inspection.checkpoint.config):
        edits.append(ConfigEdit(("vision_config", "rope_parameters", "rope_type"), "default", code))
    older = any(r.per_layer_config != "read" for r in request.releases)
    if older and (old := legacy_head_config(model)) is not None:
        at = _text_path(request.inspection.checkpoint.config)
        edits += [ConfigEdit((*at, key), value, code) for key, value in old.items()]
        edits.append(ConfigEdit((*at, "per_layer_config"), None, code, remove=True))
    return Changes(config=tuple(edits))


def write_quantization_config(request: Request, so_far: Changes) -> Changes:
    """Has quantization_config at the top of config.json say what the weights are."""
    checkpoint, code = request.inspection.checkpoint, Code.QUANTIZATION_CONFIG
    right = _right_keys(checkpoint)
    if checkpoint.config.get("quantization_config"):
        return Changes(config=tuple(ConfigEdit(("quantization_config", k), v, code) for k, v in right.items()))
    edits = [ConfigEdit(("quantization_config",), {**checkpoint.quantization, **right}, code)]
    return Changes(config=(*edits, *_removals(checkpoint.config, code, top=False)))


def remove_quantization_config(request: Request, so_far: Changes) -> Changes:
    """Removes quantization_config from wherever config.json has it: nothing is quantized any more."""
    return Changes(config=tuple(_removals(request.inspection.checkpoint.config, None)))


def _removals(config: Mapping[str, Any], code: Code | None, *, top: bool = True) -> Iterator[ConfigEdit]:
    text = _text_path(config)
    if top and "quantization_config" in config:
        yield ConfigEdit(("quantization_config",), None, code, remove=True)
    if text and "quantization_config" in config[text[0]]:
        yield ConfigEdit((*text, "quantization_config"), None, code, remove=True)


def untie_lm_head(request: Request, so_far: Changes) -> Changes:
    """Has config.json say that lm_head is not tied, where releases of the target would compute with other values."""
    inspection = request.inspection
    head, embeddings, config = inspection.lm_head, inspection.embeddings, inspection.checkpoint.config
    expectations = request.expectations
    if head is None or embeddings is None or not any(e.tied for e in expectations):
        return Changes()
    ignored = any(e.ignores(head.name) for e in expectations)
    used = not all(e.ignores(head.name) for e in expectations)
    changed = embeddings.name in so_far.dequantize or (used and head.name in so_far.dequantize)
    if changed or (ignored and inspection.lm_head_is_copy is False):
        paths = dict.fromkeys(((), _text_path(config)))
        edits = (ConfigEdit((*at, "tie_word_embeddings"), False, Code.TIED_LM_HEAD) for at in paths)
        return Changes(config=tuple(edits))
    return Changes()
