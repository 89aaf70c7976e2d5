"""The role of a tensor, from its name.

Names are compared in one canonical form, Gemma4's in transformers: `model.language_model.layers.N...`,
`model.vision_tower...`. Older prefixes, and names of text-only classes, are mapped to it. Sources: transformers
models/gemma4/modeling_gemma4.py, models/gemma4_unified; vLLM model_executor/models/gemma4*.py (`hf_to_vllm_mapper`).
"""

from __future__ import annotations

import re
from functools import cache

from .family import TensorRole

TEXT = "model.language_model."
LM_HEAD = ("lm_head.weight", "language_model.lm_head.weight")
EMBEDDINGS = tuple(f"{prefix}embed_tokens.weight" for prefix in (TEXT, "language_model.model.", "model."))

# The kind of a tensor decides which parameter it lands in. The first pattern that matches wins. What stands before it
# is in every name that it matches, and is looked for first: ten times as fast, and a file has thousands of names.
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"  # as Python writes it: no other spelling names the same module
_EXPERT = rf"(?P<number>{_NUMBER})\.(?P<part>(?:gate|up|down)_proj)\.weight"
# As training tools keep experts: a list of linear modules for each projection, which unsloth calls `_projs` in gpt-oss
# and `_proj_4bit` in Gemma4 (unsloth#5432).
_LINEAR = rf"experts\.(?P<part>(?:gate_up|gate|up|down)_proj)(?:s|_4bit)\.(?P<number>{_NUMBER})\."
_LAYER = rf"{re.escape(TEXT)}layers\.(?P<layer>{_NUMBER})\."
_ANY_LAYER = rf".*\.layers\.(?P<layer>{_NUMBER})\."
KINDS = (
    ("attention", ".self_attn.", rf"{_LAYER}self_attn\.(?P<part>[qkvo]_proj)\.weight"),
    ("mlp", ".mlp.", rf"{_LAYER}mlp\.(?P<part>(?:gate|up|down)_proj)\.weight"),
    ("per_layer", ".per_layer_", rf"{_LAYER}per_layer_(?:input_gate|projection)\.weight"),
    ("per_layer", ".per_layer_", rf"{re.escape(TEXT)}per_layer_model_projection\.weight"),
    ("router", ".router.", rf"{_LAYER}router\.proj\.weight"),
    ("fused_experts", "experts.", rf"{_LAYER}(?:moe\.)?experts\.(?P<part>gate_up_proj|down_proj)"),
    ("expert", "experts.", rf"{_LAYER}(?P<prefix>moe\.experts|experts)\.{_EXPERT}"),
    ("pixel_projection", ".patch_embedder.", r"model\.vision_tower\.patch_embedder\.input_proj\.weight"),
    ("vision_tower", ".vision_tower.", r"model\.vision_tower\..*\.weight"),
    ("audio_tower", ".audio_tower.", r"model\.audio_tower\..*\.weight"),
    ("embedder", ".embedding_projection.", r"model\.embed_(?:vision|audio)\.embedding_projection\.weight"),
    ("patch_dense", ".patch_dense.", r"model\.vision_embedder\.patch_dense\.weight"),
    ("lm_head", "lm_head.", r"lm_head\.weight"),
    ("fused_experts", ".experts.", rf"{_ANY_LAYER}.*\.experts\.(?P<part>gate_up_proj|down_proj)"),
    ("expert", ".experts.", rf"{_ANY_LAYER}.*\.(?P<prefix>experts)\.{_EXPERT}"),
    ("expert_linear", "experts.", rf"{_ANY_LAYER}(?:.*\.)?{_LINEAR}weight"),
    ("expert_bias", "experts.", rf"{_ANY_LAYER}(?:.*\.)?{_LINEAR}bias"),
    ("linear", ".weight", r"(?!.*(?:norm|embed|_ln\d|\.ln_)\w*\.weight$).+\.weight"),
)
LINEAR_KINDS = frozenset(
    {"attention", "mlp", "per_layer", "router", "pixel_projection", "vision_tower", "audio_tower", "embedder"}
    | {"patch_dense", "lm_head", "expert", "expert_linear", "linear"}
)


def canonical(name: str) -> str:
    """A tensor name as transformers spells it for the multimodal class."""
    for old, new in (("language_model.model.", TEXT), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(old):
            return new + name[len(old) :]
    if name.startswith(("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")):
        return "model." + name
    if name.startswith(("model.layers.", "model.embed_tokens", "model.norm.", "model.per_layer_")):
        return TEXT + name[len("model.") :]
    return name


@cache
def classify_tensor(name: str) -> TensorRole:
    """The role of a tensor, from its name alone. Whatever is not a linear weight is `other`."""
    name = canonical(name)
    for kind, literal, pattern in KINDS:
        if literal in name and (m := re.fullmatch(pattern, name)):
            groups = m.groupdict()
            layer, number = (int(groups[key]) if groups.get(key) else None for key in ("layer", "number"))
            return TensorRole(name, kind, layer, groups.get("part"), groups.get("prefix"), number)
    return TensorRole(name, "other")
