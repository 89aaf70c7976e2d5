"""Answers in JSON what the vLLM of this Python does with a folder.

    python -m bnbfix_worker probe|load|dry_load FOLDER ANSWER.json [FOLDER ANSWER.json ...]

Of several folders each is looked at in a process of its own, forked after the imports, which take longer than the rest.
vLLM is imported in this folder and nowhere else; nothing of bnbfix is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

from .engine import ENVIRONMENT, import_vllm, report_status, versions
from .parent import watch_parent


def main() -> None:
    """Writes an answer for each folder, and ends with status 0 whatever the answers are."""
    what, *paths = sys.argv[1:]
    watch_parent()
    os.environ.update({k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()})
    report_status("importing vLLM")
    jobs = list(zip(paths[::2], paths[1::2], strict=True))
    if len(jobs) > 1:
        import_vllm()
    for folder, answer in jobs[:-1]:
        if (child := os.fork()) == 0:
            answer_job(what, folder, answer)
        os.waitpid(child, 0)
    answer_job(what, *jobs[-1])


def answer_job(what: str, folder: str, answer: str) -> NoReturn:
    """Writes the answer, or the error with the last places it passed, and ends the process."""
    result: dict[str, Any] = {"versions": versions(), "error": None, "at": []}
    try:
        result |= import_module(f".{what}", __package__).run(folder)
    except BaseException as e:
        traceback.print_exc()
        result |= getattr(e, "bnbfix_result", {}) | describe_error(e)
    with open(f"{answer}.part", "w") as f:
        json.dump(result, f)
    os.replace(f"{answer}.part", answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the engine's own shutdown can hang


def describe_error(error: BaseException) -> dict[str, Any]:
    """{error, at}: the innermost cause, and the last places it passed."""
    while error.__cause__ is not None:
        error = error.__cause__
    last = traceback.extract_tb(error.__traceback__)[-4:]
    return {
        "error": f"{type(error).__name__}: {error}"[:2000],
        "tensor": getattr(error, "bnbfix_tensor", None),  # the one that the loader was given last
        "at": [f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in last],
    }


if __name__ == "__main__":
    main()
