"""Holds `scan` against dry loads at the sizes of published models (published.py), which no small checkpoint has.

    python tests/conformance/published_loads.py --releases 0.22.1,0.32.0 [--classes NAME,NAME]

Of each class, one model of every published size: linear modules of the language model's layers are quantized, all
others are in full precision and in the skip list, as transformers spells it. Weights are holes in sparse files, so it
takes no disk; a scan reads headers, and a dry load no bytes. Exits as run.py does.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import SECONDS, choose_releases, environment, make_parser
from dry_loads import compare, open_folder, verdict
from families import FAMILIES
from make_family import LANGUAGE, TOWER
from survey import SHAPES_RELEASE, describe_quantized, describe_tensor, find_shapes

from bnbfix.checkpoint.safetensors import TensorInfo, build_header
from bnbfix.engines.vllm.live import LiveVllm

WIDTH = {"BF16": 2, "U8": 1, "F32": 4}


def is_quantized(module: str | None) -> bool:
    """Return True for a linear module of the language model's layers."""
    return bool(module and LANGUAGE.search(module) and not TOWER.search(module) and not module.endswith("lm_head"))


def write_sparse(folder: Path, model: dict[str, Any], preprocessor: dict[str, Any] | None) -> Path:
    """A checkpoint of holes, with real headers and quant states."""
    rows = []
    for name, shape in model["tensors"].items():
        quantized = is_quantized(model["linears"].get(name)) and len(shape) == 2
        rows += describe_quantized(name, shape) if quantized else describe_tensor(name, shape)
    infos, texts, at = [], {}, 0
    for _, name, dtype, shape, text in rows:
        size = WIDTH[dtype] * math.prod(shape)
        infos.append(TensorInfo(name, dtype, tuple(shape), at, at + size))
        if text is not None:
            texts[at] = text.encode()
        at += size
    folder.mkdir(parents=True)
    header = build_header(infos, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + at)
        for offset, data in texts.items():
            f.seek(len(header) + offset)
            f.write(data)
    skipped = sorted({module for module in model["linears"].values() if not is_quantized(module)})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantization["llm_int8_skip_modules"] = skipped
    (folder / "config.json").write_text(json.dumps(model["config"] | {"quantization_config": quantization}))
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def main() -> None:
    """See the module's docstring."""
    parser = make_parser(__doc__)
    parser.add_argument("--all", action="store_true", help="every release of pins.json")
    parser.add_argument("--classes", help="comma-separated")
    a = parser.parse_args()
    releases = choose_releases(a)
    venvs = a.venvs or a.work / "venvs"
    python = environment(SHAPES_RELEASE, venvs)
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for name in a.classes.split(",") if a.classes else [n for n in FAMILIES if not n.startswith("Gemma4")]:
            family = FAMILIES[name]
            models = find_shapes(a.work, name, family, python)[len(family.configs) :: len(family.configs)]
            for number, model in enumerate(models):
                folders.append(write_sparse(Path(scratch) / f"{name}-{number}", model, family.preprocessor))
        for release in releases:
            live = LiveVllm(str(environment(release, venvs)), seconds=SECONDS * 6)
            for folder, answer in zip(folders, live.dry_load([open_folder(f) for f in folders]), strict=True):
                faults = compare(folder, release, answer)
                line = f"{release} {folder.name}: {verdict(answer)}, {len(faults)} disagreements"
                print(line, *(f"  NO {fault}" for fault in faults), sep="\n", flush=True)
                bad += len(faults)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
