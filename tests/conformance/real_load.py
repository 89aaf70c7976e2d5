"""Loads the weights of folders by real vLLM, bytes and all, without a forward pass. Run inside an environment.

    VENV/bin/python tests/conformance/real_load.py JOBS.json

JOBS.json is a list of {folder, original, sources}: what to load, the model in full precision, and the tensors of it
that make up each parameter of the engine. For each folder a line of JSON: {folder, error, quantized, unbound,
requantized, exact, rounded, permuted, wrong}: of the parameters, how many hold the original's values, within 4-bit
rounding, or its rows in another order, which some classes load q, k and experts in; and the names of those that hold
others.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from judge import EXACT, ROUNDED, dequantized

LIKE = 0.97  # cosine of a row and the same in 4 bits
INSIDE = Path(__file__).parents[2] / "bnbfix" / "engines" / "vllm" / "inside"


class Loaded(Exception):
    """Ends a load when the weights are in place; holds the model."""


def compare_weights(model: Any, original: Path, sources: dict[str, list[str]]) -> dict[str, Any]:
    """Counts of exact, rounded and permuted parameters, and the names of wrong ones."""
    import torch
    from safetensors.torch import load_file

    want = {name: value for file in sorted(original.glob("*.safetensors")) for name, value in load_file(file).items()}
    out: dict[str, Any] = {"exact": 0, "rounded": 0, "permuted": 0, "wrong": []}
    for name, p in model.named_parameters():
        if not (parts := sources.get(name)):
            continue
        values, true = dequantized(p), torch.cat([want[part].float().reshape(-1) for part in parts])
        if values is None or values.numel() < true.numel():
            out["wrong"].append(name)
            continue
        values = values[: true.numel()]
        ordered = _distance(values, true)
        if ordered < EXACT:
            out["exact"] += 1
        elif ordered < ROUNDED and want[parts[0]].dim() > 1:
            out["rounded"] += 1
        elif parts[0].endswith("bias"):
            moved = _distance(values.sort().values, true.sort().values) < EXACT
            out["permuted"] += moved
            out["wrong"] += [] if moved else [name]
        elif want[parts[0]].dim() > 1 and _same_rows(values, true, want[parts[0]]):
            out["permuted"] += 1
        else:
            out["wrong"].append(name)
    return out


def _distance(values: Any, true: Any) -> float:
    return float((values - true).norm() / (true.norm() + 1e-9))


def _same_rows(values: Any, true: Any, first: Any) -> bool:
    """Are these an original's rows in another order? Of experts that are stored transposed, its columns.

    `first` is the tensor that the original begins with.
    """
    forms = [true.reshape(-1, first.shape[-1])]
    if first.dim() == 3:
        forms.append(true.reshape(first.shape).mT.reshape(-1, first.shape[-2]))
    for rows in forms:
        found = values.reshape(rows.shape)
        likeness = (found / found.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T
        if min(likeness.max(dim=0).values.min(), likeness.max(dim=1).values.min()) > LIKE:
            return True
    return False


def load(folder: str, original: str, sources: dict[str, list[str]]) -> dict[str, Any]:
    """The answer for one folder."""
    import bitsandbytes.functional as bnb
    import torch
    from inside.engine import after_loading, build_skeleton, current_config
    from vllm.model_executor.model_loader import get_model_loader

    count, functions = [0], bnb
    quantize = functions.quantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return quantize(*args, **kwargs)

    functions.quantize_4bit = counted
    torch.accelerator.empty_cache = lambda: None
    seen: list[Any] = []

    def look(model: Any) -> None:
        seen.append(model)
        raise Loaded

    config, _ = build_skeleton(folder)
    config.compilation_config.static_forward_context.clear()  # the skeleton's layers, under the same names
    try:
        with after_loading(look), current_config(config):
            get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    except Loaded:
        parameters = [p for _, p in seen[0].named_parameters() if p.data.dtype in (torch.uint8, torch.int8)]
        unbound = sum(getattr(p, "bnb_quant_state", None) is None for p in parameters)
        found = {"error": None, "quantized": len(parameters), "unbound": unbound, "requantized": count[0]}
        return found | compare_weights(seen[0], Path(original), sources)
    return {"error": "the weights were not processed after loading"}


def main() -> None:
    """See the module's docstring."""
    package = types.ModuleType("inside")
    package.__path__ = [str(INSIDE)]
    sys.modules["inside"] = package
    from inside.engine import import_vllm

    import_vllm()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()  # each folder gets a vLLM that has loaded nothing yet
        if child == 0:
            try:
                answer = load(**job)
            except BaseException as e:
                traceback.print_exc()
                answer = {"error": f"{type(e).__name__}: {e}"[:300]}
            print("\n" + json.dumps({"folder": job["folder"]} | answer), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
