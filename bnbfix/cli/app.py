"""The commands and their help, as typer reads them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..__version__ import __version__
from ..errors import UsageError
from .fleet import app as fleet
from .options import EPILOG, Command, Group
from .releases import explain, releases, schema
from .repair import repair
from .scan import scan
from .verify import verify

app = typer.Typer(
    name="bnbfix",
    cls=Group,
    help="Scan and repair bitsandbytes checkpoints so that vLLM loads them and answers correctly.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, examples in (
    (scan, "bnbfix scan org/name --vllm 0.32.0"),
    (repair, "bnbfix repair org/name --out DIR --vllm portable"),
    (verify, "bnbfix verify DIR --source org/name"),
    (releases, "bnbfix releases --probe DIR"),
    (explain, "bnbfix explain BNB102"),
    (schema, "bnbfix schema scan"),
):
    app.command(cls=Command, epilog=f"Example: {examples}")(command)
app.add_typer(fleet)


def _version(value: bool) -> None:
    if value:
        print(f"bnbfix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run_app() -> int:
    """Runs the command that sys.argv names; raises UsageError for what the option parser refuses."""
    try:
        code: Any = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as e:
        if not hasattr(e, "format_message"):  # any other error is a bug
            raise
        message = e.format_message().replace("Value error, ", "").rstrip(".")
        raise UsageError(message[:1].lower() + message[1:]) from None
    return code if isinstance(code, int) else 0
