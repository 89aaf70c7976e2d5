"""Collects the changes of a repair: each theme of rules adds what its findings ask for, in this order.

Precision is never lost unasked: where a quantized and an unquantized tensor meet in one parameter the quantized one is
dequantized. Only experts, for which no release has an unquantized parameter, are quantized.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..rules import config, experts, files, kv_projections, skip_list, weights
from ..rules.changes import Changes, Fix, Request

REPAIR: tuple[Fix, ...] = (
    files.drop_orphans,
    kv_projections.drop_explicit_v,
    weights.dequantize_unquantizable,
    weights.dequantize_lm_head,
    weights.dequantize_pixel_projection,
    kv_projections.dequantize_k_eq_v,
    kv_projections.dequantize_groups_without_donor,
    weights.quantize_partial_groups,
    weights.dequantize_partial_groups,
    kv_projections.insert_v,
    kv_projections.insert_shared,
    experts.split_and_quantize_experts,
    weights.retype_weights,
    config.write_quantization_config,
    skip_list.write_skip_list,
    weights.set_quant_storage,
    config.untie_lm_head,
    config.write_legacy_config,
    config.write_soft_tokens,
)

# For tensor parallelism, releases that refuse a mixture of experts in 4 bits, LLM.int8 and other engines.
DEQUANTIZE_ALL: tuple[Fix, ...] = (
    files.drop_orphans,
    kv_projections.drop_explicit_v,
    experts.join_experts,
    weights.dequantize_everything,
    kv_projections.insert_shared,
    config.write_legacy_config,
    config.write_soft_tokens,
    config.untie_lm_head,
    config.remove_quantization_config,
)


def collect_changes(request: Request, fixes: Iterable[Fix]) -> Changes:
    """What the fixes ask for together; each sees what was decided before it."""
    changes = Changes()
    for fix in fixes:
        changes = changes | fix(request, changes)
    return changes
