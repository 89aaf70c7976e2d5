"""The examples, each run as its users would; those that need GitHub are held against its schemas."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.cli import pre_commit
from tests.support.build import Make

ROOT = Path(bnbfix.__file__).parent.parent
EXAMPLES = ROOT / "examples"


def python(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)


class Hub(ThreadingHTTPServer):
    """Just enough of the Hub to list models; it notes what it is asked and refuses the rest."""

    models: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """Answers one request of a Hub."""

    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        listing = self.path.startswith("/api/models?")
        body = json.dumps([{"id": m} for m in self.server.models] if listing else {"error": "no"}).encode()
        self.send_response(200 if listing else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}


def test_the_quickstart_ends_with_a_clean_checkpoint(tmp_path: Path) -> None:
    done = python(EXAMPLES / "quickstart.py", tmp_path / "quick")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n$ bnbfix ") == 6
    assert done.stdout.endswith(f"\nquickstart: {tmp_path / 'quick' / 'repaired'} is clean for every vLLM release\n")


def test_an_upload_is_checked_first(pristine: Make, hub: Hub, environment: dict[str, str]) -> None:
    arguments = ("acme/model", "--vllm", "0.32.0")
    done = python(EXAMPLES / "upload.py", pristine("dense31b", "partial", shards=2), *arguments, **environment)
    assert done.returncode == 1 and done.stdout == ""
    assert "not uploaded: " in done.stderr and "BNB103 fused group partially quantized (5 tensors)" in done.stderr
    assert hub.asked == []
    done = python(EXAMPLES / "upload.py", pristine("e4b", "all"), *arguments, **environment)
    assert "POST /api/repos/create" in hub.asked, done.stderr  # a sound one gets as far as the Hub
    assert "403" in done.stderr


def test_an_organization_is_scanned(pristine: Make, hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    acme = tmp_path / "acme"
    acme.mkdir()
    for name, source in {"good": pristine("e4b", "all"), "bad": pristine("dense31b", "partial")}.items():
        shutil.copytree(source, acme / name)
    (acme / "broken").mkdir()
    hub.models = ("acme/good", "acme/bad", "acme/broken")
    arguments = ("acme", "--output", "acme.jsonl", "--vllm", "0.32.0")
    done = python(EXAMPLES / "scan_org.py", *arguments, cwd=tmp_path, **environment)
    assert done.returncode == 2, done.stderr  # one of them cannot be read
    assert done.stdout.splitlines()[3:] == ["3 models: 1 loads, 1 wrong, 1 error", "BNB102: 1", "BNB103: 1"]
    documents = [json.loads(line) for line in (tmp_path / "acme.jsonl").read_text().splitlines()]
    assert [d["model"] for d in documents] == list(hub.models)
    assert [d.get("verdict") for d in documents] == ["loads", "wrong", None] and "config.json" in str(documents[2])
    hub.models = ()
    done = python(EXAMPLES / "scan_org.py", *arguments, cwd=tmp_path, **environment)
    assert done.returncode == 1 and done.stderr == "acme has no models, or none that this token may see\n"


TRAINING = """
import shutil, sys
import torch
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from trainer_callback import CheckCheckpoints

class Tiny(PreTrainedModel):
    config_class = PretrainedConfig
    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(2, 1)
        self.post_init()
    def forward(self, x, labels=None):
        return {"loss": self.linear(x).mean()}

class Exporting(Trainer):  # what it saves is another's checkpoint
    def save_model(self, output_dir=None, _internal_call=False):
        shutil.copytree(sys.argv[1], output_dir, dirs_exist_ok=True)

