"""Runs in the environment of one vLLM release: loads a folder in the real engine and holds it against the truth.

    python judge.py FOLDER ANSWER.json --weights BF16-FOLDER [--reference reference.npz]

Weights: every parameter of the engine, dequantized, against the bf16 original it should come from. Outputs: the log
probabilities of every position and token against transformers in float32 (reference.py). The pictures are one red and
one blue square, which must give different answers, each the right one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from bnbfix.engines.vllm.inside import engine as vllm_engine

EXACT = 1e-3  # relative error of an unquantized parameter
ROUNDED = 0.2  # of a quantized one: 4-bit rounding gives 0.07 to 0.15, a wrong matrix more than 0.5
TOLERANCE = 3.0  # of outputs, as a multiple of what bfloat16 costs transformers itself
TOLERANCE_INT8 = 5.0  # LLM.int8 rounds activations too

TEXT = [2, *(20 + i * 37 % 450 for i in range(24))]


def prompts(config: dict[str, Any]) -> dict[str, tuple[str, Any, Any]]:
    """Name: (text, picture, sound) of each prompt that a model with this config takes."""
    import numpy as np

    words = " ".join(f"t{i}" for i in TEXT[1:])
    out: dict[str, tuple[str, Any, Any]] = {"text": (f"<bos> {words}", None, None)}
    if config.get("vision_config"):
        from PIL import Image

        for name, colour in (("red", (220, 20, 30)), ("blue", (20, 30, 220))):
            out[name] = (f"<bos> t21 <|image|> {words}", Image.new("RGB", (60, 48), colour), None)
    if config.get("audio_config"):
        sound = np.random.default_rng(7).standard_normal(16000).astype("float32") * 0.1
        out["audio"] = (f"<bos> t21 <|audio|> {words}", None, sound)
    return out


def originals(name: str, have: set[str]) -> list[str]:
    """The tensors of the original, in transformers' names, whose rows make up one of vLLM's parameters."""
    if name.startswith("language_model.model."):
        name = "model.language_model." + name.removeprefix("language_model.model.")
    elif name.startswith("language_model."):
        name = name.removeprefix("language_model.")
    elif not name.startswith("model."):
        name = "model." + name
    name = re.sub(r"\.(?:moe\.)?experts\.(?:routed_experts\.)?w13_weight$", ".experts.gate_up_proj", name)
    name = re.sub(r"\.(?:moe\.)?experts\.(?:routed_experts\.)?w2_weight$", ".experts.down_proj", name)
    name = name.replace(".moe.per_expert_scale", ".router.per_expert_scale")
    if ".qkv_proj." in name:
        q, k, v = (name.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
        return [q] if k not in have else [q, k, v if v in have else k]
    if ".gate_up_proj." in name:
        return [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    return [name]


def dequantized(p: Any) -> Any:
    """A parameter's values in float32; None when it is quantized and not every row has its quant state."""
    import torch

    data, states = p.data, getattr(p, "bnb_quant_state", None)
    if data.dtype not in (torch.uint8, torch.int8):
        return data.float().reshape(-1)
    import bitsandbytes.functional as bnb  # here: what is in full precision is judged without it

    if states is None:
        return None
    if not isinstance(states, dict):
        return bnb.dequantize_4bit(data.reshape(-1, 1), states).float().reshape(-1)
    cuts = [int(x) for x in p.bnb_shard_offsets]
    if sorted(states) != list(range(len(cuts) - 1)) or cuts[-1] != data.shape[0]:
        return None
    parts = []
    for i, state in sorted(states.items()):
        rows = data[cuts[i] : cuts[i + 1]]
        if data.dtype == torch.int8:
            parts.append((rows.float() * state.float().view(-1, 1) / 127).reshape(-1))
        else:
            parts.append(bnb.dequantize_4bit(rows, state).float().reshape(-1))
    return torch.cat(parts)


