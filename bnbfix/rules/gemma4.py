"""Gemma4's own: the vision tower's pixel projection."""

from __future__ import annotations

from collections.abc import Iterator

from .changes import Changes, Request
from .rule import Case, Code, Hit, Severity, names_of, releases_where, rule


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


def dequantize_pixel_projection(request: Request, so_far: Changes) -> Changes:
    """Dequantizes the pixel projection where a release of the target may corrupt images."""
    if not any(r.casts_pixels for r in request.releases):
        return Changes()
    hits = [m for m in request.linears(so_far) if m.role.kind == "pixel_projection" and m.quantized]
    return Changes(dequantize=dict.fromkeys(names_of(hits), Code.QUANTIZED_PIXEL_PROJECTION))
