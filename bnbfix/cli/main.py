"""The command line: its signals, its errors and its exit codes. `app` has its commands."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys

from ..errors import BnbfixError
from ..report.next_step import command_line, next_command
from ..report.terminal import print_error
from .interrupted import Interrupted
from .plain_scan import parse_plain_scan
from .run_scan import run_scan

INTERRUPTED, TERMINATED = 130, 143
_terminated = False  # by SIGTERM


def main() -> None:
    """Runs the command line and exits with its code. What an input causes never ends in a traceback."""
    gc.freeze()  # what was imported stays: a tenth of a scan went into searching it for garbage
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold characters that stdout's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    try:
        code = _run(arguments)
    except BnbfixError as e:
        print_error(str(e), e.hint, next_command(e, arguments))
        code = e.exit_code
    except (KeyboardInterrupt, Interrupted) as e:
        print_error(str(e) or "interrupted", getattr(e, "hint", None), command_line(*arguments))
        code = TERMINATED if _terminated else INTERRUPTED
    except BrokenPipeError:  # whoever read stdout has gone, and so must what is still to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as e:
        print_error(f"{e.filename or 'input/output'}: {e.strerror or e}", command=command_line(*arguments))
        code = 2
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if (plain := parse_plain_scan(arguments)) is not None:
        return run_scan(plain)
    from .app import run_app

    code = run_app()
    if code == INTERRUPTED:  # typer catches the interrupt itself
        raise Interrupted
    return code


def _terminate(number: int, frame: object) -> None:
    global _terminated
    _terminated = True
    raise KeyboardInterrupt
