"""The command line: its commands, its signals and its exit codes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Annotated, Any

import typer

from ..__version__ import __version__
from ..errors import BnbfixError
from ..report.terminal import print_error
from .options import Interrupted
from .releases import explain, releases
from .repair import repair
from .scan import scan
from .signals import INTERRUPTED, Signals, exit_interrupted
from .streams import drop_output, open_streams
from .verify import verify

app = typer.Typer(
    name="bnbfix",
    help="Scan and repair bitsandbytes-quantized Gemma4 checkpoints so that vLLM loads them and answers correctly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (scan, repair, verify, releases, explain):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        print(f"bnbfix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line and exits with its code. What an input causes never ends in a traceback."""
    gc.freeze()  # what was imported stays: a tenth of a scan went into searching it for garbage
    open_streams()
    # OpenBLAS, which numpy loads and nothing here calls, starts a thread for each core. Where the system refuses one it
    # interrupts or ends the process, and where there is little address space too.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signals = Signals()
    try:
        with signals.handled():
            code = _run(signals)
    except KeyboardInterrupt:  # in the last moment, or while an error is being printed
        code = signals.code
    if signals.seen:
        exit_interrupted(code)
    sys.exit(code)


def _run(signals: Signals) -> int:
    """Runs a command and returns its exit code, after a line on stderr about what stopped it."""
    try:
        code: Any = app(standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer catches the interrupt itself
            raise Interrupted
        return code if isinstance(code, int) else 0
    except BnbfixError as e:
        _report(str(e), e.hint)
        return e.exit_code
    except (KeyboardInterrupt, Interrupted) as e:
        _report("interrupted; nothing was published", getattr(e, "hint", None))
        return signals.code
    except OSError as e:
        drop_output()
        _report(f"{e.filename or 'input/output'}: {e.strerror or e}")
    except MemoryError:
        _report("there is not enough memory", "Is it limited (ulimit -v, a container)? See also --max-memory.")
    except ImportError as e:
        _report(f"a module cannot be imported: {e}", "Is memory, or the number of open files, limited (ulimit -a)?")
    except Exception as e:
        return _usage_code(e)
    return 2


def _report(message: str, hint: str | None = None) -> None:
    with contextlib.suppress(OSError):  # of stderr itself
        print_error(message, hint)


def _usage_code(error: Exception) -> int:
    """The exit code of an error that the option parser can show; any other error is a bug and is raised."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return int(getattr(error, "exit_code", 2))
