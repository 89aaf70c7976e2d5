"""Experts in 4 bits as bitsandbytes' Experts4bit keeps them (bitsandbytes#1965): a layer's experts in two stacks.

`gate_up_proj` and `down_proj`, U8 [experts, bytes], have `gate_up_absmax` and `down_absmax`, F32 [experts, blocks],
next to them. No block reaches from one expert into the next, so a stack is a quantized weight [experts, rows, columns].
It has no quant state: what one would say follows from the sizes and from config.json, or the stack is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import QuantStateError
from . import quant_state as qs
from .safetensors import TensorInfo

# The codes of 1 and -1. Every block has one of them, its largest value, unless all are zeros. Read as of the other type
# one block in a hundred (of FP4) or in ten thousand (of NF4) has neither, and a real model has millions.
ONES = {"nf4": {0, 15}, "fp4": {3, 11}}
ZEROS = {"nf4": {7}, "fp4": {0, 8}}
CHECKED = 64 << 10  # bytes of each stack whose codes are looked at


def is_stack(tensor: TensorInfo) -> bool:
    """Return True for quantized bytes with the name of a layer's experts."""
    return tensor.dtype == "U8" and tensor.name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def absmax_name(stack: str) -> str:
    """The name of the tensor that has the scales of a stack."""
    return f"{stack.removesuffix('_proj')}_absmax"


def derive_state(
    stack: TensorInfo, absmax: TensorInfo | None, start: bytes, config: Mapping[str, Any], where: str
) -> qs.QuantState:
    """The quant state of a stack of experts. `start` are its first bytes.

    Raises QuantStateError when the sizes and config.json do not tell it, or contradict each other or the bytes.
    """

    def bad(why: str) -> QuantStateError:
        hint = "Save the model in bfloat16 with the tool that made it; a repair of that quantizes each expert for vLLM."
        return QuantStateError(f"is a stack of experts in 4 bits, {why}", where=where, hint=hint)

    if absmax is None:
        raise bad(f"without its scales, which bitsandbytes names {absmax_name(stack.name).rpartition('.')[2]}")
    if len(stack.shape) != 2 or len(absmax.shape) != 2 or absmax.dtype != "F32" or absmax.shape[0] != stack.shape[0]:
        what = f"U8 {list(stack.shape)[:8]} with {absmax.dtype} {list(absmax.shape)[:8]}"
        raise bad(f"but {what}, not U8 [experts, bytes] with F32 [experts, blocks]")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    quantization = config.get("quantization_config") or text.get("quantization_config")
    quant_type = quantization.get("bnb_4bit_quant_type") if isinstance(quantization, dict) else None
    dtypes = (said for part in (text, config) for key in ("dtype", "torch_dtype") if (said := part.get(key)))
    dtype, width, inner = next(dtypes, None), text.get("hidden_size"), text.get("moe_intermediate_size")
    known = quant_type in qs.QUANT_TYPES and dtype in tuple(qs.DTYPES)
    if not known or type(width) is not int or type(inner) is not int or min(width, inner) < 1:
        raise bad("and config.json does not say all of bnb_4bit_quant_type, dtype, hidden_size, moe_intermediate_size")
    rows, columns = (width, inner) if stack.name.endswith("down_proj") else (2 * inner, width)
    experts, blocks = stack.shape[0], absmax.nbytes // 4
    blocksize = next((size for size in qs.BLOCKSIZES if size * blocks == 2 * stack.nbytes), None)
    if 2 * stack.nbytes != experts * rows * columns or blocksize is None or not experts or columns % blocksize:
        wanted = f"{experts} matrices of {rows:,} rows and {columns:,} columns, for which config.json asks"
        raise bad(f"but its {stack.nbytes:,} bytes and {blocks:,} blocks are not {wanted}")
    if not _has_codes(start, str(quant_type), blocksize):
        raise bad(f"but not in {quant_type}, as bnb_4bit_quant_type in config.json says: its codes are of another type")
    return qs.QuantState(str(quant_type), blocksize, str(dtype), (experts, rows, columns), None)


def _has_codes(quantized: bytes, quant_type: str, blocksize: int) -> bool:
    """Return True if every whole block of quantized bytes has a 1 or -1 of the type, or only zeros."""
    size, ones, zeros = blocksize // 2, ONES[quant_type], ZEROS[quant_type]
    marks = quantized.translate(bytes(byte >> 4 in ones or byte & 15 in ones for byte in range(256)))
    lacking = [at for at in range(0, len(marks) - size + 1, size) if marks.find(1, at, at + size) < 0]
    return all({byte >> 4, byte & 15} <= zeros for at in lacking for byte in quantized[at : at + size])
