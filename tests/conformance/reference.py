"""The right answers: transformers in float32 on a checkpoint in full precision.

    python reference.py BF16-FOLDER reference.npz

For each prompt its token ids, the log probabilities at every position, and what transformers' own bfloat16 run of the
same weights differs by, which is the unit that tolerances are in. Needs transformers 5.13 or newer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from judge import prompts


def answers(folder: Path) -> dict[str, Any]:
    """Arrays by "prompt.ids", "prompt.logp", "prompt.noise"."""
    import numpy as np
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    # "sdpa" by choice: with "eager" Gemma4's audio tower masks the wrong positions.
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder) if config.get("vision_config") else None
    out: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        for name, (text, picture, sound) in prompts(config).items():
            media = {"images": [[picture]]} if picture is not None else {"audio": [sound]} if sound is not None else {}
            encode = processor if media else tokenizer
            options = {"text": [text], **media} if media else {"text": [text]}
            inputs = encode(**options, return_tensors="pt", add_special_tokens=False)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            with torch.no_grad():
                logp = torch.log_softmax(model(**inputs).logits[0].float(), -1).numpy()
            if dtype == torch.float32:
                out[f"{name}.ids"], out[f"{name}.logp"] = inputs["input_ids"][0].numpy(), logp
            else:
                out[f"{name}.noise"] = np.abs(logp - out[f"{name}.logp"]).mean()
    return out


if __name__ == "__main__":
    import numpy

    numpy.savez(sys.argv[2], **answers(Path(sys.argv[1])))
