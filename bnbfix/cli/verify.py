"""`bnbfix verify`: proves a repair, and loads it in the installed vLLM where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.terminal import progress_bar, show_logs
from .options import (
    AsFormat,
    DryLoadOption,
    Format,
    Interrupted,
    Python,
    Quiet,
    Revision,
    Verbose,
    live_from_options,
    print_json,
)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `bnbfix repair` wrote.")],
    source: Annotated[str | None, typer.Option("--source", metavar="MODEL", help="What it was repaired from.")] = None,
    revision: Revision = None,
    load: Annotated[bool, typer.Option("--load", help="Also load and run DIR in the installed vLLM.")] = False,
    seconds: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Time limit for --load.")] = 1800,
    dry_load: DryLoadOption = False,
    python: Python = None,
    format: AsFormat = Format.table,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Prove a repair: hashes, a fresh scan, with --source every byte and every decoded number, with --load in vLLM."""
    from .. import api
    from ..checkpoint.source import LocalSource

    show_logs(verbose)
    live = live_from_options(dry_load, python, quiet=quiet)
    size = sum(LocalSource.open(folder).files.values())
    with progress_bar(f"comparing {folder}", size * (2 if source else 1), quiet=quiet or format is Format.json) as step:
        try:
            result = api.verify(folder, source, revision=revision, progress=step, dry_load=live or False)
        except KeyboardInterrupt as e:
            raise Interrupted(getattr(e, "hint", None)) from None
    loaded = None
    if load:
        from ..engines.vllm.probe import load_model

        loaded = load_model(folder, seconds)
    if format is Format.json:
        from ..report.json import load_document

        print_json(result.to_dict() | ({"load": load_document(loaded)} if loaded else {}))
    else:
        from ..report.results import load_report, show, verify_report

        if not (quiet and result.ok):
            show(verify_report(result))
        if loaded and not (quiet and loaded.ok):
            show(load_report(loaded))
    return 0 if result.ok and (loaded is None or loaded.ok) else 1
