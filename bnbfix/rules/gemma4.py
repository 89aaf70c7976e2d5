"""Gemma4's own: the vision tower's pixel projection, and config.json in the form of a newer transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..models.family import FULL, Model
from .changes import Changes, ConfigEdit, Request
from .rule import Case, Code, Hit, Severity, names_of, releases_where, rule

DEFAULT_GLOBAL_HEAD_DIM = 512  # transformers' default where a config names none


@rule(
    Code.QUANTIZED_PIXEL_PROJECTION,
    "quantized pixel projection",
    severity=Severity.DEGRADED,
    why="transformers before 5.13 casts pixels to the dtype of patch_embedder.input_proj's weight. When that is "
    "quantized the dtype is uint8, and every image is silently corrupted. "
    f"{releases_where(lambda r: r.casts_pixels)} may be installed with such a transformers.",
    fix="The projection, a small one, is dequantized and skipped.",
    after_loading=True,
)
def check_quantized_pixel_projection(case: Case) -> Iterator[Hit]:
    hits = [m for p in case.params if p.kind == "pixel_projection" and p.quantized for m in p.members if m.quantized]
    if hits and case.release.casts_pixels:
        yield Hit(Severity.DEGRADED, names_of(hits), "quantized; corrupts images with transformers older than 5.13")


@rule(
    Code.PER_LAYER_CONFIG,
    "config.json in a newer form",
    why="transformers 5.19 writes text_config.per_layer_config in place of global_head_dim and "
    "num_global_key_value_heads. Older ones ignore it and take defaults, or stop with "
    "`AmbiguousGlobalPerLayerAttributeError: 'head_dim' is a per-layer attribute`. It calls the vision tower's "
    "rope_type axial, not default, which older ones answer with `KeyError: 'axial'`.",
    fix="The two older keys are written in place of per_layer_config, and rope_type is set to default; older and newer "
    "releases read that form alike.",
)
def check_per_layer_config(case: Case) -> Iterator[Hit]:
    model = case.inspection.model
    if case.release.per_layer_config == "read":
        return
    if has_axial_rope(case.inspection.checkpoint.config):
        words = "config.json: vision_config's rope_type \"axial\" is unknown to the release's transformers"
        yield Hit(Severity.FAILS, (), words)
    if model.text_config.get("per_layer_config") is None:
        return
    old = legacy_head_config(model)
    if case.release.per_layer_config == "ignored":
        defaults = {"global_head_dim": DEFAULT_GLOBAL_HEAD_DIM, "num_global_key_value_heads": None}
        if old is not None and all(old.get(k, d) == d for k, d in defaults.items()):
            return
    message = "config.json: text_config.per_layer_config is not read by the release's transformers"
    yield Hit(Severity.FAILS, (), message, None if old is not None else "it says more than the older keys can")


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


def dequantize_pixel_projection(request: Request, so_far: Changes) -> Changes:
    """Dequantizes the pixel projection where a release of the target may corrupt images."""
    if not any(r.casts_pixels for r in request.releases):
        return Changes()
    hits = [m for m in request.linears(so_far) if m.role.kind == "pixel_projection" and m.quantized]
    return Changes(dequantize=dict.fromkeys(names_of(hits), Code.QUANTIZED_PIXEL_PROJECTION))


def write_legacy_config(request: Request, so_far: Changes) -> Changes:
    """Writes the older form of the config where a release of the target does not read the newer one."""
    if all(r.per_layer_config == "read" for r in request.releases):
        return Changes()
    edits = []
    model, code = request.inspection.model, Code.PER_LAYER_CONFIG
    if has_axial_rope(request.inspection.checkpoint.config):
        edits.append(ConfigEdit(("vision_config", "rope_parameters", "rope_type"), "default", code))
    if (old := legacy_head_config(model)) is not None:
        at = () if model.family.text_only else ("text_config",)
        edits += [ConfigEdit((*at, key), value, code) for key, value in old.items()]
        edits.append(ConfigEdit((*at, "per_layer_config"), None, code, remove=True))
    return Changes(config=tuple(edits))
