"""Makes a tiny Gemma4 checkpoint with the real structure and faults, then scans, repairs, verifies and rescans it.

    python examples/quickstart.py [FOLDER]

Everything is made here, offline; FOLDER (default: quickstart-output) is replaced. It ends with status 0 only when the
repaired checkpoint is clean.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path


def bnbfix(*arguments: str, expect: int) -> None:
    """Runs the command line as a user would, and stops if its exit code is not the expected one."""
    print(f"\n$ bnbfix {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "bnbfix", *arguments]).returncode
    if code != expect:
        sys.exit(f"quickstart: exit code {code} where {expect} was expected")


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it warns of a package not needed here
    import tiny_gemma4

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-output")
    shutil.rmtree(folder, ignore_errors=True)
    model, repaired = folder / "tiny-gemma4-bnb-4bit", folder / "repaired"
    # 31B's structure: K serves as V in full-attention layers, two fused groups are partially quantized, and the
    # skip list is in transformers' spelling.
    tiny_gemma4.make(model, "dense31b", "partial", shards=2)
    print(f"made {model}: {sum(1 for _ in model.iterdir())} files")
    bnbfix("scan", str(model), "--vllm", "portable", expect=1)
    bnbfix("repair", str(model), "--vllm", "portable", "--dry-run", expect=0)
    bnbfix("repair", str(model), "--vllm", "portable", "--out", str(repaired), expect=0)
    bnbfix("verify", str(repaired), "--source", str(model), expect=0)
    bnbfix("scan", str(repaired), "--vllm", "portable", expect=0)
    bnbfix("repair", str(repaired), "--vllm", "portable", "--out", str(folder / "again"), expect=0)
    print(f"\nquickstart: {repaired} is clean for every vLLM release")


if __name__ == "__main__":
    main()
