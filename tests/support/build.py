"""Builds and changes checkpoints for the tests of rules and plans: any tensor, the index, any key of the config."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bnbfix.checkpoint.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from bnbfix.checkpoint.safetensors import DTYPE_BITS
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.engine import Target
from bnbfix.engines.targets import resolve_target
from bnbfix.planner.plan import Options, Plan
from bnbfix.planner.plan_repair import plan_checkpoint
from bnbfix.rules.scan import ScanResult, scan_checkpoint

SHARD = "model.safetensors"


@dataclass(frozen=True)
class Raw:
    """A tensor with its bytes, as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)


Tensors = dict[str, Raw]
Make = Callable[..., Path]  # the fixtures `pristine` and `checkpoint`


def zeros(*shape: int, dtype: str = "BF16") -> Raw:
    """A tensor of zeros."""
    return Raw(dtype, shape, bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8))


def read_tensors(path: Path) -> Tensors:
    """Every tensor of a safetensors file, in the order of its bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        out[name] = Raw(entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end])
    return out


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file with the tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.data for t in tensors.values()))


@contextmanager
def tensors_of(folder: Path, shard: str = SHARD) -> Iterator[Tensors]:
    """The tensors of a shard, written back at the end with whatever was changed."""
    tensors = read_tensors(folder / shard)
    yield tensors
    write_tensors(folder / shard, tensors)


@contextmanager
def json_of(folder: Path, name: str = CONFIG) -> Iterator[dict[str, Any]]:
    """A JSON file as a dict, written back at the end."""
    doc = json.loads((folder / name).read_text("utf-8"))
    yield doc
    (folder / name).write_text(json.dumps(doc, indent=2), "utf-8")


def set_skip(folder: Path, *entries: str) -> None:
    """Sets llm_int8_skip_modules."""
    with json_of(folder) as config:
        config["quantization_config"]["llm_int8_skip_modules"] = list(entries)


def write_index(folder: Path, **changes: Any) -> None:
    """A right index of every shard, but for `changes` of its keys."""
    shards = {p.name: read_tensors(p) for p in sorted(folder.glob("*.safetensors"))}
    size = sum(len(t.data) for tensors in shards.values() for t in tensors.values())
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    doc = {"metadata": {"total_size": size}, "weight_map": weight_map} | changes
    (folder / INDEX).write_text(json.dumps(doc, indent=2), "utf-8")


def state_tensors(tensors: Tensors, weight: str) -> Tensors:
    """The quant-state tensors of a 4-bit weight, by suffix."""
    return {name.removeprefix(weight): t for name, t in tensors.items() if name.startswith(weight + ".")}


def copy_weight(tensors: Tensors, weight: str, new: str) -> None:
    """Adds a copy of a 4-bit weight, quant-state tensors included."""
    tensors |= {new: tensors[weight]} | {new + suffix: t for suffix, t in state_tensors(tensors, weight).items()}


def drop_weight(tensors: Tensors, weight: str) -> None:
    """Removes a weight and its quant-state tensors."""
    for name in [weight, *(weight + suffix for suffix in state_tensors(tensors, weight))]:
        del tensors[name]


def dequantize_weight(tensors: Tensors, weight: str) -> None:
    """Puts an unquantized weight of the same shape (and zeros) in place of a 4-bit one."""
    state = next(t for suffix, t in state_tensors(tensors, weight).items() if ".quant_state." in suffix)
    drop_weight(tensors, weight)
    tensors[weight] = zeros(*json.loads(state.data)["shape"])


def retype(tensors: Tensors, name: str, dtype: str, *shape: int) -> None:
    """Declares other dtype and shape for the same bytes."""
    tensors[name] = replace(tensors[name], dtype=dtype, shape=shape)


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(LocalSource.open(folder))


def scan(folder: Path, target: str | Target = "portable") -> ScanResult:
    """A scan that does not look for an installed vLLM."""
    return scan_checkpoint(opened(folder), resolve_target(target) if isinstance(target, str) else target)


@cache
def planned(folder: Path, target: str, options: Options | None = None) -> Plan:
    """The plan for a checkpoint that nobody changes: made once for a run."""
    return plan_checkpoint(LocalSource.open(folder), resolve_target(target), options)


def set_chunk_bytes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets how many bytes are read, compared or copied at a time, in every module that has such a constant."""
    for module in [m for name, m in sys.modules.items() if name.startswith("bnbfix.")]:
        for constant in {"CHUNK_BYTES", "COPY_BYTES"} & set(vars(module)):
            monkeypatch.setattr(module, constant, n)
