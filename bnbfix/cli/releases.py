"""`bnbfix releases`, with --probe, `explain` and `schema`: what bnbfix knows about releases, findings and documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from ..report.terminal import show_logs, show_status
from ..rules.rule import Code
from .options import AsFormat, AsJson, Verbose, print_json

Document = Literal["scan", "repair", "verify"]


def releases(
    probe: Annotated[
        Path | None,
        typer.Option("--probe", metavar="MODEL", help="Compare the release table with the installed vLLM, for MODEL."),
    ] = None,
    format: AsFormat = "table",
    json: AsJson = False,
    verbose: Verbose = 0,
) -> int:
    """Show what each vLLM release expects of a checkpoint."""
    from ..api import releases as all_releases
    from ..engines.vllm.releases import find_installed

    show_logs(verbose)
    as_json = json or format == "json"
    if probe is not None:
        return _probe(probe, as_json)
    if as_json:
        from ..report.json import releases_document

        print_json(releases_document(all_releases()))
        return 0
    from ..report.results import releases_report, show

    installed = find_installed()
    show(releases_report(all_releases(), installed.version if installed else None))
    return 0


def _probe(model: Path, as_json: bool) -> int:
    from ..engines.vllm.probe import probe_model

    result = probe_model(model, show_status(quiet=as_json))
    if as_json:
        from ..report.json import probe_document

        print_json(probe_document(result))
    else:
        from ..report.results import probe_report, show

        show(probe_report(result))
    return 1 if result.disagreements else 0


def complete_code(incomplete: str) -> list[str]:
    """Codes of findings."""
    return [c.value for c in Code if c.value.startswith(incomplete)]


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE", autocompletion=complete_code, help="A finding's code, such as BNB101. Without one: all."
        ),
    ] = None,
    format: AsFormat = "table",
    json: AsJson = False,
) -> int:
    """Explain a finding, with its upstream issue; without a code, list all findings."""
    from ..report.results import codes_report, explain_report, show

    codes = [c for c in Code if code is None or c.value == code.upper()]
    if not codes:
        raise UsageError(f"{code!r} is not a finding's code", command="bnbfix explain")
    if json or format == "json":
        documents = [{"code": c.value} | c.explanation.to_dict() for c in codes]
        print_json(documents[0] if code else {"codes": documents})
    else:
        show(explain_report(codes[0]) if code else codes_report(codes))
    return 0


def schema(document: Annotated[Document, typer.Argument(metavar="COMMAND", help="scan, repair or verify.")]) -> int:
    """Print the JSON Schema of what a command prints with --format json."""
    from ..report.json import schema_text

    print(schema_text(document), end="")
    return 0
