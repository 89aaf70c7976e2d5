"""`bnbfix schema`: the JSON Schemas of the documents that the other commands print."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Document = Literal["scan", "repair", "verify"]


def schema(document: Annotated[Document, typer.Argument(metavar="COMMAND", help="scan, repair or verify.")]) -> int:
    """Print the JSON Schema of what a command prints with --format json."""
    from ..report.json import schema_text

    print(schema_text(document), end="")
    return 0
