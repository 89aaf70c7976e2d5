"""A page that scans a repo on the Hub and shows the report.

Each scan is a process of its own, in an empty folder, with bounded time and without a token: it sees public repos only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import bnbfix
from bnbfix.engines.targets import resolve_target
from bnbfix.report.next_step import serve_commands, suggest_output

SECONDS = float(os.environ.get("BNBFIX_SECONDS", "60"))
USERS = 4  # scans at a time; more wait
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
TARGETS = ["portable", "latest", *dict.fromkeys(v for r in reversed(bnbfix.releases()) for v in (r.last, r.first))]
SECRETS = ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")


def scan(repo: str, target: str) -> tuple[str, str]:
    """The report in a frame, and the commands that repair the repo; gr.Error says in words why there is none."""
    repo = repo.strip().removeprefix("https://huggingface.co/").rstrip("/")
    if not REPO.fullmatch(repo) or target not in TARGETS:
        raise gr.Error("Name a model on the Hub: org/name, or org/name@revision.", print_exception=False)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bnbfix", "scan", repo, "--vllm", target, "--quiet"]
        command += ["--format", "html", "--output", "report.html", "--format", "json", "--output", "report.json"]
        environment = {k: v for k, v in os.environ.items() if k not in SECRETS and not k.startswith("BNBFIX_")}
        environment |= {"HF_HOME": folder, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise gr.Error(f"The scan took longer than {SECONDS:,.0f} s.", print_exception=False) from None
        report = Path(folder) / "report.json"
        document = json.loads(report.read_text("utf-8")) if report.exists() else {"error": {"message": done.stderr}}
        if "error" in document:
            raise gr.Error(document["error"]["message"], print_exception=False)
        page = (Path(folder) / "report.html").read_text("utf-8")
    frame = f'<iframe title="Report" sandbox="allow-popups" srcdoc="{escape(page)}" style="{STYLE}"></iframe>'
    return frame, repair_commands(repo, target, document)


STYLE = "width: 100%; height: 75vh; border: 0; border-radius: 8px"


def repair_commands(repo: str, target: str, document: dict[str, Any]) -> str:
    """What repairs the repo as a pull request, what serves it where nothing is wrong, or why there is no repair."""
    if document["verdict"] == "loads":
        return "\n".join(serve_commands(repo, resolve_target(target)))
    hopeless = [f["code"] for f in document["findings"] if f["reason"] and f["severity"] != "note"]
    if hopeless:  # the report says what else there is
        return f"pip install bnbfix\nbnbfix explain {hopeless[0]}"
    output = suggest_output(repo)
    return f"pip install 'bnbfix[repair]'\nbnbfix repair {repo} --vllm {target} --create-pr --out {output}"


with gr.Blocks(title="Does it load in vLLM?") as page:
    gr.Markdown("# Does it load in vLLM?\nFor 4-bit bitsandbytes checkpoints on the Hub. Reads headers only.")
    with gr.Row():
        repo = gr.Textbox(label="Model", placeholder="org/name", scale=3, min_width=300, autofocus=True)
        target = gr.Dropdown(TARGETS, value="portable", label="vLLM", scale=1, min_width=200)
    button = gr.Button("Scan", variant="primary")
    report = gr.HTML()
    commands = gr.Code(label="Next", language="shell", interactive=False, wrap_lines=True)
    gr.on([button.click, repo.submit], scan, [repo, target], [report, commands], concurrency_limit=USERS)

if __name__ == "__main__":
    page.queue(max_size=32).launch(show_error=True)
