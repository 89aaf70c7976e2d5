"""Where the command begins: `bnbfix`, or `python -m bnbfix`."""

import gc
import sys


def main() -> None:
    """Runs the command line, and keeps Python from looking for garbage where there is none.

    That would take a tenth of a short scan: imports leave none, what they make stays until the end, and what a command
    leaves goes with the process.
    """
    gc.disable()
    try:
        from .cli.main import main as run  # here, since it imports the rest
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    gc.freeze()
    gc.enable()
    try:
        run()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
