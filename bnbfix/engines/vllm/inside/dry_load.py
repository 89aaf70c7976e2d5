"""Loads a model without its weights: vLLM's own loader, fed with stand-ins of each tensor's shape and dtype.

The folder holds the config and the files next to it, shards of headers and holes, and TENSORS, which lists every
tensor: [shard, name, dtype, shape, text], where text is the content of a quant state's JSON and null for all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .engine import build_skeleton, current_config, report_status

TENSORS = "bnbfix-tensors.json"
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # as safetensors and torch name them


class Feed:
    """Stand-ins in place of the files' tensors, and what the loader does with them."""

    def __init__(self, folder: str) -> None:
        with open(os.path.join(folder, TENSORS)) as f:
            rows = json.load(f)
        self.shards: dict[str, list[Any]] = {}
        for shard, *tensor in rows:
            self.shards.setdefault(shard, []).append(tensor)
        self.now: str | None = None  # the tensor that was given last
        self.requantized: list[str] = []
        self.given: dict[int, tuple[str, Any]] = {}  # quantized stand-ins, by the address of their one element
        self.reordered: set[str] = set()

    def tensors(self, files: Iterable[str], *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """In place of vLLM's iterator over safetensors files."""
        import torch

        for path in files:
            for name, dtype, shape, text in sorted(self.shards.get(os.path.basename(path), []), key=lambda t: t[0]):
                self.now = name
                if text is not None:
                    yield name, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
                else:  # one element, seen as many: the shape costs no memory
                    if dtype not in DTYPES:
                        raise ValueError(f"{name}: torch has no dtype for {dtype}")
                    one = torch.zeros((), dtype=getattr(torch, DTYPES[dtype]))
                    if dtype in ("U8", "I8"):
                        self.given[one.data_ptr()] = name, one
                    yield name, one.expand(shape)

    def watch(self) -> Any:
        """A context in which quantized stand-ins whose elements change places are noted in `reordered`."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        feed, aten = self, torch.ops.aten

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                op = func.overloadpacket
                moves = op in (aten.transpose, aten.permute, aten.t) and args[0].dim() > 1
                if moves and args[0].data_ptr() in feed.given:
                    order = list(range(args[0].dim()))
                    if op is aten.permute:
                        order = [d % len(order) for d in args[1]]
                    else:
                        a, b = args[1:] or (0, 1)
                        order[a], order[b] = order[b], order[a]
                    moved = [d for d in order if args[0].shape[d] > 1]
                    if moved != sorted(moved):
                        feed.reordered.add(feed.given[args[0].data_ptr()][0])
                return func(*args, **(kwargs or {}))

        return Watch()  # type: ignore[no-untyped-call]  # as above

    def quantize(self, a: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """In place of bitsandbytes' quantize_4bit, which the loader calls for weights that are not quantized."""
        import bitsandbytes.functional as bnb
        import torch

        if a.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"Blockwise 4bit quantization only supports 16/32-bit floats, but got {a.dtype}")
        if self.now is not None:
            self.requantized.append(self.now)
        n = a.numel()
        state = bnb.QuantState(
            absmax=torch.zeros((n + 63) // 64),
            shape=a.shape,
            code=torch.zeros(16),
            blocksize=64,
            quant_type="nf4",
            dtype=a.dtype,
        )
        return torch.zeros((), dtype=torch.uint8).expand((n + 1) // 2, 1), state


def run(folder: str) -> dict[str, Any]:
    """{requantized, reordered, quantized, unbound}: names of the tensors that were quantized at load time, and of the
    quantized ones whose elements changed places; how many parameters are quantized, and those without a quant state."""
    import torch
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    feed = Feed(folder)
    report_status("building the model")
    config, model = build_skeleton(folder)
    loader = get_model_loader(config.load_config)
    report_status(f"loading {sum(map(len, feed.shards.values())):,} tensors without their bytes")
    with stand_ins(feed), feed.watch(), current_config(config), set_default_torch_dtype(torch.bfloat16):
        try:
            loader.load_weights(model, config.model_config)
        except Exception as e:
            e.bnbfix_tensor = feed.now  # type: ignore[attr-defined]  # for describe_error
            raise
    quantized = [(n, p) for n, p in model.named_parameters() if p.data.dtype in (torch.uint8, torch.int8)]
    unbound = [n for n, p in quantized if getattr(p, "bnb_quant_state", None) is None]
    found = {"requantized": feed.requantized, "reordered": sorted(feed.reordered)}
    return found | {"quantized": len(quantized), "unbound": unbound}


@contextlib.contextmanager
def stand_ins(feed: Feed) -> Iterator[None]:
    """Puts the stand-ins where vLLM's loaders read files and quantize."""
    import bitsandbytes.functional as bnb
    import torch

    torch.accelerator.empty_cache = lambda: None
    for name, module in list(sys.modules.items()):
        if name.startswith(("vllm.", "vllm_bnb_plugin.")):
            for iterator in ("safetensors_weights_iterator", "multi_thread_safetensors_weights_iterator"):
                if hasattr(module, iterator):
                    setattr(module, iterator, feed.tensors)
            if (loader := getattr(module, "BitsAndBytesModelLoader", None)) is not None:
                loader._dequantize_dq = _keep_nested
    functions: Any = bnb
    before, functions.quantize_4bit = functions.quantize_4bit, feed.quantize
    try:
        yield
    finally:
        functions.quantize_4bit = before


def _keep_nested(self: Any, states: Any) -> Any:
    """In place of decoding the scales of a double quantization, whose bytes are not there."""
    import torch

    for state in states.values() if isinstance(states, dict) else [states]:
        if getattr(state, "nested", False):
            state.absmax, state.nested, state.offset, state.state2 = torch.zeros(state.absmax.shape), False, None, None
    return states
