#!/usr/bin/env python3
"""Makes a checkpoint of 31B's real widths with random bytes, all of it on disk: the input of the benchmarks.

    python tests/benchmarks/make_model.py OUT [--gigabytes 6] [--towers] [--shard-size BYTES]

The structure is make_31b.py's, with as many layers as the size asks for; `--towers` quantizes the vision tower as well.
Quantized bytes and 8-bit scales are random; scales of scales and unquantized weights are numbers of a likely size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import make_31b
import numpy as np

PIECE = 8 << 20


def fill(folder: Path, seed: int = 7) -> None:
    """Writes random bytes into the holes of a checkpoint that make_31b.py made."""
    rng = np.random.default_rng(seed)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("r+b") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
            header.pop("__metadata__")
            for name, entry in header.items():
                if name.endswith((".quant_map", ".nested_quant_map")) or ".quant_state." in name:
                    continue
                begin, end = entry["data_offsets"]
                f.seek(8 + length + begin)
                for at in range(begin, end, PIECE):
                    f.write(noise(rng, entry["dtype"], min(PIECE, end - at)))


def noise(rng: np.random.Generator, dtype: str, size: int) -> bytes:
    """Random bytes that are not NaN or infinity in their dtype."""
    if dtype == "U8":
        return rng.bytes(size)
    if dtype == "F32":
        return rng.uniform(0.01, 0.1, size // 4).astype("<f4").tobytes()
    # bfloat16 of random sign and mantissa, between 2**-8 and 2**-4
    bits = rng.integers(0, 1 << 16, size // 2, dtype=np.uint16)
    exponent = (119 + (bits >> 7) % 4).astype("<u2") << 7
    return ((bits & 0x807F) | exponent).astype("<u2").tobytes()


def make(folder: Path, gigabytes: float, *, towers: bool, shard_size: int) -> Path:
    """A checkpoint of about so many bytes, filled."""
    embedding, layer = 2 * make_31b.VOCAB * make_31b.HIDDEN / 1e9, 0.25
    layers = max(6, math.ceil((gigabytes - embedding) / layer / 6) * 6)
    make_31b.LAYERS, make_31b.KINDS = layers, make_31b.KINDS[:layers]
    fill(make_31b.make(folder, quantized_tower=towers, shard_size=shard_size))
    return folder


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--towers", action="store_true", help="pack the vision tower and its embedder too")
    parser.add_argument("--shard-size", type=int, default=2_000_000_000, metavar="BYTES")
    given = parser.parse_args()
    folder = make(given.out, given.gigabytes, towers=given.towers, shard_size=given.shard_size)
    sizes = [p.stat().st_size for p in folder.iterdir()]
    print(f"{folder}: {sum(sizes) / 1e9:,.2f} GB in {len(sizes)} files")
    os.sync()


if __name__ == "__main__":
    sys.exit(main())