args = TrainingArguments(sys.argv[2], max_steps=1, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 4
callback = CheckCheckpoints("0.32.0", stop=sys.argv[3] == "stop")
Exporting(model=Tiny(PretrainedConfig()), args=args, train_dataset=data, callbacks=[callback]).train()
print("trained")
"""


def test_a_trainer_stops_at_a_checkpoint_that_does_not_load(pristine: Make, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'examples' is not installed")
    pytest.importorskip("accelerate", reason="the extra 'examples' is not installed")
    bad, good = pristine("dense31b", "partial", shards=2), pristine("e4b", "all")
    found = {}
    for name, source, stop in (("stop", bad, "stop"), ("warn", bad, "warn"), ("good", good, "stop")):
        path = f"{ROOT}{os.pathsep}{EXAMPLES}"
        found[name] = python("-c", TRAINING, source, tmp_path / name, stop, PYTHONPATH=path, HF_HUB_OFFLINE="1")
    words = "checkpoint-1: is not fit for vLLM 0.32.0: BNB102"
    assert found["stop"].returncode == 1 and "FindingsRemain" in found["stop"].stderr
    assert words in found["stop"].stderr and "trained" not in found["stop"].stdout
    assert found["warn"].returncode == 0 and words in found["warn"].stderr and "trained" in found["warn"].stdout
    assert found["good"].returncode == 0 and "is not fit" not in found["good"].stderr, found["good"].stderr


def test_the_readme_shows_what_a_scan_prints(pristine: Make, tmp_path: Path) -> None:
    shutil.copytree(pristine("dense31b", "partial", shards=2), tmp_path / "tiny-gemma4-bnb-4bit")
    sample = (ROOT / "README.md").read_text("utf-8").split("\n$ bnbfix ")[1].split("\n```")[0]
    command, *lines = sample.splitlines()
    done = python("-m", "bnbfix", *command.split(), cwd=tmp_path, PYTHONIOENCODING="utf-8")
    at = lines.index("...")
    assert done.stdout.splitlines()[:at] == lines[:at]
    assert done.stdout.splitlines()[at - len(lines) + 1 :] == lines[at + 1 :]


# The pre-commit hook


HOOKS = ROOT / ".pre-commit-hooks.yaml"


def test_the_hooks_manifest_names_files_of_checkpoints() -> None:
    text = HOOKS.read_text()
    (pattern,) = set(re.findall(r"files: (.*)", text))
    names = ("config.json", "a/config.json", "m/model-00001-of-00002.safetensors", "m/model.safetensors.index.json")
    assert all(re.search(pattern, name) for name in names)
    assert not any(re.search(pattern, name) for name in ("tokenizer_config.json", "a/b.json", "x.safetensors.txt"))
    assert set(re.findall(r"entry: (.*)", text)) == {"python -m bnbfix.cli.pre_commit"}


def test_the_hooks_manifest_is_valid() -> None:
    pytest.importorskip("pre_commit", reason="pre-commit is not installed")
    assert python("-m", "pre_commit", "validate-manifest", HOOKS).returncode == 0


def test_the_hook_checks_each_folder_once(pristine: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good, other = (pristine(*m) for m in (("dense31b", "partial"), ("e4b", "all"), ("dense31b", "bf16")))
    (tmp_path / "config.json").write_text("{")
    files = {m: [str(m / n) for n in ("config.json", "model.safetensors")] for m in (bad, good, other)}
    sound = [*files[good], *files[other], str(tmp_path / "x" / "a.safetensors")]
    assert pre_commit.main(["--vllm", "0.32.0", *sound]) == 0
    assert capsys.readouterr() == ("", "")
    assert pre_commit.main(["--vllm", "0.32.0", *files[good], *files[bad]]) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    assert pre_commit.main([str(tmp_path / "config.json")]) == 0  # no safetensors next to it: not a checkpoint
    (tmp_path / "model.safetensors").touch()
    assert pre_commit.main([*files[bad], str(tmp_path / "config.json")]) == 2
    assert pre_commit.main([]) == 0
    done = python("-m", "bnbfix.cli.pre_commit", "--vllm", "0.32.0", *files[good], *files[bad])
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
