"""Loads the weights of folders by real vLLM, bytes and all, without a forward pass. Run inside an environment.

    VENV/bin/python tests/conformance/real_load.py FOLDER [FOLDER ...]

For each folder a line of JSON: {folder, error, quantized, unbound, requantized}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

INSIDE = Path(__file__).parents[2] / "bnbfix" / "engines" / "vllm" / "inside"


class Loaded(Exception):
    """Ends a load when the weights are in place; holds the model."""


def load(folder: str) -> dict[str, Any]:
    """{error, quantized, unbound, requantized} of one folder."""
    import bitsandbytes.functional as bnb
    import torch
    from inside.engine import after_loading, build_skeleton, current_config
    from vllm.model_executor.model_loader import get_model_loader

    count, functions = [0], bnb
    original = functions.quantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

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
        return {"error": None, "quantized": len(parameters), "unbound": unbound, "requantized": count[0]}
    return {"error": "the weights were not processed after loading"}


def main() -> None:
    """See the module's docstring."""
    package = types.ModuleType("inside")
    package.__path__ = [str(INSIDE)]
    sys.modules["inside"] = package
    from inside.engine import import_vllm

    import_vllm()
    for folder in sys.argv[1:]:
        child = os.fork()  # each folder gets a vLLM that has loaded nothing yet
        if child == 0:
            try:
                answer = load(folder)
            except BaseException as e:
                traceback.print_exc()
                answer = {"error": f"{type(e).__name__}: {e}"[:300]}
            print("\n" + json.dumps({"folder": folder} | answer), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
