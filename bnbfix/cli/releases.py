"""`bnbfix releases`, with --probe, and `bnbfix explain`: what bnbfix knows about vLLM releases and findings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..report.terminal import show_logs
from .options import AsFormat, Format, Verbose, print_json


def releases(
    probe: Annotated[
        Path | None,
        typer.Option("--probe", metavar="MODEL", help="Compare the release table with the installed vLLM, for MODEL."),
    ] = None,
    format: AsFormat = Format.table,
    verbose: Verbose = 0,
) -> int:
    """Show what each vLLM release expects of a checkpoint."""
    from ..engines.vllm.releases import find_installed, ranges

    show_logs(verbose)
    if probe is not None:
        return _probe(probe, format)
    if format is Format.json:
        from ..report.json import releases_document

        print_json(releases_document(ranges()))
        return 0
    from ..report.results import releases_report, show

    installed = find_installed()
    show(releases_report(ranges(), installed.version if installed else None))
    return 0


def _probe(model: Path, format: Format) -> int:
    from ..engines.vllm.probe import probe_model

    result = probe_model(model)
    if format is Format.json:
        from ..report.json import probe_document

        print_json(probe_document(result))
    else:
        from ..report.results import probe_report, show

        show(probe_report(result))
    return 1 if result.disagreements else 0


def explain(code: Annotated[str, typer.Argument(metavar="CODE", help="A finding's code, such as BNB101.")]) -> int:
    """Explain one finding, with its upstream issue."""
    from ..report.results import explain_report, show
    from ..rules.rule import Code

    try:
        found = Code(code.upper())
    except ValueError:
        known = ", ".join(c.value for c in Code)
        raise UsageError(f"{code!r} is not a finding's code", hint=f"Known: {known}.") from None
    show(explain_report(found))
    return 0
