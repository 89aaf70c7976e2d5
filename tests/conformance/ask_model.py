"""What runs inside an environment for family_outputs.py: the answers of vLLM, or of transformers, to prompts.

    python tests/conformance/ask_model.py --vllm JOBS
    python tests/conformance/ask_model.py --transformers JOBS

JOBS is a JSON list of folders, each with a file for its answers.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSIDE = Path(__file__).parents[2] / "bnbfix" / "engines" / "vllm" / "inside"
IDS = list(range(20, 60))


def list_prompts(folder: Path) -> dict[str, tuple[str, Any]]:
    """What is asked of a folder's model: text, and where its class takes them, a red and a blue picture."""
    from pictures import COLOURS, PICTURES, WORDS
    from PIL import Image

    out: dict[str, tuple[str, Any]] = {"text": ("", None)}
    picture = PICTURES.get(json.loads((folder / "config.json").read_text())["architectures"][0])
    if picture is not None and (folder / "processor_config.json").exists():
        text = f"<bos> t21 {picture.text} {WORDS}"
        out |= {name: (text, Image.new("RGB", (60, 48), colour)) for name, colour in COLOURS.items()}
    return out


def answer_by_vllm(folder: str, out: str) -> None:
    """Token ids and the log probabilities at every position but the first, of each prompt."""
    import numpy as np
    import torch
    import vllm
    from inside.engine import start_engine

    # Some hosts offer AMX but stop at its instructions, as in 0.22.1's linear attention; and 0.27.1's attention
    # refuses its own block size with it.
    torch.cpu._is_amx_tile_supported = lambda: False
    prompts = list_prompts(Path(folder))
    setup = {"skip_tokenizer_init": len(prompts) == 1, "max_logprobs": -1}
    setup |= {"mamba_ssm_cache_dtype": "float32"}  # the CPU kernels of linear attention know no other
    llm = start_engine(folder, lambda model: None, **setup)
    options = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": -1, "logprobs": -1, "detokenize": False}
    found = {}
    for name, (text, picture) in prompts.items():
        prompt = {"prompt": text, "multi_modal_data": {"image": picture}} if picture else {"prompt_token_ids": IDS}
        answer = llm.generate(prompt, vllm.SamplingParams(**options), use_tqdm=False)[0]
        rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        found[f"{name}.ids"] = np.array(answer.prompt_token_ids)
        found[f"{name}.logp"] = np.array([[row[t].logprob for t in range(len(row))] for row in rows])
    np.savez(out, **found)


def run_vllm(jobs: Path) -> None:
    """An answer for each folder, in a process of its own forked after the imports; why there is none, in a line."""
    package = types.ModuleType("inside")
    package.__path__ = [str(INSIDE)]
    sys.modules["inside"] = package
    from inside.engine import ENVIRONMENT, import_vllm

    os.environ.update({k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()})
    import_vllm()
    for folder, out in json.loads(jobs.read_text()):
        if (child := os.fork()) == 0:
            try:
                answer_by_vllm(folder, out)
            except BaseException as e:
                traceback.print_exc()
                Path(out).with_suffix(".error").write_text(f"{type(e).__name__}: {e}"[:300])
            os._exit(0)  # the engine's own shutdown can hang
        os.waitpid(child, 0)


def ask_transformers(model: Any, folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """(prompt, token ids, log probabilities at every position)."""
    import torch
    import transformers

    for name, (text, picture) in list_prompts(folder).items():
        inputs = {"input_ids": torch.tensor([IDS])}
        if picture is not None:
            processor = transformers.AutoProcessor.from_pretrained(folder)
            inputs = processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)
            # Without it Gemma 3 attends to all of a picture, which vLLM cannot do on a CPU.
            inputs.pop("token_type_ids", None)
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        yield name, inputs["input_ids"][0].numpy(), torch.log_softmax(logits.float(), -1).numpy()


def run_transformers(jobs: Path) -> None:
    """For each folder and prompt the log probabilities in float32, and what bfloat16 differs by."""
    import numpy as np
    import torch
    from reference import load

    for folder, out in json.loads(jobs.read_text()):
        found: dict[str, Any] = {}
        for name, ids, logp in ask_transformers(load(Path(folder), torch.float32), Path(folder)):
            found[f"{name}.ids"], found[f"{name}.logp"] = ids, logp
        for name, _, logp in ask_transformers(load(Path(folder), torch.bfloat16), Path(folder)):
            found[f"{name}.noise"] = np.abs(logp - found[f"{name}.logp"]).mean()
        np.savez(out, **found)


if __name__ == "__main__":
    (run_vllm if sys.argv[1] == "--vllm" else run_transformers)(Path(sys.argv[2]))
