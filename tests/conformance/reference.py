"""The right answers: transformers in float32 on a checkpoint in full precision.

    python reference.py BF16-FOLDER reference.npz
    python reference.py FOLDER answers.npz --as-saved

For each prompt its token ids, the log probabilities at every position, and what transformers' own bfloat16 run of the
same weights differs by, which is the unit that tolerances are in. With `--as-saved` only the log probabilities, in
bfloat16, with bitsandbytes dequantizing what is quantized: what the folder says of itself, quantized or not. Needs
transformers 5.13 or newer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from judge import prompts


def load(folder: Path, dtype: Any) -> Any:
    """The folder's model, by the class that its config names."""
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    # Left to transformers: "sdpa" (with "eager" Gemma4's audio tower masks the wrong positions), or "eager" where
    # a class knows no other.
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    for module in model.modules():  # bitsandbytes' fused AVX-512 kernel rounds scales to bfloat16, as no GPU does,
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # and fails on columns that are not a multiple of the blocksize
            module.support_avx512bf16_for_cpu = False
    return model


def log_probabilities(model: Any, folder: Path, dtype: Any) -> Iterator[tuple[str, Any, Any]]:
    """(prompt, token ids, log probabilities) of each prompt."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder) if config.get("vision_config") else None
    for name, (text, picture, sound) in prompts(config).items():
        media = {"images": [[picture]]} if picture is not None else {"audio": [sound]} if sound is not None else {}
        encode = processor if media else tokenizer
        options = {"text": [text], **media} if media else {"text": [text]}
        inputs = encode(**options, return_tensors="pt", add_special_tokens=False)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            logp = torch.log_softmax(model(**inputs).logits[0].float(), -1).numpy()
        yield name, inputs["input_ids"][0].numpy(), logp


def answers(folder: Path) -> dict[str, Any]:
    """Arrays by "prompt.ids", "prompt.logp", "prompt.noise"."""
    import numpy as np
    import torch

    model = load(folder, torch.float32)
    out: dict[str, Any] = {}
    for name, ids, logp in log_probabilities(model, folder, torch.float32):
        out[f"{name}.ids"], out[f"{name}.logp"] = ids, logp
    for name, _, logp in log_probabilities(model.to(torch.bfloat16), folder, torch.bfloat16):
        out[f"{name}.noise"] = np.abs(logp - out[f"{name}.logp"]).mean()
    return out


def answers_as_saved(folder: Path) -> dict[str, Any]:
    """Arrays by "prompt.logp"."""
    import torch

    model = load(folder, torch.bfloat16)
    return {f"{name}.logp": logp for name, _, logp in log_probabilities(model, folder, torch.bfloat16)}


def main() -> None:
    """See the module's docstring."""
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--as-saved", action="store_true")
    a = parser.parse_args()
    np.savez(a.out, **(answers_as_saved if a.as_saved else answers)(a.folder))


if __name__ == "__main__":
    main()
