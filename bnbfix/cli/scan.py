"""`bnbfix scan`: its options, as typer reads them."""

from __future__ import annotations

from typing import Annotated

import typer

from ..rules.rule import Code
from .options import OUTPUT, AsJson, DryLoadOption, Python, Revision, ScanQuiet, ScanVerbose, Vllm
from .run_scan import Level, ScanFormat, ScanOptions, run_scan

COUNTS = "What counts"  # a panel of the help


def complete_codes(incomplete: str) -> list[str]:
    """Codes of findings, after those that are there already."""
    *done, last = incomplete.split(",")
    return [",".join([*done, c.value]) for c in Code if c.value.startswith(last)]


Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL", help="Folders, or repos on the Hub: org/name or org/name@revision."),
]
From = Annotated[
    str | None, typer.Option("--from", metavar="FILE", help="Scan the models listed in FILE, one per line; - is stdin.")
]
Formats = Annotated[
    list[ScanFormat] | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        envvar="BNBFIX_FORMAT",
        rich_help_panel=OUTPUT,
        help=f"{', '.join(ScanFormat)}: more than once, with an --output for each.",
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="FILE",
        rich_help_panel=OUTPUT,
        help="Write the --format document to FILE, and the table to stdout; - is stdout.",
    ),
]
Map = Annotated[
    bool,
    typer.Option(
        "--map", rich_help_panel=OUTPUT, help="Draw a map of the modules that are quantized or in conflict, by layer."
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="CODES",
        envvar="BNBFIX_SELECT",
        autocompletion=complete_codes,
        rich_help_panel=COUNTS,
        help="Only count these findings: codes or prefixes of codes (BNB1), separated by commas.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="CODES",
        envvar="BNBFIX_IGNORE",
        autocompletion=complete_codes,
        rich_help_panel=COUNTS,
        help="Do not count these findings.",
    ),
]
FailOn = Annotated[
    Level,
    typer.Option(
        "--fail-on",
        envvar="BNBFIX_FAIL_ON",
        rich_help_panel=COUNTS,
        help="The least severity that makes the exit code 1.",
    ),
]
ExitZero = Annotated[
    bool,
    typer.Option(
        "--exit-zero", rich_help_panel=COUNTS, help="Exit 0 even when findings remain; the same as --fail-on never."
    ),
]


def scan(
    models: Models = None,
    source: From = None,
    vllm: Vllm = None,
    revision: Revision = None,
    formats: Formats = None,
    json: AsJson = False,
    outputs: Outputs = None,
    map: Map = False,
    select: Select = None,
    ignore: Ignore = None,
    fail_on: FailOn = "degraded",
    exit_zero: ExitZero = False,
    dry_load: DryLoadOption = False,
    python: Python = None,
    verbose: ScanVerbose = 0,
    quiet: ScanQuiet = False,
) -> int:
    """Report what would go wrong in vLLM, where, and what fixes it. Reads headers only."""
    return run_scan(
        ScanOptions(
            models=models or (),
            source=source,
            vllm=vllm,
            revision=revision,
            formats=[*(formats or ()), *([ScanFormat.json] if json else ())],
            outputs=outputs or (),
            select=select or (),
            ignore=ignore or (),
            fail_on=fail_on,
            exit_zero=exit_zero,
            map=map,
            dry_load=dry_load,
            python=python,
            verbose=verbose,
            quiet=quiet,
        )
    )