def judge_weights(model: Any, folder: Path, truth: Path) -> dict[str, Any]:
    """Counts of quantized, exact and rounded parameters, and the names of wrong and of re-quantized ones."""
    import torch
    from safetensors.torch import load_file

    def canonical(name: str) -> str:
        return re.sub(r"^model\.(?=layers\.|embed_tokens|norm\.|per_layer_)", "model.language_model.", name)

    want = {canonical(k): v for f in sorted(truth.glob("*.safetensors")) for k, v in load_file(f).items()}
    unquantized = set()  # tensors that the folder itself holds in full precision
    for f in sorted(folder.glob("*.safetensors")):
        unquantized |= {canonical(k) for k, v in load_file(f).items() if v.is_floating_point() and v.dim() >= 2}
    unquantized -= {n.rsplit(".", 1)[0] for n in unquantized if n.endswith(".absmax")}
    out: dict[str, Any] = {"quantized": 0, "exact": 0, "rounded": 0, "wrong": [], "requantized": [], "unknown": []}
    for name, p in model.named_parameters():
        sources = originals(canonical(name), set(want))
        if not all(s in want for s in sources):
            out["unknown"].append(name)
            continue
        quantized = p.data.dtype in (torch.uint8, torch.int8)
        out["quantized"] += quantized
        if quantized and any(s in unquantized for s in sources):
            out["requantized"].append(name)
        values, true = dequantized(p), torch.cat([want[s].float().reshape(-1) for s in sources])
        if values is None or values.numel() < true.numel():
            out["wrong"].append(name)
            continue
        error = float((values[: true.numel()] - true).norm() / (true.norm() + 1e-9))
        if error < EXACT:
            out["exact"] += 1
        elif error < ROUNDED and want[sources[0]].dim() > 1:
            out["rounded"] += 1
        else:
            out["wrong"].append(name)
    return out


def judge_outputs(llm: Any, config: dict[str, Any], reference: Path) -> dict[str, Any]:
    """For each prompt the mean difference of log probabilities, and how much of it is tolerated."""
    import numpy as np
    import vllm

    truth = np.load(reference)
    factor = TOLERANCE_INT8 if (config.get("quantization_config") or {}).get("load_in_8bit") else TOLERANCE
    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, ignore_eos=True)
    out, tables = {}, {}
    for name, (text, picture, sound) in prompts(config).items():
        extra = {"image": picture} if picture is not None else {"audio": (sound, 16000)} if sound is not None else None
        ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
        prompt = {"prompt_token_ids": ids} | ({"multi_modal_data": extra} if extra else {})
        answer = llm.generate(prompt, params, use_tqdm=False)[0]
        if list(answer.prompt_token_ids) != truth[f"{name}.ids"].tolist():
            raise RuntimeError(f"{name}: the prompt has other tokens than the reference's")
        rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        got = np.array([[row[t].logprob for t in range(len(row))] for row in rows])
        tables[name] = got
        mean = float(np.nan_to_num(np.abs(got - truth[f"{name}.logp"]), nan=99.0).mean())
        allowed = float(truth[f"{name}.noise"]) * factor
        out[name] = {"mean": round(mean, 4), "allowed": round(allowed, 4), "ok": mean <= allowed}
    if "red" in tables:
        apart = float(np.abs(tables["red"] - tables["blue"]).mean())
        true = float(np.abs(truth["red.logp"] - truth["blue.logp"]).mean())
        out["red against blue"] = {"mean": round(apart, 4), "allowed": round(true, 4), "ok": 0.5 < apart / true < 2}
    return out


def main() -> None:
    """Writes {error, at, weights, outputs, bnb, ok} and ends with status 0 whatever the engine does."""
    os.environ.update({k: os.environ.get(k, v) for k, v in vllm_engine.ENVIRONMENT.items()})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    a = parser.parse_args()
    result: dict[str, Any] = {"error": None, "at": [], "loaded": False, "weights": None, "outputs": None, "ok": False}
    try:
        result["versions"] = vllm_engine.versions()
        config = json.loads((a.folder / "config.json").read_text())

        def look(model: Any) -> None:
            result.update(loaded=True, weights=judge_weights(model, a.folder, a.weights))

        llm = vllm_engine.start_engine(str(a.folder.resolve()), look, max_logprobs=-1)
        if a.reference:
            result["outputs"] = judge_outputs(llm, config, a.reference)
        w, o = result["weights"], result["outputs"] or {}
        result["ok"] = not w["wrong"] and not w["requantized"] and all(x["ok"] for x in o.values())
    except BaseException as e:
        traceback.print_exc()
        while e.__cause__ is not None:
            e = e.__cause__
        result["error"] = f"{type(e).__name__}: {e}"[:600]
        last = traceback.extract_tb(e.__traceback__)[-3:]
        result["at"] = [f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in last]
    result["bnb"] = [name for name in ("bitsandbytes", "vllm_bnb_plugin") if name in sys.modules]
    a.answer.write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # the engine's own shutdown can hang


if __name__ == "__main__":
    main()
