"""The pre-commit hook: checks the folders of the files that are about to be committed.

    python -m bnbfix.cli.pre_commit [--vllm TARGET] FILE...

It ends with the exit code of the worst folder. Folders without a bitsandbytes checkpoint pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..api import check_before_upload
from ..errors import BnbfixError
from ..report.terminal import print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks each folder once, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="bnbfix-pre-commit", description="Checks checkpoints before a commit.")
    parser.add_argument("--vllm", metavar="TARGET", help='a vLLM release, or "portable" (the default)')
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    code = 0
    for folder in sorted({file.parent for file in given.files}):
        if not (folder / "config.json").is_file():
            continue  # a shard inside a folder of its own belongs to no checkpoint that vLLM loads
        try:
            check_before_upload(folder, given.vllm or "portable")
        except BnbfixError as e:
            print_error(str(e), e.hint, e.command)
            code = max(code, e.exit_code)
    return code


if __name__ == "__main__":
    sys.exit(main())
