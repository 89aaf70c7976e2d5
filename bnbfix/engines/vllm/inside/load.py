"""Loads a folder with the real engine, lists its parameters, and runs a forward pass."""

from __future__ import annotations

from typing import Any

from .engine import start_engine


def describe_parameters(model: Any) -> list[dict[str, Any]]:
    """Every parameter after loading: {name, quantized, states}; `states` counts the quant states bound to it."""
    import torch

    out = []
    for name, p in model.named_parameters():
        quantized = p.data.dtype in (torch.uint8, torch.int8)
        states = getattr(p, "bnb_quant_state", None)
        count = 0 if states is None else len(states) if isinstance(states, dict) else 1
        out.append({"name": name, "quantized": quantized, "states": count})
    return out


def run(folder: str) -> dict[str, Any]:
    """Loads a folder and generates one token: {loaded, parameters, forward, finite}."""
    import math

    import vllm

    out: dict[str, Any] = {"loaded": False, "parameters": [], "forward": False, "finite": False}

    def look(model: Any) -> None:
        out.update(loaded=True, parameters=describe_parameters(model))

    try:
        llm = start_engine(folder, look, skip_tokenizer_init=False)
        prompt = {"prompt_token_ids": [2, 20, 21, 22]}
        answer = llm.generate(prompt, vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=1), use_tqdm=False)[0]
        values = [v.logprob for row in answer.outputs[0].logprobs for v in row.values()]
    except Exception as e:
        e.bnbfix_result = out  # type: ignore[attr-defined]  # what was seen until then
        raise
    out.update(forward=True, finite=bool(values) and all(math.isfinite(v) for v in values))
    return out
