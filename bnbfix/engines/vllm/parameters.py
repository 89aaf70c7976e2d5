"""The parameters that a vLLM release makes for the linear weights of a checkpoint, and how it reads skip entries.

Sources: vLLM model_executor/models/gemma4*.py (`hf_to_vllm_mapper`, `packed_modules_mapping`);
quantization/bitsandbytes.py, `is_layer_skipped_bnb`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from ...models.family import Model, TensorRole
from ...models.gemma4 import TEXT
from ...models.inspection import LinearWeight
from ..engine import Parameter, ReleaseRange, matching_entries

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}

MULTIMODAL = frozenset({"pixel_projection", "vision_tower", "audio_tower", "embedder"})


def vllm_skips(entry: str, module: str) -> bool:
    """Return True if the entry is one dotted component of the module's name, or a dotted prefix of it."""
    return entry in _names_matched(module)


@cache
def _names_matched(module: str) -> frozenset[str]:
    parts = module.split(".")
    return frozenset(parts) | {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def parameters(
    linears: Iterable[LinearWeight], model: Model, release: ReleaseRange, skip: tuple[str, ...]
) -> list[Parameter]:
    """The release's parameters for these weights, in the order of their first member, without what it drops."""
    groups: dict[str, list[LinearWeight]] = {}
    for linear in linears:
        if (module := vllm_module(linear.role, model, release)) is not None:
            groups.setdefault(module, []).append(linear)
    out = []
    for module, members in groups.items():
        role = members[0].role
        quantizable = release.quantizes(model.family.name, role.kind)
        # Experts are made by another class, which no skip entry reaches.
        skipped = matching_entries(skip, module, vllm_skips) if quantizable and role.kind != "expert" else ()
        out.append(Parameter(module, role.kind, role.layer, tuple(members), quantizable, skipped))
    return out


def vllm_module(role: TensorRole, model: Model, release: ReleaseRange) -> str | None:
    """vLLM's name for the module that a weight goes into, a fused one perhaps; None for what the release drops."""
    if role.kind in MULTIMODAL and model.family.text_only:
        return None
    fused = True
    if role.kind == "attention" and model.kv_shared(role.layer):
        fused = release.needs_shared_kv
        if not fused and role.part in ("k_proj", "v_proj"):
            return None
    name = role.module
    if fused and role.part in FUSED:
        name = name.removesuffix(role.part) + FUSED[role.part]
    if model.family.text_only:
        return name.replace(TEXT, "model.", 1)
    if name.startswith(TEXT):
        return "language_model.model." + name[len(TEXT) :]
    return "language_model." + name if name == "lm_head" else name.removeprefix("model.")
