"""Runs the command line, or a piece of code, again and again in one process that talks to the tests' Hub.

huggingface_hub reads HF_ENDPOINT when it is imported, so the tests' own process cannot be pointed at it. One line of
JSON in, {argv, env, script}; one line out, {code, out, err}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback

from bnbfix.cli import main as cli
from bnbfix.hub import client as hub_client

hub_client.FIRST_WAIT = 0.01  # seconds; the server's faults pass at once, or never


def set_environment(env: dict[str, str | None]) -> None:
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def answer(job: dict[str, object]) -> dict[str, object]:
    env = job["env"]
    assert isinstance(env, dict)
    old = {name: os.environ.get(name) for name in env}
    set_environment(env)
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = ["bnbfix", *job["argv"]]  # type: ignore[misc]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if job["script"]:
                exec(str(job["script"]), {"__name__": "script"})
                code = 0
            else:
                cli.main()
    except SystemExit as e:
        code = e.code
    except BaseException:
        err.write(traceback.format_exc())
    finally:
        set_environment(old)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=channel, flush=True)
