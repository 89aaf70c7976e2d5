"""`bnbfix verify`: proves a repair, and loads it in the installed vLLM where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.terminal import progress_bar, show_logs, show_status
from .options import ASK, AsFormat, AsJson, DryLoadOption, Python, Quiet, Revision, Verbose, print_json
from .run_scan import live_vllm
from .signals import Interrupted


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `bnbfix repair` wrote.")],
    source: Annotated[str | None, typer.Option("--source", metavar="MODEL", help="What it was repaired from.")] = None,
    revision: Revision = None,
    load: Annotated[
        bool, typer.Option("--load", rich_help_panel=ASK, help="Also load and run DIR in the installed vLLM.")
    ] = False,
    seconds: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", rich_help_panel=ASK, help="Time limit for --load.")
    ] = 1800,
    dry_load: DryLoadOption = False,
    python: Python = None,
    format: AsFormat = "table",
    json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Prove a repair: hashes, a fresh scan, with --source every byte and every decoded number, with --load in vLLM."""
    from .. import api
    from ..checkpoint.source import LocalSource

    show_logs(verbose)
    live = live_vllm(dry_load, python, quiet=quiet)
    size, as_json = sum(LocalSource.open(folder).files.values()), json or format == "json"
    phases = {f"hashing {folder}": size, "comparing": size if source else 0}
    with progress_bar(phases, quiet=quiet or as_json) as step:
        try:
            result = api.verify(folder, source, revision=revision, progress=step, dry_load=live or False)
        except KeyboardInterrupt as e:
            raise Interrupted(hint=getattr(e, "hint", None)) from None
    loaded = None
    if load:
        from ..engines.vllm.probe import load_model

        loaded = load_model(folder, seconds, show_status(quiet=quiet or as_json))
    if as_json:
        from ..report.json import load_document

        print_json(result.to_dict() | ({"load": load_document(loaded)} if loaded else {}))
    else:
        from ..report.next_step import after_verify
        from ..report.results import load_report, show, step_lines, verify_report

        if not (quiet and result.ok):
            show(verify_report(result))
        if loaded and not (quiet and loaded.ok):
            show(load_report(loaded))
        if not quiet:
            show(step_lines(after_verify(result, source)))
    return 0 if result.ok and (loaded is None or loaded.ok) else 1
