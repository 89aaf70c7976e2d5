"""Where words go: results to stdout or a file, talk to stderr."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from .text import escape_control_chars

if TYPE_CHECKING:
    from .lines import Layout, Line

WIDTH = 80  # where there is no terminal to ask


def print_error(message: str, hint: str | None = None) -> None:
    """An error and what to do next, on stderr."""
    print(f"error: {escape_control_chars(message)}", file=sys.stderr)
    if hint:
        print(f"  {escape_control_chars(hint)}", file=sys.stderr)


def layout(*, verbose: bool, quiet: bool) -> Layout:
    """How a table is laid out on this stdout."""
    from .lines import Layout

    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) >= 20 else WIDTH
    if not columns and sys.stdout.isatty():
        with suppress(OSError):
            width = os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH
    return Layout(width, "\u2500" if _knows("\u2500") else "-", verbose, quiet)


def _knows(text: str) -> bool:
    """Can stdout's encoding spell this?"""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def write_lines(lines: Iterable[Line]) -> None:
    """Lines to stdout as they come; in colour where that is a terminal, which is when rich is worth its time."""
    if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        for line in lines:
            console.print(Text.assemble(*line))
        return
    for line in lines:
        sys.stdout.write("".join(span.text for span in line).rstrip() + "\n")
        sys.stdout.flush()


def write_text(parts: Iterable[str]) -> None:
    """A document to stdout, part by part as they come."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()


def write_file(path: Path, parts: Iterable[str]) -> None:
    """A document to a file, whole or not at all; raises OutputError when it cannot be written."""
    if path.exists() and not path.is_file():
        raise OutputError("is no regular file", where=str(path))
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    if path.is_symlink():
        raise OutputError("is a link to itself", where=str(path))
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as e:
        raise OutputError(f"cannot be written ({e.strerror})", where=str(path)) from e
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as f:
            f.writelines(parts)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(fd, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as e:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(e, OSError):
            raise OutputError(f"cannot be written ({e.strerror})", where=str(path)) from e
        raise
