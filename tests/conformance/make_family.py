"""Makes tiny bitsandbytes checkpoints of a class with transformers, random weights and all.

    VENV/bin/python tests/conformance/make_family.py IN.json

IN.json is {config, out, forms, numbered, renames}: a config.json, a folder, which of FORMS to write to OUT/FORM, or
LISTS, and for that one whether it numbers the experts first, and parts of names: as it writes them, and as transformers
does.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

FORMS = ("all", "skip", "partial", "fp4", "int8")
# Experts as linear modules: a list for each projection, as unsloth publishes some classes, or a list of experts, as
# transformers 4 saves others.
LISTS = "lists"
LANGUAGE = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp|feed_forward)\.")
TOWER = re.compile(r"vision|visual|audio|tower")


def make_model(config: dict[str, Any]) -> Any:
    """A model with random weights in bfloat16, each of the scale of real ones."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        read = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(7)
    model = getattr(transformers, config["architectures"][0])(read).to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                inputs = (
                    p.shape[-1] if p.dim() == 3 else p[0].numel()
                )  # of three are experts, and convolutions of a sequence
                p.copy_(torch.randn(p.shape) / inputs**0.5)
    return model


def list_skipped(model: Any, form: str) -> list[str] | None:
    """The skip list of a form, in transformers' spelling: linear modules outside of the language model's layers."""
    import torch

    if form not in ("skip", "partial", "fp4"):
        return None
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    skipped = [name for name in linears if not LANGUAGE.search(name) or TOWER.search(name)]
    if form == "partial":
        skipped += [name for name in linears if name not in skipped and name.endswith("layers.1.self_attn.q_proj")]
    return skipped


def write_lists(source: Path, out: Path, renames: list[list[str]], *, numbered: bool) -> None:
    """What transformers quantized, with its experts, which are stored transposed, as lists of linear modules in NF4.

    In a list of experts gate and up, of which one is left of the other in the tensor of both, are modules of their own.
    """
    import bitsandbytes.functional as bnb
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = {}
    for name, value in load_file(out / "model.safetensors").items():
        for theirs, ours in renames:
            name = name.replace(ours, theirs)
        if (m := re.fullmatch(r"(.*\.experts\.\w+_proj)(_bias)?", name)) is None:
            tensors[name] = value
            continue
        stem, joined = m[1].rsplit(".", 1)
        linears = {f"{joined}s.{number}": one for number, one in enumerate(value)}
        if numbered:
            parts = ("gate_proj", "up_proj") if joined == "gate_up_proj" else (joined,)
            cut = ((number, one.chunk(len(parts), dim=-1)) for number, one in enumerate(value))
            linears = {f"{n}.{part}": v for n, values in cut for part, v in zip(parts, values, strict=True)}
        for linear, one in linears.items():
            if m[2]:
                tensors[f"{stem}.{linear}.bias"] = one.clone()
                continue
            weight = f"{stem}.{linear}.weight"
            tensors[weight], state = bnb.quantize_4bit(one.T.contiguous(), quant_type="nf4", compress_statistics=True)
            tensors |= {f"{weight}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """See the module's docstring."""
    import torch
    import transformers

    given = json.loads(Path(sys.argv[1]).read_text())
    out, name = Path(given["out"]), given["config"]["architectures"][0]
    model = make_model(given["config"])
    model.save_pretrained(out / "bf16")
    for form in [form for form in given["forms"] if form != LISTS]:
        bits = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True}
        if form != "int8":
            bits |= {
                "bnb_4bit_quant_type": "fp4" if form == "fp4" else "nf4",
                "bnb_4bit_use_double_quant": form != "fp4",
            }
        how = transformers.BitsAndBytesConfig(
            **bits, bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=list_skipped(model, form)
        )
        quantized = getattr(transformers, name).from_pretrained(
            out / "bf16", quantization_config=how, device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        quantized.save_pretrained(out / form)
    if LISTS in given["forms"]:
        write_lists(out / "skip", out / LISTS, given["renames"], numbered=given["numbered"])


if __name__ == "__main__":
    main()
