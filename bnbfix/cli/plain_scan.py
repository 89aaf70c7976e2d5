"""Reads the command line of a scan with common options, without typer: that takes longer to import than the scan.

What is not understood here, mistakes included, is left to typer, whose answer would be the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from .run_scan import ScanFormat, ScanOptions


def parse_plain_scan(arguments: Sequence[str]) -> ScanOptions | None:
    """The options of `bnbfix scan`; None for another command, and where another option or a variable is set."""
    if arguments[:1] != ["scan"] or any(name.startswith(("BNBFIX_", "_BNBFIX_")) for name in os.environ):
        return None
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),  # without a width it imports shutil
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--vllm")
    parser.add_argument("--format", dest="formats", type=ScanFormat, action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", dest="outputs", action="append", default=[])
    parser.add_argument("--exit-zero", action="store_true")
    parser.add_argument("--map", action="store_true")
    parser.add_argument("--verbose", "-v", action="count", default=0)
    parser.add_argument("--quiet", "-q", action="store_true")
    try:
        found, unknown = parser.parse_known_args(arguments[1:])
    except argparse.ArgumentError:
        return None
    if unknown or not found.models:
        return None
    options = vars(found)
    options["formats"] += [ScanFormat.json] if options.pop("json") else []
    return ScanOptions(**options)
