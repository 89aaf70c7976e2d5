"""What the vision-language classes need for a prompt with a picture: a tokenizer, a processor, ids of special tokens.

The processors are the classes' own, at the sizes of the tiny models in families.py, and made of JSON alone, as it
stands next to a published checkpoint's weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from families import QWEN_PREPROCESSOR, Config, change

FIRST = 10  # the id of the first special token that a class has of its own
VOCAB = 512
WORDS = " ".join(f"t{20 + i * 37 % 450}" for i in range(24))
COLOURS = {"red": (220, 20, 30), "blue": (20, 30, 220)}


@dataclass(frozen=True)
class Picture:
    """How a class takes a picture."""

    tokens: tuple[str, ...]  # special tokens, from FIRST on
    text: str  # what stands for the picture in a prompt
    processor: str  # its class
    preprocessor: Config  # preprocessor_config.json, but for NORMALIZED
    options: Config = field(default_factory=dict)  # of processor_config.json
    named: Config = field(default_factory=dict)  # special tokens that the tokenizer knows by a name
    changes: Config = field(default_factory=dict)  # of config.json, by path


# Said in full, as published ones do: without a mean here vLLM 0.32 leaves pictures as bytes (mm_input_norm.py).
NORMALIZED = {"do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
NORMALIZED["rescale_factor"] = 1 / 255
_SQUARE = {"height": 56, "width": 56}
_LINE_BREAKS = ["\n" * i for i in range(1, 5)]  # of which vLLM looks up the tokens: gemma3_mm.py
_GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA3N = _GEMMA3 | {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>"}
_GEMMA3N["eoa_token"] = "<end_of_audio>"
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IDS = {"vision_start_token_id": 10, "vision_end_token_id": 11, "image_token_id": 12, "video_token_id": 13}
_PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def _qwen(name: str, **preprocessor: Any) -> Picture:
    return Picture(
        _QWEN_TOKENS,
        "<|vision_start|><|image_pad|><|vision_end|>",
        f"{name}Processor",
        QWEN_PREPROCESSOR | preprocessor,
        changes=_QWEN_IDS,
    )


_INTERN = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
_INTERN["video_token"] = "<video>"
_TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
_IDEFICS = Picture(
    ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES),
    "<image>",
    "Idefics3Processor",
    {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 112},
        "max_image_size": {"longest_edge": 56},
    },
    {"image_seq_len": 4},
)
PICTURES = {
    "Gemma3ForConditionalGeneration": Picture(
        (*_GEMMA3.values(), *_LINE_BREAKS),
        "<start_of_image>",
        "Gemma3Processor",
        {"image_processor_type": "Gemma3ImageProcessor", "size": _SQUARE},
        {"image_seq_length": 16},
        _GEMMA3,
    ),
    "Qwen2_5_VLForConditionalGeneration": _qwen("Qwen2_5_VL"),
    "Qwen2VLForConditionalGeneration": _qwen("Qwen2VL"),
    "Qwen3VLForConditionalGeneration": _qwen("Qwen3VL", patch_size=16),
    "Qwen3_5ForConditionalGeneration": _qwen("Qwen3VL", patch_size=16),
    "Idefics3ForConditionalGeneration": _IDEFICS,
    "SmolVLMForConditionalGeneration": replace(_IDEFICS, processor="SmolVLMProcessor"),
    "InternVLForConditionalGeneration": Picture(
        tuple(_INTERN.values()),
        "<IMG_CONTEXT>",
        "InternVLProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "size": _SQUARE, "crop_to_patches": False},
        {"image_seq_length": 4},
        _INTERN,
    ),
    "Mistral3ForConditionalGeneration": Picture(
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
        "PixtralProcessor",
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 56}, "patch_size": 14},
        {"patch_size": 14, "spatial_merge_size": 2},
    ),
    "LlavaNextForConditionalGeneration": Picture(
        ("<image>",),
        "<image>",
        "LlavaNextProcessor",
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 56},
            "crop_size": _SQUARE,
            "image_grid_pinpoints": _PINPOINTS,
        },
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        changes={"image_grid_pinpoints": _PINPOINTS, "image_seq_length": 16},
    ),
    "Gemma3nForConditionalGeneration": Picture(
        (*_GEMMA3N.values(), *_LINE_BREAKS),
        "<image_soft_token>",
        "Gemma3nProcessor",
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 768, "width": 768}},
        {
            "image_seq_length": 256,
            "audio_seq_length": 188,
            "feature_extractor": {"feature_extractor_type": "Gemma3nAudioFeatureExtractor"},
        },
        _GEMMA3N,
        {f"{name}_id": i for i, name in enumerate(_GEMMA3N, FIRST)},
    ),
    "Llama4ForConditionalGeneration": Picture(
        ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        "<|image|>",
        "Llama4Processor",
        {"image_processor_type": "Llama4ImageProcessor", "size": _SQUARE, "max_patches": 1},
        {"patch_size": 14, "pixel_shuffle_ratio": 0.5},
        changes={
            "boi_token_index": 10,
            "eoi_token_index": 11,
            "image_token_index": 12,
            "text_config__attention_chunk_size": 128,  # one block of vLLM's cache on a CPU
        },
    ),
}


def write_tokenizer(folder: Path, picture: Picture) -> None:
    """A tokenizer whose words are t0, t1, ... by their ids, but for the special tokens."""
    special = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>"}
    special |= dict(enumerate(picture.tokens, FIRST))
    words = {i: special.get(i, f"t{i}") for i in range(VOCAB)}
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    tokenizer = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer |= {
        "version": "1.0",
        # Words as well: of some classes transformers 5.19 takes nothing else from a tokenizer that is not its own.
        "added_tokens": [{"id": i, "content": w, "special": i in special} | flags for i, w in words.items()],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in words.items()}, "unk_token": "<unk>"},
    }
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": picture.processor}
    about |= {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    about |= {"extra_special_tokens": picture.named} if picture.named else {}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def change_config(source: Path, out: Path, **changes: Any) -> None:
    """The checkpoint with another config.json; its weights are links to the source's."""
    out.mkdir(parents=True)
    for file in source.glob("*.safetensors"):
        (out / file.name).symlink_to(file.absolute())
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(change(config, **changes), indent=2))


def add_processor(source: Path, out: Path, picture: Picture) -> None:
    """The checkpoint with what a prompt with a picture needs."""
    change_config(source, out, **picture.changes)
    write_tokenizer(out, picture)
    (out / "preprocessor_config.json").write_text(json.dumps(NORMALIZED | picture.preprocessor))
    (out / "processor_config.json").write_text(json.dumps({"processor_class": picture.processor} | picture.options))
