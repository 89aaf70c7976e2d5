"""What a release expects of a model's checkpoint, found by experiment: its loader is given a few tensors at a time.

The folder is dry_load's, with two differences: EXPERIMENTS lists groups of tensors, each a list of the rows of TENSORS,
and TENSORS itself lists none.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from typing import Any

from .dry_load import Feed, stand_ins
from .engine import build_skeleton, current_config, report_status

EXPERIMENTS = "bnbfix-experiments.json"


class Filled(Exception):
    """Ends a load where the model has taken the weights; holds the names of the parameters that it filled."""

    def __init__(self, names: Iterable[str] | None) -> None:
        super().__init__()
        self.names = sorted(names or ())


def run(folder: str) -> dict[str, Any]:
    """{class, parameters, answers}: every parameter that has to be filled, and what became of each group.

    A parameter is {quantized, prefix, experts}; `prefix` is the name that skip entries are compared with, None where
    the quantization method is never asked about the module. An answer is {fills, parts}: names of parameters, and the
    [name, part] that their own loaders were called for, such as q of a qkv_proj; with `error` where the loader stopped,
    and `reordered` where the elements of a quantized tensor changed places.
    """
    import torch
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    feed = Feed(folder)
    with open(os.path.join(folder, EXPERIMENTS)) as f:
        groups = json.load(f)
    report_status("building the model")
    prefixes: dict[int, str] = {}
    config, model = build_skeleton(folder, lambda config: _record_prefixes(config, prefixes))
    load = model.load_weights

    def load_and_stop(weights: Any) -> None:
        raise Filled(load(weights))

    model.load_weights = load_and_stop
    parts: list[tuple[str, str]] = []
    for name, p in model.named_parameters():
        _record_parts(name, p, parts)
    answers = []
    report_status(f"trying {len(groups):,} groups of tensors")
    with stand_ins(feed), feed.watch(), current_config(config), set_default_torch_dtype(torch.bfloat16):
        for group in groups:
            feed.shards = {group[0][0]: [row[1:] for row in group]}
            parts.clear()
            feed.given.clear()
            feed.reordered.clear()
            answer: dict[str, Any] = {"fills": []}
            loader = get_model_loader(config.load_config)  # a new one: its lists of modules grow with every load
            try:
                loader.load_weights(model, config.model_config)
            except Filled as filled:
                answer["fills"] = filled.names
            except Exception as e:
                answer["error"] = f"{type(e).__name__}: {e}"[:200]
            if feed.reordered:
                answer["reordered"] = True
            answers.append(answer | {"parts": list(parts)})
    return {"class": type(model).__name__, "parameters": _describe_parameters(model, prefixes), "answers": answers}


def _record_prefixes(config: Any, prefixes: dict[int, str]) -> None:
    """Has the quantization method, where there is one, note the name by which it knows each module."""
    if config.quant_config is None:
        return
    method = type(config.quant_config)
    original = method.get_quant_method

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        prefixes[id(layer)] = prefix
        return original(self, layer, prefix)

    method.get_quant_method = get_quant_method


def _record_parts(name: str, p: Any, parts: list[tuple[str, str]]) -> None:
    """Has a parameter's own loader note what it is called for: a shard of a fused module, or an expert's projection."""
    where = "_weight_loader" if hasattr(p, "_weight_loader") else "weight_loader"
    if (original := getattr(p, where, None)) is None:
        return

    @functools.wraps(original)
    def weight_loader(*args: Any, **kwargs: Any) -> Any:
        said = [*args, kwargs.get("expert_id"), kwargs.get("shard_id"), kwargs.get("loaded_shard_id")]
        shown = (x for x in said if isinstance(x, int) or (isinstance(x, str) and "." not in x))
        parts.append((name, ",".join(map(str, shown))))
        return original(*args, **kwargs)

    setattr(p, where, weight_loader)


def _describe_parameters(model: Any, prefixes: dict[int, str]) -> dict[str, dict[str, Any]]:
    import torch

    modules = dict(model.named_modules())
    out = {}
    for name, p in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        method = type(getattr(module, "quant_method", None)).__name__
        out[name] = {
            "quantized": p.data.dtype in (torch.uint8, torch.int8),
            "prefix": prefixes.get(id(module)),
            "experts": "MoE" in method or "Experts" in method,
        }
    return out
