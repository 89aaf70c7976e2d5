"""The stand-ins that vLLM's loader gets in a dry load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bnbfix.engines.vllm.inside.dry_load import TENSORS, Feed


@pytest.mark.parametrize(
    ("change", "reordered"),
    [
        (lambda t: t.view(4, 8, 2, 1).transpose(1, 2).reshape(64, 1), True),  # as llama4.py permutes q and k
        (lambda t: t.view(2, 32).t(), True),
        (lambda t: t.view(2, 32, 1).permute(1, 0, -1), True),
        (lambda t: t.narrow(0, 16, 32).contiguous(), False),
        (lambda t: t.t(), False),  # of one column: the same order
        (lambda t: t.view(8, 1, 8).transpose(0, 1), False),
        (lambda t: torch.cat([t, t]), False),
    ],
)
@pytest.mark.parametrize("dtype", ["U8", "BF16"])
def test_packed_bytes_that_change_places_are_noted(change: object, reordered: bool, dtype: str, tmp_path: Path) -> None:
    rows = [["model.safetensors", name, dtype, [64, 1], None] for name in ("changed", "kept")]
    (tmp_path / TENSORS).write_text(json.dumps(rows))
    feed = Feed(str(tmp_path))
    with feed.watch():
        given = dict(feed.tensors(["model.safetensors"]))
        change(given["changed"])  # type: ignore[operator]
        given["kept"].view(8, 8).sum(0)
    assert feed.reordered == ({"changed"} if reordered and dtype == "U8" else set())
