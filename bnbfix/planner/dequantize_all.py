"""Decides what `repair --bf16` does: every weight in full precision, and no quantization_config. Pure.

The way out where no 4-bit form loads: tensor parallelism, a mixture of experts before 0.25, other engines, LLM.int8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from ..checkpoint.checkpoint import Checkpoint, Weight
from ..engines.vllm.parameters import projections
from ..engines.vllm.releases import ReleaseRange
from ..errors import Unrepairable
from ..models.gemma4 import Model, place
from ..rules.rule import Code
from ..rules.weights import is_explicit_v
from .fixes import Changes, ConfigEdit, insert_shared, legacy_config_edits


def collect_dequantize_all(checkpoint: Checkpoint, model: Model, releases: Sequence[ReleaseRange]) -> Changes:
    """The edits that leave nothing quantized, and that the target needs of an unquantized checkpoint."""
    members = projections(checkpoint)
    drop: dict[str, Code] = dict.fromkeys(checkpoint.orphans, Code.ORPHANED_STATE_TENSORS)
    if any(r.k_eq_v == "refuses_v" for r in releases):
        for m in members:
            if is_explicit_v(m, model):
                drop |= dict.fromkeys((m.weight.name, *m.weight.state_tensor_names().values()), Code.EXPLICIT_V)
    stack = stacks(checkpoint)
    parts = {w.name for ws in stack.values() for w in ws}
    quantized = [
        w.name for w in checkpoint.weights.values() if w.quantized and w.name not in drop and w.name not in parts
    ]
    dequantize: dict[str, Code | None] = dict.fromkeys(quantized)
    insert = []
    if any(r.kv_shared == "needs_kv" for r in releases):
        insert = list(insert_shared(checkpoint, members, model, dequantize))
    config = [
        *legacy_config_edits(checkpoint, model, releases),
        ConfigEdit(("quantization_config",), None, None, remove=True),
    ]
    return Changes(dequantize, drop, tuple(insert), {}, {}, {}, stack, tuple(config))


def stacks(checkpoint: Checkpoint) -> dict[str, tuple[Weight, ...]]:
    """Experts stored one by one, in the order in which transformers' tensor of all of them has their bytes.

    Raises Unrepairable where one is missing, behind which the others would take wrong places, or there twice.
    """
    found: dict[str, dict[tuple[int, int], Weight]] = {}
    for name, weight in checkpoint.weights.items():
        if place(name).role != "expert":
            continue
        stem, number, part = re.fullmatch(r"(.*?)(?:\.moe)?\.experts\.(\d+)\.(\w+)\.weight", name).groups()  # type: ignore[union-attr]  # what `place` calls an expert has such a name
        whole = f"{stem}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
        same = found.setdefault(whole, {}).setdefault((int(number), int(part == "up_proj")), weight)
        if same is not weight:
            raise Unrepairable(f"{same.name} and {name} are the same expert")
    for whole, ws in found.items():
        numbers = range(max(number for number, _ in ws) + 1)
        halves = ("gate_proj", "up_proj") if whole.endswith("gate_up_proj") else ("down_proj",)
        for number, half in product(numbers, range(len(halves))):
            if (number, half) not in ws:
                gap = f"expert {number} has no {halves[half]}, but others have one"
                raise Unrepairable(f"{whole} cannot be joined: {gap}")
    return {whole: tuple(ws[k] for k in sorted(ws)) for whole, ws in found.items()}
