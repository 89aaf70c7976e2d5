"""Options and arguments that several commands share, each defined once."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..report.terminal import show_status

if TYPE_CHECKING:
    from ..engines.vllm.live import LiveVllm


class Format(str, Enum):
    """How a result is written to stdout."""

    table = "table"
    json = "json"


class Interrupted(Exception):
    """A command was interrupted and has something to say about it. The option parser catches KeyboardInterrupt."""

    def __init__(self, hint: str | None = None) -> None:
        super().__init__()
        self.hint = hint


def parse_folder(text: str) -> Path:
    """The path of a folder; raises UsageError for an empty one, which would be the current folder."""
    if not text:
        raise UsageError("--out is empty; it must name a folder")
    return Path(text)


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder with config.json and safetensors files, or a Hub repo: org/name.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of the Hub repo.")
]
Vllm = Annotated[
    str | None,
    typer.Option(
        "--vllm",
        metavar="TARGET",
        envvar="BNBFIX_VLLM",
        help='A vLLM release (0.22.1), or "portable" for every release. '
        "Default: the vLLM installed with bnbfix, otherwise portable.",
    ),
]
DryLoadOption = Annotated[
    bool,
    typer.Option("--dry-load", help="Ask the installed vLLM too: its own loader, given names and shapes, no weights."),
]
Python = Annotated[
    str | None, typer.Option("--python", metavar="PYTHON", help="The Python whose vLLM --dry-load asks. Default: this.")
]
AsFormat = Annotated[Format, typer.Option("--format", help="Output format.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", envvar="BNBFIX_QUIET", help="Only print errors, and one line per scanned model."),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        envvar="BNBFIX_VERBOSE",
        help="Log decisions to stderr; -vv: details too. "
        "For a scan, -v shows every tensor and the notes; -vv and -vvv log.",
    ),
]


def print_json(document: dict[str, Any]) -> None:
    """A document to stdout."""
    print(json.dumps(document, indent=2))


def live_from_options(dry_load: bool, python: str | None, *, quiet: bool) -> LiveVllm | None:
    """The vLLM that --dry-load asks; what it is doing is shown on a terminal."""
    if not dry_load:
        if python is not None:
            raise UsageError("--python needs --dry-load")
        return None
    from ..engines.vllm.live import LiveVllm

    return LiveVllm(python, status=show_status(quiet=quiet))
