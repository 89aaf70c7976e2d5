"""Does transformers make the same of two folders? Run inside an environment with transformers and bitsandbytes.

    VENV/bin/python tests/conformance/same_outputs.py SOURCE OUTPUT [SOURCE OUTPUT ...]

For each pair one line: the largest difference of the logits for the same token ids, and how many parameters have
another shape or dtype; or why transformers cannot run one of the two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from reference import load

IDS = list(range(20, 60))


def answer(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(logits, parameters) of a folder's model."""
    import torch

    model = load(folder, torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits.float()
    return logits, {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


def main() -> None:
    """See the module's docstring."""
    bad = 0
    for source, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        try:
            (before, mine), (after, other) = answer(Path(source)), answer(Path(out))
        except Exception as e:  # transformers does not read all experts in 4 bits, nor all that it saves
            print(f"{source}: {type(e).__name__}: {str(e)[:150]}", flush=True)
            bad += 1
            continue
        difference = (before - after).abs().max().item()
        changed = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        print(f"{source}: {difference:.4f}", f"{len(changed)} parameters changed" if changed else "", flush=True)
        bad += difference != 0
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
