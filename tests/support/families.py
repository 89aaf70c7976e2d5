"""Small checkpoints of classes other than Gemma4, as transformers 5.19 saves them.

family_shapes.json holds, for each class, a config, the shape of every tensor, and the linear modules of its weights:
what tests/conformance/model_shapes.py says of families.py's smallest config.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("family_shapes.json").read_text("utf-8"))
FORMS = ("all", "skip", "partial")
_LANGUAGE = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.")
_TOWER = re.compile(r"vision|visual")


def quantize(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as NF4, with its quant-state tensors."""
    data, state = bnb.quantize_4bit(values, quant_type="nf4")
    return {name: data} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def dequantize(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The values of a weight in NF4."""
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return bnb.dequantize_4bit(tensors[name], bnb.QuantState.from_dict(state, device=torch.device("cpu")))


def is_quantized(module: str, form: str) -> bool:
    """`all`: every linear module but lm_head; `skip`: those of the language model's layers; `partial`: but a q_proj."""
    if module.endswith("lm_head"):
        return False
    if form == "all":
        return True
    if form == "partial" and module.endswith("layers.1.self_attn.q_proj"):
        return False
    return bool(_LANGUAGE.search(module)) and not _TOWER.search(module)


def make_family(folder: Path, name: str, form: str) -> Path:
    """Writes a class's checkpoint in a form, with a skip list in transformers' spelling where not all is quantized."""
    known = SHAPES[name]
    linears = {n: m for n, m in known["linears"].items() if ".experts." not in n}
    torch.manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for tensor, shape in known["tensors"].items():
        values = torch.randn(shape).to(torch.bfloat16)
        packed = tensor in linears and is_quantized(linears[tensor], form)
        tensors |= quantize(tensor, values) if packed else {tensor: values}
    skipped = [m for m in linears.values() if not is_quantized(m, form)]
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantization["llm_int8_skip_modules"] = None if form == "all" else skipped
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(known["config"] | {"quantization_config": quantization}))
    return folder
