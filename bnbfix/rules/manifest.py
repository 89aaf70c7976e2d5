"""What the loader checks of every tensor and parameter: known names, fitting shapes, and nothing left empty."""

from __future__ import annotations

from collections.abc import Iterator

from ..engines.manifest import find_known_names
from .changes import Request
from .rule import Case, Code, Hit, Severity, rule

MANIFEST = frozenset({Code.UNKNOWN_NAME, Code.UNFILLED, Code.WRONG_SHAPE, Code.WRONG_PREFIX, Code.PARTLY_FILLED})


@rule(
    Code.UNKNOWN_NAME,
    "tensor that the release has no place for",
    why="The model that the release builds from config.json has no parameter of this name. The load stops with `There "
    "is no module or parameter named ...`, or `... has no attribute ...`. Adapters that were not merged, heads of "
    "training, layers beyond num_hidden_layers and a config.json of another model leave such tensors.",
    fix="Nothing in the file can be fixed: save the model again without them, or with its own config.json.",
)
def check_unknown_name(case: Case) -> Iterator[Hit]:
    if (load := case.load) and load.refused:
        reason = "they belong to no parameter of this model; save it again without them, or with its own config.json"
        yield Hit(Severity.FAILS, load.refused, "the release has no parameter for it", reason)


@rule(
    Code.UNFILLED,
    "parameter that no tensor fills",
    why="The model that the release builds from config.json has a parameter for which the file has no tensor: "
    "`Following weights were not initialized from checkpoint`. A shard, a tower or a layer was lost in saving.",
    fix="The tensor has to come from the model that was saved; no other one can take its place.",
)
def check_unfilled(case: Case) -> Iterator[Hit]:
    if (load := case.load) and load.unfilled:
        reason = "they are not in the file; take them from the model that was saved, or save it again"
        yield Hit(Severity.FAILS, load.unfilled, "not in the file; nothing fills the parameter", reason)


@rule(
    Code.PARTLY_FILLED,
    "fused parameter that is filled in part",
    why="vLLM fuses q, k and v, gate and up, and the experts of a layer. Its loader counts the parameter as filled "
    "when one of them is there, and leaves the place of the others uninitialized: the model loads, and answers wrongly "
    "or stops in the first forward pass.",
    fix="The tensor has to come from the model that was saved; no other one can take its place.",
    after_loading=True,
)
def check_partly_filled(case: Case) -> Iterator[Hit]:
    if (load := case.load) and load.partial:
        reason = "they are not in the file; take them from the model that was saved, or save it again"
        quantized = any(w.quantized for w in case.inspection.checkpoint.weights.values())
        severity = Severity.FAILS if quantized else Severity.WRONG
        yield Hit(severity, load.partial, "not in the file; the rest of its fused parameter is", reason)


@rule(
    Code.WRONG_SHAPE,
    "shape or dtype that the parameter does not have",
    why="The shape is not the one that config.json gives the parameter: an AssertionError stops the load. Embeddings "
    "that grew without config.json, empty tensors that ZeRO-3 left, and a config.json of another size cause it. A "
    "tensor of whole numbers is converted silently, and means nothing.",
    fix="config.json has to be the one of the model that was saved, or the model has to be saved again.",
)
def check_wrong_shape(case: Case) -> Iterator[Hit]:
    load = case.load
    found: dict[str, list[str]] = {}
    for name, wanted in load.wrong_shapes.items() if load else ():
        shape = list(case.inspection.checkpoint.weights[name].shape)[:8]
        words = f"has shape {shape}; config.json asks for [{', '.join('?' if n is None else str(n) for n in wanted)}]"
        found.setdefault(words, []).append(name)
    for words, names in found.items():
        reason = (
            "config.json and the tensor do not fit; take config.json from the model that was saved, or save it again"
        )
        yield Hit(Severity.FAILS, tuple(names), words, reason)
    if load and load.no_floats:
        reason = "the values are lost; save the model again"
        yield Hit(Severity.WRONG, load.no_floats, "holds whole numbers where the parameter has real ones", reason)


@rule(
    Code.WRONG_PREFIX,
    "names that begin differently",
    why="The tensors have the names of another class, version or tool (`base_model.model.`, `model.model.`): only "
    "their beginnings, or a part (unsloth's `router.linear`), differ from what the release looks for: `There is no "
    "module or parameter named ...`.",
    fix="The tensors are renamed to the names that the release reads.",
)
def check_wrong_prefix(case: Case) -> Iterator[Hit]:
    if (load := case.load) and load.renamed:
        name, known = next(iter(load.renamed.items()))
        yield Hit(Severity.FAILS, tuple(load.renamed), f"the release looks for {known}, not {name}")


def find_renames(request: Request) -> dict[str, str]:
    """New names of the weights whose names some release of the target does not know."""
    out: dict[str, str] = {}
    for expectation in request.readings:
        out |= dict(find_known_names(request.inspection.checkpoint.weights, expectation))
    return out
