"""Dequantizes every quantized weight of a checkpoint on one thread and writes nothing: only the kernel of `--bf16`.

python tests/benchmarks/kernel_by_itself.py MODEL [DEVICE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from bnbfix.checkpoint.checkpoint import open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.kernels import bnb as kernels
from bnbfix.planner.layout import Dequantize
from bnbfix.writer.tensor_data import weight_values

device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
source = LocalSource.open(Path(sys.argv[1]))
kernels.use_threads(1)
for weight in open_checkpoint(source).weights.values():
    if weight.state is not None:
        for _ in weight_values(source, Dequantize((weight,), weight.state.safetensors_dtype), device):
            pass
