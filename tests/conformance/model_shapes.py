"""What transformers says of a model without making its weights: tensor names and shapes as files have them.

    VENV/bin/python tests/conformance/model_shapes.py IN.json OUT.json

IN.json holds configs; OUT.json, for each of them, {config, tensors, linears, defaults, keys, axial}: the whole config,
shapes by name, the modules that quantization replaces, the config class's defaults, its keys that have an older name,
and the vision tower's rope as transformers 5.19 names it. One that this transformers cannot build is {error}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def describe_model(config: dict[str, Any]) -> dict[str, Any]:
    """{config, tensors, ...} of the model that a config.json describes."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        read = transformers.AutoConfig.from_pretrained(folder)
    name = config["architectures"][0]
    with torch.device("meta"):
        model = getattr(transformers, name)(read)
    state = dict(model.state_dict())
    on_disk = revert_weight_conversion(model, dict(state))
    linears = {}
    for module, m in model.named_modules():
        if isinstance(m, torch.nn.Linear):
            weight = f"{module}.weight"
            renamed = [weight] if weight in on_disk else revert_weight_conversion(model, {weight: state[weight]})
            linears[next(iter(renamed))] = module
    whole = read.to_dict()
    parts = {"": read} | {f"{key}.": part for key in read.sub_configs if (part := getattr(read, key, None)) is not None}
    rope = (whole.get("vision_config") or {}).get("rope_parameters") or {}
    axial = dict(rope) if rope.get("rope_type") == "axial" else None
    if axial:  # a name of transformers 5.19, which older ones may refuse
        rope["rope_type"] = "default"
    return {
        "config": config if "dtype" in config else whole | {"architectures": [name], "dtype": "bfloat16"},
        "tensors": {n: list(t.shape) for n, t in on_disk.items()},
        "linears": linears,
        "defaults": type(read)().to_dict(),
        "keys": {at + new: at + old for at, part in parts.items() for old, new in part.attribute_map.items()},
        "axial": axial,
    }


def main() -> None:
    """See the module's docstring."""
    out = []
    for config in json.loads(Path(sys.argv[1]).read_text()):
        try:
            out.append(describe_model(config))
        except Exception as e:
            out.append({"error": f"{type(e).__name__}: {e}"})
    Path(sys.argv[2]).write_text(json.dumps(out))


if __name__ == "__main__":
    main()
