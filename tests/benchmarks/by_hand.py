"""What one would write by hand: each shard loaded whole, its quantized weights dequantized, saved again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

model, out = map(Path, sys.argv[1:])
out.mkdir()
for path in sorted(model.glob("*.safetensors")):
    tensors = load_file(path)
    for name in [n for n in tensors if ".quant_state." in n]:
        weight = name.split(".quant_state.")[0]
        parts = {n: tensors.pop(n) for n in list(tensors) if n.startswith(weight + ".")}
        parts = {n.removeprefix(weight + "."): t for n, t in parts.items()}
        state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
        tensors[weight] = bnb.dequantize_4bit(tensors[weight], state)
    save_file(tensors, out / path.name, metadata={"format": "pt"})
config = json.loads((model / "config.json").read_text())
del config["quantization_config"]
(out / "config.json").write_text(json.dumps(config))
