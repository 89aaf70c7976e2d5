"""Options and arguments that several commands share, each defined once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ..engines.engine import DEFAULT, LATEST, PORTABLE
from ..engines.registry import engines
from ..errors import UsageError

TARGET, ASK = "Target", "Ask an installed vLLM"  # panels of the help
OUTPUT = "Output"
Format = Literal["table", "json"]

EPILOG = (
    "Environment: BNBFIX_VLLM, BNBFIX_FORMAT, BNBFIX_SELECT, BNBFIX_IGNORE, BNBFIX_FAIL_ON, BNBFIX_DEVICE, "
    "BNBFIX_VERBOSE and BNBFIX_QUIET set the options of these names. How long the Hub may take, in seconds: "
    "BNBFIX_HUB_TIMEOUT (15 without a byte), BNBFIX_HUB_ANSWER_TIMEOUT (300 for one answer), "
    "BNBFIX_HUB_DOWNLOAD_TIMEOUT (900 without 10 MB of a download), BNBFIX_HUB_PATIENCE (60 that a 429 may ask to "
    "wait; in fleets 600). HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET mean "
    "what they mean to huggingface_hub; HTTPS_PROXY, NO_PROXY, NO_COLOR, FORCE_COLOR and COLUMNS what they mean "
    "elsewhere. An option takes precedence.\n\n"
    "Exit codes: 0 clean, repaired, or nothing to repair. 1 findings remain, or an output differs from its plan. 2 bad "
    "usage, or input that is missing or broken. 3 nothing to check. 130, 143 interrupted, terminated."
)


class Command(TyperCommand):
    """A command whose help shows no type for what takes no value."""

    def get_params(self, ctx: Any) -> Any:
        """Its parameters, --help among them."""
        return _hide_types(super().get_params(ctx))


class Group(TyperGroup):
    """The same for what has commands."""

    def get_params(self, ctx: Any) -> Any:
        """Its parameters, --help among them."""
        return _hide_types(super().get_params(ctx))


def _hide_types(params: Any) -> Any:
    for param in params:
        if getattr(param, "is_flag", False) or getattr(param, "count", False):
            param.metavar = ""  # typer says "<bool>" from 0.29 on
    return params


def complete_targets(incomplete: str) -> list[str]:
    """The releases that begin and end a range, and the words that mean others."""
    releases = dict.fromkeys(version for r in engines()[DEFAULT].ranges for version in (r.first, r.last))
    return [name for name in (PORTABLE, LATEST, *releases) if name.startswith(incomplete)]


def parse_folder(text: str) -> Path:
    """The path of a folder; raises UsageError for an empty one, which would be the current folder."""
    if not text:
        raise UsageError("--out is empty; it must name a folder")
    return Path(text)


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder with config.json and safetensors files, or a Hub repo: org/name.")
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", rich_help_panel=TARGET, help="Branch, tag or commit of the Hub repo."),
]


def _vllm(default: str) -> Any:
    return typer.Option(
        "--vllm",
        metavar="TARGET",
        envvar="BNBFIX_VLLM",
        autocompletion=complete_targets,
        rich_help_panel=TARGET,
        help=f"A vLLM release such as 0.22.1, latest, or portable: every release at once. Default: {default}.",
    )


Vllm = Annotated[str | None, _vllm("the vLLM installed with bnbfix, otherwise portable")]
FleetVllm = Annotated[str | None, _vllm("portable")]
DryLoadOption = Annotated[
    bool,
    typer.Option(
        "--dry-load",
        rich_help_panel=ASK,
        help="Ask the installed vLLM too: its own loader, given names and shapes, no weights.",
    ),
]
Python = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="PYTHON",
        rich_help_panel=ASK,
        help="The Python of another environment, whose vLLM --dry-load asks.",
    ),
]
AsFormat = Annotated[Format, typer.Option("--format", rich_help_panel=OUTPUT, help="How the result is written.")]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="The same as --format json.")]


def _quiet(help: str) -> Any:
    return typer.Option("--quiet", "-q", envvar="BNBFIX_QUIET", rich_help_panel=OUTPUT, help=help)


def _verbose(help: str) -> Any:
    return typer.Option(
        "--verbose", "-v", count=True, show_default=False, envvar="BNBFIX_VERBOSE", rich_help_panel=OUTPUT, help=help
    )


Quiet = Annotated[bool, _quiet("Only print errors.")]
ScanQuiet = Annotated[bool, _quiet("Only print errors, and one line per model.")]
Verbose = Annotated[int, _verbose("Log decisions to stderr; -vv: details too.")]
ScanVerbose = Annotated[int, _verbose("Show every tensor and the notes; -vv and -vvv log decisions and details.")]


def print_json(document: dict[str, Any]) -> None:
    """A document to stdout."""
    print(json.dumps(document, indent=2))
