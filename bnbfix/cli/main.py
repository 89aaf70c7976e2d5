"""The command line: its streams, its signals, its errors and its exit codes. `app` has its commands."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

from ..errors import BnbfixError
from ..report.next_step import command_line, next_command
from ..report.terminal import print_error
from .plain_scan import parse_plain_scan
from .run_scan import run_scan
from .signals import INTERRUPTED, Interrupted, Signals, exit_interrupted


def main() -> None:
    """Runs the command line and exits with its code. What an input causes never ends in a traceback."""
    try:
        open_streams()
    except OSError as e:
        _report(f"a standard stream cannot be used ({e.strerror})", None, command_line(*sys.argv[1:]))
        sys.exit(2)
    # OpenBLAS, which numpy loads and nothing here calls, starts a thread for each core. Where the system refuses one it
    # interrupts or ends the process, and where there is little address space too.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signals = Signals()
    try:
        with signals.handled():
            code = _run(sys.argv[1:], signals)
    except KeyboardInterrupt:  # in the last moment, or while an error is being printed
        code = signals.code
    if signals.seen:
        exit_interrupted(code)
    sys.exit(code)


def _run(arguments: list[str], signals: Signals) -> int:
    """Runs a command and returns its exit code, after a line on stderr about what stopped it, and one to paste."""
    again = command_line(*arguments)
    try:
        code = _run_command(arguments)
        sys.stdout.flush()
        return code
    except BnbfixError as e:
        _report(str(e), e.hint, next_command(e, arguments))
        return e.exit_code
    except (KeyboardInterrupt, Interrupted) as e:
        _report(str(e) or "interrupted", getattr(e, "hint", None), getattr(e, "command", None) or again)
        return signals.code
    except BrokenPipeError:  # whoever read stdout has gone
        drop_output()
        return 1
    except OSError as e:
        drop_output()
        hint = "Is it limited (ulimit -n)?" if e.errno == errno.EMFILE else None
        _report(f"{e.filename or 'input/output'}: {e.strerror or e}", hint, again)
    except MemoryError:
        _report("there is not enough memory", "Is it limited (ulimit -v, a container)? See also --max-memory.", again)
    except ImportError as e:
        hint = "Is memory, or the number of open files, limited (ulimit -a)?"
        _report(f"a module cannot be imported: {e}", hint, again)
    return 2


def _run_command(arguments: list[str]) -> int:
    if (plain := parse_plain_scan(arguments)) is not None:
        return run_scan(plain)
    from .app import run_app

    code = run_app()
    if code == INTERRUPTED:  # typer catches the interrupt itself
        raise Interrupted
    return code


def _report(message: str, hint: str | None, command: str) -> None:
    with contextlib.suppress(OSError):  # of stderr itself
        print_error(message, hint, command)


def open_streams() -> None:
    """Put the null device in the place of standard streams that are closed.

    Else Python has None there, and the next files that are opened get their numbers: what a library in C prints to
    stderr would be written into the output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one, as those below it are open
        if getattr(sys, name) is None:  # it stays open as long as the process
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may hold characters that stdout's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Forget what was printed and cannot be written: at its end Python would try again, and end with status 120."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
