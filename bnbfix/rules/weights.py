"""A weight and its parameter do not fit: only one is quantized, a fused group is mixed, or the header is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoint.quant_state import DTYPES
from ..engines.engine import ReleaseRange
from ..models.family import Model
from ..models.inspection import LinearWeight
from .changes import Changes, ConfigEdit, Request
from .rule import Case, Code, Hit, Severity, ignores_lm_head, names_of, releases_where, rule


@rule(
    Code.QUANTIZED_IN_UNQUANTIZED,
    "quantized weight, unquantized parameter",
    why="The file holds this weight quantized to 4 bits, as a uint8 column, where the release makes an unquantized "
    "parameter whatever the skip list says. Loading stops with `Tried to load weights of size [N, 1] to a parameter "
    "of size [out, in]`, or `Attempted to load weight`.",
    fix="The weight is dequantized to the dtype that its quant state names, its quant-state tensors are dropped, and "
    "skip entries in both spellings name its module.",
    upstream=[42813],
)
def check_quantized_in_unquantized(case: Case) -> Iterator[Hit]:
    hits = [
        m
        for p in case.params
        if not p.quantizable and p.kind != "lm_head" and not (p.kind == "expert" and case.expert_prefix is None)
        for m in p.members
        if m.quantized
    ]
    if hits:
        yield Hit(Severity.FAILS, names_of(hits), "quantized in the file, an unquantized parameter in vLLM")
    lost = [m for p in case.params if p.unbound and p.quantized for m in p.members if m.quantized]
    if lost:
        yield Hit(Severity.FAILS, names_of(lost), "quantized in the file, for a parameter that gets no quant state")


_STOPS, _SILENT = releases_where(lambda r: not r.requantizes), releases_where(lambda r: r.requantizes)


def _describe_unquantized_fix(model: Model, releases: Sequence[ReleaseRange]) -> str:
    text = (
        "Skip entries in vLLM's spelling, with fused names (`qkv_proj`, `gate_up_proj`), are added to "
        "llm_int8_skip_modules."
    )
    if not model.moe:
        return f"{text} No tensor changes."
    return f"{text} Experts, which no skip entry reaches, are quantized to NF4."


@rule(
    Code.UNQUANTIZED_IN_QUANTIZED,
    "unquantized weight, quantized parameter",
    why="The file holds this weight in full precision and the release makes a quantized parameter, because no skip "
    f"entry names the module as vLLM names it. {_STOPS} stops with `Tried to load weights of size [out, in] to a "
    f"parameter of size [N, 1]`, or a bare AssertionError; {_SILENT} silently quantizes the weight to NF4 at load "
    "time, and image and audio features degrade.",
    fix="Skip entries in vLLM's spelling, with fused names (`qkv_proj`, `gate_up_proj`), are added to "
    "llm_int8_skip_modules. No tensor changes, except experts, which no skip entry reaches: they are quantized to NF4.",
    fix_for=_describe_unquantized_fix,
)
def check_unquantized_in_quantized(case: Case) -> Iterator[Hit]:
    found = [p for p in case.params if p.quantized and not any(m.quantized for m in p.members)]
    message = "full precision in the file, a quantized parameter in vLLM"
    if experts := [m for p in found if p.kind == "expert" for m in p.members]:
        yield Hit(Severity.FAILS, names_of(experts), message)
    if unbound := [m for p in found if p.unbound for m in p.members]:
        yield Hit(Severity.FAILS, names_of(unbound), message)
    if hits := [m for p in found if p.kind != "expert" and not p.unbound for m in p.members]:
        yield _unskipped(case, hits, message)


def _describe_partial_fix(model: Model, releases: Sequence[ReleaseRange]) -> str:
    text = "The quantized members are dequantized, which loses nothing more, and the fused name is skipped."
    return f"{text} Per-expert weights are quantized instead." if model.moe else text


@rule(
    Code.PARTIALLY_QUANTIZED,
    "fused group partially quantized",
    why="vLLM fuses q, k and v into qkv_proj, and gate and up into gate_up_proj. Some members are quantized in the "
    f"file and others are not, which no parameter can hold. {_STOPS} stops with a bare AssertionError; {_SILENT} "
    "silently quantizes the unquantized members.",
    fix="The quantized members are dequantized, which loses nothing more, and the fused name is skipped. Unquantized "
    "per-expert weights are quantized instead, since no release has an unquantized parameter for them.",
    fix_for=_describe_partial_fix,
)
def check_partially_quantized(case: Case) -> Iterator[Hit]:
    found = [p for p in case.params if p.quantized and p.partially_quantized]
    message = "one fused module in vLLM, partially quantized in the file"
    if experts := [m for p in found if p.kind == "expert" for m in p.members]:
        yield Hit(Severity.FAILS, names_of(experts), message)
    if hits := [m for p in found if p.kind != "expert" for m in p.members]:
        yield _unskipped(case, hits, message)


def _unskipped(case: Case, hits: list[LinearWeight], message: str) -> Hit:
    # LLM.int8 is never quantized at load time: its parameter takes int8 rows or stops.
    if case.release.requantizes and not any(m.weight.int8 for m in case.inspection.linears):
        return Hit(Severity.WRONG, names_of(hits), message + ": silently quantized to NF4 at load time")
    return Hit(Severity.FAILS, names_of(hits), message)


@rule(
    Code.QUANTIZED_LM_HEAD,
    "quantized lm_head",
    why="vLLM never quantizes lm_head. A quantized one stops the load with a bare AssertionError; but "
    f"{releases_where(lambda r: not r.uses_tied_lm_head)} ignores one that config.json says is tied to the embeddings.",
    fix="lm_head is dequantized and skipped.",
)
def check_quantized_lm_head(case: Case) -> Iterator[Hit]:
    hits = [m for m in case.inspection.linears if m.role.kind == "lm_head" and m.quantized]
    if hits and not case.ignores_lm_head:
        yield Hit(Severity.FAILS, names_of(hits), "quantized; no release quantizes lm_head")


@rule(
    Code.REORDERED,
    "quantized weight that the model reorders",
    severity=Severity.WRONG,
    why="vLLM's Llama 4 reorders the rows of q_proj and k_proj as it loads them, for its rotary embeddings. A quantized"
    " weight is a column of packed bytes: those are reordered in place of rows, and decoded with the scales of the old "
    "order. The model loads, and answers nonsense.",
    fix="The weights are dequantized, with those that are fused with them, and skip entries in both spellings name "
    "their modules.",
    upstream=[34243],
)
def check_reordered(case: Case) -> Iterator[Hit]:
    hits = [m for p in case.params if p.reordered and p.quantized for m in p.members if m.quantized]
    if hits:
        yield Hit(Severity.WRONG, names_of(hits), "quantized, in a parameter of which vLLM reorders the rows")


def dequantize_unquantizable(request: Request, so_far: Changes) -> Changes:
    """Dequantizes what lands in an unquantized parameter whatever the skip list says, or is reordered as bytes."""
    found: dict[str, Code | None] = {}
    for p in request.parameters(so_far):
        if (p.reordered or p.unbound or not p.quantizable) and p.kind not in ("expert", "lm_head"):
            code = Code.REORDERED if p.reordered and p.quantizable else Code.QUANTIZED_IN_UNQUANTIZED
            found |= dict.fromkeys(names_of(m for m in p.members if m.quantized), code)
    return Changes(dequantize=found)


def dequantize_lm_head(request: Request, so_far: Changes) -> Changes:
    """Dequantizes lm_head where a release of the target uses it."""
    if all(ignores_lm_head(request.inspection, e) for e in request.expectations):
        return Changes()
    hits = [m for m in request.linears(so_far) if m.role.kind == "lm_head" and m.quantized]
    return Changes(dequantize=dict.fromkeys(names_of(hits), Code.QUANTIZED_LM_HEAD))


def quantize_partial_groups(request: Request, so_far: Changes) -> Changes:
    """Where the user asks for it: quantizes the unquantized members of groups that otherwise stay quantized."""
    found: dict[str, Code] = {}
    if request.partial_groups != "quantize":
        return Changes()
    for p in request.parameters(so_far):
        unquantized = [m.weight for m in p.members if not m.quantized]
        if not all(w.tensor.info.dtype in DTYPES.values() for w in unquantized):
            continue  # bitsandbytes quantizes no other dtype
        if p.quantizable and p.partially_quantized:
            if not any(m.name in so_far.dequantize or m.weight.int8 for m in p.members):
                found |= dict.fromkeys((w.name for w in unquantized), Code.PARTIALLY_QUANTIZED)
    return Changes(quantize=found)


def dequantize_partial_groups(request: Request, so_far: Changes) -> Changes:
    """Dequantizes the quantized members of every fused group that has an unquantized one, until none is left."""
    found = dict(so_far.dequantize)
    params = [p for p in request.parameters(so_far) if p.kind != "expert"]
    changed = True
    while changed:  # releases fuse differently, so one group may reach into another
        changed = False
        for p in params:
            quantized = [m for m in p.members if m.quantized and m.name not in found]
            others = [m for m in p.members if m not in quantized and m.name not in so_far.quantize]
            if quantized and others:
                own = next((found[m.name] for m in p.members if m.name in found), None)
                found |= dict.fromkeys(names_of(quantized), own or Code.PARTIALLY_QUANTIZED)
                changed = True
    return Changes(dequantize=found)


def dequantize_everything(request: Request, so_far: Changes) -> Changes:
    """Dequantizes every quantized weight that is neither dropped nor joined with others."""
    joined = {part.name for stack in so_far.stack.values() for part in stack.parts}
    weights = request.inspection.checkpoint.weights.values()
    names = (w.name for w in weights if w.quantized and w.name not in so_far.drop and w.name not in joined)
    return Changes(dequantize=dict.fromkeys(names))


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


@rule(
    Code.QUANTIZED_PIXEL_PROJECTION,
    "quantized weight whose dtype the model uses",
    severity=Severity.DEGRADED,
    why="transformers before 5.13 casts pixels to the dtype of patch_embedder.input_proj's weight. When that is "
    "quantized the dtype is uint8, and every image is silently corrupted. "
    f"{releases_where(lambda r: r.casts_pixels)} may be installed with such a transformers. vLLM makes a factor of "
    "Gemma 3n in the dtype of altup.modality_router: as uint8 it is 0, and altup has no effect.",
    fix="It is small, and is dequantized and skipped.",
    after_loading=True,
)
def check_quantized_pixel_projection(case: Case) -> Iterator[Hit]:
    zeroed = [m for p in case.params if p.dtype_read and p.quantized for m in p.members if m.quantized]
    if zeroed:
        yield Hit(Severity.DEGRADED, names_of(zeroed), "quantized; vLLM makes a factor in its dtype, which becomes 0")
    hits = [m for p in case.params if p.kind == "pixel_projection" and p.quantized for m in p.members if m.quantized]
    if hits and case.release.casts_pixels:
        yield Hit(Severity.DEGRADED, names_of(hits), "quantized; corrupts images with transformers older than 5.13")


def dequantize_pixel_projection(request: Request, so_far: Changes) -> Changes:
    """Dequantizes the pixel projection where a release of the target may corrupt images, and what is like it."""
    hits = [m for p in request.parameters(so_far) if p.dtype_read for m in p.members if m.quantized]
    if any(r.casts_pixels for r in request.releases):
        hits += [m for m in request.linears(so_far) if m.role.kind == "pixel_projection" and m.quantized]
    return Changes(dequantize=dict.fromkeys(names_of(hits), Code.QUANTIZED_PIXEL_PROJECTION))
