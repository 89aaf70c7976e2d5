"""How quantized bytes are declared in the header: dtype and shape. The bytes themselves are right."""

from __future__ import annotations

from collections.abc import Iterator

from .changes import Changes, ConfigEdit, Request
from .rule import Case, Code, Hit, Severity, rule


@rule(
    Code.WEIGHT_NOT_A_COLUMN,
    "quantized weight is not a column",
    why="vLLM's quantized parameter is a column [N, 1]. The file holds the same bytes in another shape.",
    fix="The shape in the header is changed; the bytes stay.",
    upstream=[15959, 21743],
    release_independent=True,
)
def check_weight_not_a_column(case: Case) -> Iterator[Hit]:
    weights = case.inspection.checkpoint.weights.values()
    hits = [w.tensor.info for w in weights if w.state and w.tensor.info.dtype == "U8"]
    names = tuple(info.name for info in hits if info.shape != (info.nbytes, 1))
    if names:
        yield Hit(Severity.FAILS, names, "quantized, but not as a column [N, 1]")


@rule(
    Code.QUANT_STORAGE,
    "quantized bytes stored as another dtype",
    why="bnb_4bit_quant_storage is not uint8 (FSDP-QLoRA stores quantized bytes as bfloat16): vLLM stops with "
    "`Unsupported bnb_4bit_quant_storage`.",
    fix="The same bytes are declared U8 [N, 1] in the header, and the config says uint8.",
    release_independent=True,
)
def check_quant_storage(case: Case) -> Iterator[Hit]:
    checkpoint = case.inspection.checkpoint
    said = checkpoint.quantization.get("bnb_4bit_quant_storage") or "uint8"
    quantized = [w for w in checkpoint.weights.values() if w.state]
    stored = {w.name: w.tensor.info.dtype for w in quantized if w.tensor.info.dtype != "U8"}
    if stored or (said != "uint8" and quantized):
        what = ", ".join(sorted(set(stored.values()))) if stored else f"{said}, says config.json"
        yield Hit(Severity.FAILS, tuple(stored), f"quantized bytes stored as {what}; vLLM takes only uint8")


def retype_weights(request: Request, so_far: Changes) -> Changes:
    """Declares quantized bytes as U8 [N, 1] where the file says something else."""
    retype = {}
    for w in request.inspection.checkpoint.weights.values():
        if w.state is None or w.name in so_far.dequantize or w.name in so_far.experts or w.name in so_far.drop:
            continue
        if w.tensor.info.dtype != "U8":
            retype[w.name] = Code.QUANT_STORAGE
        elif w.tensor.info.shape != (w.tensor.info.nbytes, 1):
            retype[w.name] = Code.WEIGHT_NOT_A_COLUMN
    return Changes(retype=retype)


def set_quant_storage(request: Request, so_far: Changes) -> Changes:
    """Has config.json say uint8."""
    quantization = request.inspection.checkpoint.quantization
    said = quantization.get("bnb_4bit_quant_storage") or "uint8"
    removed = any(edit.remove and edit.path == ("quantization_config",) for edit in so_far.config)
    if said == "uint8" or removed or quantization.get("load_in_8bit"):
        return Changes()
    path = ("quantization_config", "bnb_4bit_quant_storage")
    return Changes(config=(ConfigEdit(path, "uint8", Code.QUANT_STORAGE),))
