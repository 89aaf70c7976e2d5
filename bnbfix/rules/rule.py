"""Every finding's code, and what `bnbfix explain` says about it. Codes are stable: they are never reused or renumbered.

BNB1xx: a tensor and its parameter do not fit. BNB2xx: the files. BNB3xx: the config and the release.
BNB4xx: forms of checkpoint that need more than an edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Severity(str, Enum):
    """How bad a finding is, and the verdict of a release whose worst finding it is. Ordered; equal to its word."""

    LOADS = "loads"  # a verdict: no finding counts
    NOTE = "note"
    DEGRADED = "degraded"
    WRONG = "wrong"
    FAILS = "fails"

    def __str__(self) -> str:
        return self.value

    def __lt__(self, other: str) -> bool:
        return _RANK[self] < _RANK[other]

    def __le__(self, other: str) -> bool:
        return _RANK[self] <= _RANK[other]

    def __gt__(self, other: str) -> bool:
        return _RANK[self] > _RANK[other]

    def __ge__(self, other: str) -> bool:
        return _RANK[self] >= _RANK[other]

    @property
    def counts(self) -> bool:
        """Does a finding of this severity count against a checkpoint? Notes do not."""
        return self > Severity.NOTE


_RANK: dict[str, int] = {severity: rank for rank, severity in enumerate(Severity)}


@dataclass(frozen=True)
class Explanation:
    """What a code means: a title, what is seen and why, what fixes it, and where it is discussed upstream."""

    title: str
    why: str
    fix: str
    upstream: tuple[str, ...] = ()


def _vllm(*numbers: int) -> tuple[str, ...]:
    return tuple(f"https://github.com/vllm-project/vllm/issues/{n}" for n in numbers)


class Code(str, Enum):
    """The findings. The member's name says it in code, the value's first part is what users see."""

    QUANTIZED_IN_UNQUANTIZED = "BNB101"
    UNQUANTIZED_IN_QUANTIZED = "BNB102"
    PARTIALLY_QUANTIZED = "BNB103"
    K_EQ_V_WITHOUT_V = "BNB104"
    EXPLICIT_V = "BNB105"
    SHARED_WITHOUT_KV = "BNB106"
    QUANTIZED_PIXEL_PROJECTION = "BNB107"
    QUANTIZED_LM_HEAD = "BNB108"
    QUANTIZED_BUT_SKIPPED = "BNB109"
    WEIGHT_NOT_A_COLUMN = "BNB110"
    QUANT_STORAGE = "BNB111"
    QUANT_STATE = "BNB201"
    ORPHANED_STATE_TENSORS = "BNB202"
    INDEX = "BNB203"
    DUPLICATE = "BNB204"
    PICKLES = "BNB205"
    CODE = "BNB206"
    SKIP_ENTRY = "BNB301"
    PER_LAYER_CONFIG = "BNB302"
    UNKNOWN_CLASS = "BNB303"
    PLUGIN = "BNB304"
    TRANSFORMERS_REQUANTIZES = "BNB305"
    MOE_REFUSED = "BNB401"
    FUSED_EXPERTS = "BNB402"
    EXPERT_PREFIX = "BNB403"
    FP4_EXPERTS = "BNB404"
    INT8 = "BNB405"
    MIXED_EXPERTS = "BNB406"

    def __str__(self) -> str:
        return self.value

    @property
    def explanation(self) -> Explanation:
        return EXPLANATIONS[self]


EXPLANATIONS = {
    Code.QUANTIZED_IN_UNQUANTIZED: Explanation(
        "quantized weight, ordinary parameter",
        "The file holds this weight quantized in 4 bits, as a uint8 column, where the release makes an ordinary "
        "parameter whatever the skip list says. Loading stops with `Tried to load weights of size [N, 1] to a "
        "parameter of size [out, in]`, or `Attempted to load weight`.",
        "The weight is dequantized to the dtype its quant state names, its quant-state tensors go, and skip entries in both "
        "spellings name its module.",
        _vllm(42813),
    ),
    Code.UNQUANTIZED_IN_QUANTIZED: Explanation(
        "ordinary weight, quantized parameter",
        "The file holds this weight in full precision and the release makes a quantized parameter, because no skip "
        "entry names the module as vLLM names it. Up to 0.27 a bare AssertionError stops the load; from 0.28 on the "
        "weight is quantized to NF4 while loading, without a word, and image and audio features degrade.",
        "Skip entries in vLLM's spelling, with fused names (`qkv_proj`, `gate_up_proj`), are added to "
        "llm_int8_skip_modules. No tensor changes.",
    ),
    Code.PARTIALLY_QUANTIZED: Explanation(
        "fused group partially quantized",
        "vLLM fuses q, k and v into qkv_proj and gate and up into gate_up_proj. Some members are quantized in the file "
        "and others are not, which no parameter can hold: a bare AssertionError up to 0.27, silent re-quantization "
        "of the plain members from 0.28 on.",
        "The quantized members are dequantized, which keeps their precision, and the fused name is skipped. Of experts "
        "stored one by one the plain ones are quantized instead, since no release has an ordinary parameter for them.",
    ),
    Code.K_EQ_V_WITHOUT_V: Explanation(
        "K serves as V, but V has no quant state",
        "In the full-attention layers of attention_k_eq_v models the file has no v_proj; vLLM loads K into both "
        "places. Up to 0.22 it copies the quantized weight but not its quant state: the model loads, and the first "
        "forward pass dies with `split_with_sizes expects split_sizes to sum exactly`.",
        "v_proj.weight and its quant-state tensors are added as exact copies of k_proj's; for targets that refuse them, q and k "
        "of these layers are dequantized and skipped.",
        _vllm(40437),
    ),
    Code.EXPLICIT_V: Explanation(
        "v_proj in a layer where K serves as V",
        "From 0.31 on, vLLM knows no v_proj in the full-attention layers of attention_k_eq_v models: `There is no "
        "module or parameter named 'layers.N.self_attn.v_proj'`. transformers never reads it either.",
        "The v_proj tensors of these layers are dropped.",
    ),
    Code.SHARED_WITHOUT_KV: Explanation(
        "kv-shared layers without k, v and k_norm",
        "transformers 5.5.2 and newer do not save k_proj, v_proj and k_norm of layers that share K and V with an "
        "earlier one (E2B, E4B). vLLM up to 0.29 makes the parameters all the same and stops with `Following weights "
        "were not initialized`. Their values are never used.",
        "They are added as exact copies of those of the layer whose K and V are shared; later releases drop them.",
        _vllm(44788),
    ),
    Code.QUANTIZED_PIXEL_PROJECTION: Explanation(
        "quantized pixel projection",
        "transformers before 5.13 casts pixels to the dtype of patch_embedder.input_proj's weight. When that is "
        "quantized the dtype is uint8, and every image is corrupted silently. 0.23 to 0.27 hide the dtype; 0.28 to "
        "0.31 do not, and may be installed beside such a transformers.",
        "The projection, a small one, is dequantized and skipped.",
    ),
    Code.QUANTIZED_LM_HEAD: Explanation(
        "quantized lm_head",
        "vLLM never quantizes lm_head. A quantized one stops the load with a bare AssertionError.",
        "lm_head is dequantized and skipped.",
    ),
    Code.QUANTIZED_BUT_SKIPPED: Explanation(
        "quantized weight of a skipped module",
        "A skip entry that vLLM matches names this module, so its parameter is an ordinary one, but the file holds "
        "the weight quantized: a bare AssertionError.",
        "The entry is taken out and replaced by entries for the plain modules it also named. No tensor changes.",
    ),
    Code.WEIGHT_NOT_A_COLUMN: Explanation(
        "quantized weight is not a column",
        "vLLM's quantized parameter is a column [N, 1]. The file holds the same bytes in another shape.",
        "The shape in the header is changed; the bytes stay.",
        _vllm(15959, 21743),
    ),
    Code.QUANT_STORAGE: Explanation(
        "quantized bytes stored as another dtype",
        "bnb_4bit_quant_storage is not uint8 (FSDP-QLoRA stores quantized bytes as bfloat16): vLLM stops with "
        "`Unsupported bnb_4bit_quant_storage`.",
        "The same bytes are declared U8 [N, 1] in the header, and the config says uint8.",
    ),
    Code.QUANT_STATE: Explanation(
        "quant state damaged or lying",
        "A quant state does not describe its weight: a quant-state tensor is missing, has another size, or the JSON says what "
        "cannot be. bitsandbytes would compute wrong numbers from it or read past a buffer, without an error.",
        "Nothing fixes it; quantize the model again, or fetch the file again.",
    ),
    Code.ORPHANED_STATE_TENSORS: Explanation(
        "quant-state tensors without a quantized weight",
        "Statistics of a quantized weight that is not there, or is there in full precision. Beside a plain weight they "
        "make vLLM bind a quant state to an ordinary parameter, and the load stops.",
        "They are dropped. A repair is not made for this alone where vLLM ignores them.",
    ),
    Code.INDEX: Explanation(
        "index and shards disagree",
        "The index names other tensors, other shards for them, or another total size than the headers of the shards. "
        "vLLM reads every tensor of every shard that the index names, so a stale tensor left in a file is loaded.",
        "The index is written anew from the headers. A repair is not made for this alone.",
    ),
    Code.DUPLICATE: Explanation(
        "one tensor in two shards",
        "Two shards hold a tensor of the same name; which of them vLLM keeps depends on the order of the files.",
        "The one that the index names is kept.",
    ),
    Code.PICKLES: Explanation(
        "pickled files beside the weights",
        "Loading a pickle (*.bin, *.pt, *.pth, *.ckpt, *.pkl) runs whatever code its author put into it. vLLM and "
        "transformers read safetensors where there are any, so these are a second, older copy of the weights, or what "
        "a training run left. bnbfix never opens them.",
        "A repair leaves them out.",
    ),
    Code.CODE: Explanation(
        "programs beside the weights",
        "Python files, and auto_map in config.json, are run by vLLM and transformers under trust_remote_code. No "
        "Gemma4 needs that.",
        "A repair copies them as they are, without the right to be executed, and runs nothing.",
    ),
    Code.SKIP_ENTRY: Explanation(
        "skip entry that vLLM does not understand",
        "An entry of llm_int8_skip_modules names modules as transformers does (`model.vision_tower`). vLLM compares "
        "with its own names (`vision_tower`, `language_model.model...qkv_proj`) and never translates.",
        "The same modules are named in vLLM's spelling as well. The entry itself stays, transformers needs it.",
    ),
    Code.PER_LAYER_CONFIG: Explanation(
        "config.json in a newer form",
        "transformers 5.19 writes text_config.per_layer_config in place of global_head_dim and "
        "num_global_key_value_heads. Older ones ignore it and take defaults, or stop with "
        "`AmbiguousGlobalPerLayerAttributeError: 'head_dim' is a per-layer attribute`. It calls the vision tower's "
        "rope_type axial, not default, which older ones answer with `KeyError: 'axial'`.",
        "The two older keys are written in place of per_layer_config, and rope_type is called default; older and newer "
        "releases read that form alike.",
    ),
    Code.UNKNOWN_CLASS: Explanation(
        "model class unknown to the release",
        "The release has no class for this architecture: Gemma4Unified (12B) exists from 0.23 on.",
        "Nothing in the checkpoint; a newer vLLM is needed.",
    ),
    Code.PLUGIN: Explanation(
        "vllm-bnb-plugin",
        "From 0.28 on bitsandbytes support is a plugin, and without it the quantization method is unknown. On 0.27 "
        "the plugin must not be installed. Its version 0.0.3 needs vLLM 0.29.",
        "`pip install vllm-bnb-plugin` for 0.29 and newer, `pip install 'vllm-bnb-plugin<0.0.3'` for 0.28, "
        "`pip uninstall vllm-bnb-plugin` for 0.27.",
        _vllm(52802),
    ),
    Code.TRANSFORMERS_REQUANTIZES: Explanation(
        "plain weight that transformers quantizes again",
        "No entry of the skip list names this module as transformers names it, so transformers quantizes the plain "
        "weight when it loads the checkpoint. vLLM does not care.",
        "A repair writes the skip entries in both spellings.",
    ),
    Code.MOE_REFUSED: Explanation(
        "mixture of experts under bitsandbytes",
        "vLLM up to 0.24 refuses a mixture of experts under bitsandbytes: `MoE Model ... does not support "
        "BitsAndBytes quantization yet`. 0.31 reports experts under names that the bitsandbytes loader does not know: "
        "`Following weights were not initialized`, whatever the checkpoint calls them.",
        "No 4-bit form exists for these releases; 0.25 to 0.30 and 0.32 can load one.",
    ),
    Code.FUSED_EXPERTS: Explanation(
        "experts in three-dimensional tensors",
        "transformers keeps the experts of a layer in two unquantized three-dimensional tensors. vLLM makes quantized "
        "parameters for them and no skip entry reaches them: shape errors.",
        "They are stored one by one, quantized to NF4 with quant states, under the prefix of the release. This loses "
        "precision as any 4-bit quantization does, and makes them about 3.5 times smaller.",
    ),
    Code.EXPERT_PREFIX: Explanation(
        "experts under another prefix",
        "The experts are stored one by one, under a prefix that this release does not look for: `moe.experts` up to "
        "0.30, `experts` from 0.32 on.",
        "They are renamed. No prefix serves both kinds of release.",
    ),
    Code.FP4_EXPERTS: Explanation(
        "FP4 experts",
        'vLLM\'s bitsandbytes loader fuses the quant states of experts with `quant_type="nf4"` written out. FP4 '
        "experts load, and are decoded with the wrong table.",
        "They are dequantized and quantized to NF4.",
    ),
    Code.INT8: Explanation(
        "LLM.int8",
        "The weights are quantized to 8 bits, not 4. vLLM loads such dense models when the skip list is in its own "
        "spelling, and up to 0.22 lacks V's scales where K serves as V; a mixture of experts is refused.",
        "Skip entries are added, and V where it is missing. What would need a weight dequantized needs the whole model "
        "dequantized: `repair --bf16`.",
    ),
    Code.MIXED_EXPERTS: Explanation(
        "experts quantized in unlike ways",
        "vLLM's bitsandbytes loader makes one quant state for all experts of a layer, with the blocksize and dtype of "
        "the first. A bare AssertionError stops it where the matrices of one expert differ; where whole experts do, "
        "they load, and those unlike the first are decoded wrongly.",
        "None in 4 bits: the values would have to be quantized again. `repair --bf16` dequantizes those of one dtype.",
    ),
}
