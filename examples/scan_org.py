"""Scans every model of an organization on the Hub: a line of JSON for each model, and a summary.

    python examples/scan_org.py ORG --output ORG.jsonl [--vllm TARGET] [--limit N]

Needs no container and no GPU: a scan only reads headers. Run it from cron, or any job runner; it ends with the exit
code of `bnbfix scan`, which is 1 when a model would not load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi


def main() -> int:
    parser = argparse.ArgumentParser(description="Scans every model of an organization.")
    parser.add_argument("org")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the JSON Lines go")
    parser.add_argument("--vllm", default="portable", help="the vLLM release that they should load in")
    parser.add_argument("--limit", type=int, help="scan at most this many models")
    args = parser.parse_args()

    models = [m.id for m in HfApi().list_models(author=args.org, limit=args.limit)]
    if not models:
        sys.exit(f"{args.org} has no models, or none that this token may see")
    command = [sys.executable, "-m", "bnbfix", "scan", "--from", "-", "--vllm", args.vllm, "--quiet"]
    command += ["--format", "jsonl", "--output", str(args.output)]
    code = subprocess.run(command, input="\n".join(models), text=True).returncode

    documents = [json.loads(line) for line in args.output.read_text("utf-8").splitlines()]
    codes = Counter(f["code"] for d in documents for f in d.get("findings", ()) if f["severity"] != "note")
    for name, n in codes.most_common():
        print(f"{name}: {n}")
    return code


if __name__ == "__main__":
    sys.exit(main())
