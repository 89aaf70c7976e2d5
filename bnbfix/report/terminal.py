"""Writes to the terminal: styled lines and documents to stdout or a file, errors, progress and logs to stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple, TextIO

from ..errors import OutputError
from .text import escape_control_chars

DEFAULT_WIDTH = 80  # where there is no terminal to ask


class StyledText(NamedTuple):
    """Text in one style, as rich names styles."""

    text: str
    style: str = ""


StyledLine = tuple[StyledText, ...]


class TableOptions(NamedTuple):
    """How much a table shows, and in which width."""

    width: int = DEFAULT_WIDTH
    rule: str = "\u2500"
    verbose: bool = False
    quiet: bool = False


def fold(text: str, width: int) -> list[str]:
    """Text in lines of a width; names without blanks are broken anywhere."""
    return wrap(text, max(width, 8), break_on_hyphens=False) or [""]


def print_error(message: str, hint: str | None = None, command: str | None = None) -> None:
    """An error, what to do about it, and a command to paste, on stderr."""
    _print_folded(f"error: {message}")
    if hint and hint not in message:
        _print_folded(f"  {hint}")
    if command and command not in message:
        print(f"  {escape_control_chars(command)}", file=sys.stderr)


def print_warning(message: str) -> None:
    """Something to know, on stderr."""
    _print_folded(f"warning: {message}")


def _print_folded(text: str) -> None:
    """A line to stderr; a terminal gets it folded between words, and names are not broken: they may be copied."""
    text = escape_control_chars(text)
    if (width := _terminal_width(sys.stderr)) is not None:
        indent = " " * (len(text) - len(text.lstrip()))
        text = "\n".join(wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))
    print(text, file=sys.stderr)


def _terminal_width(stream: TextIO) -> int | None:
    """The columns of a terminal, which COLUMNS may set; None of anything else."""
    with suppress(OSError):
        if stream.isatty():
            return _columns() or os.get_terminal_size(stream.fileno()).columns or None
    return None


def _columns() -> int | None:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) >= 20 else None


def show_logs(verbosity: int) -> None:
    """Shows bnbfix's log on stderr: nothing at 0, decisions at 1, details at 2."""
    logger = logging.getLogger("bnbfix")
    for handler in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET if verbosity < 1 else logging.INFO if verbosity == 1 else logging.DEBUG)
    if verbosity > 0:
        logger.addHandler(_StderrHandler())


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the moment, which is the progress bar's while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}"
        print(escape_control_chars(line), file=sys.stderr)


@contextmanager
def progress_bar(phases: Mapping[str, int], *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Bars on stderr, where that is a terminal; gives a function that is called with the bytes just done.

    Args:
        phases: The words for each phase, and its bytes. One follows the other; those without bytes are left out.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = [bar.add_task(words, total=total, start=False) for words, total in phases.items() if total]

        def step(n: int) -> None:
            while tasks and n:
                task = bar.tasks[tasks[0]]
                if not task.started:
                    bar.start_task(tasks[0])
                part = n if len(tasks) == 1 else min(n, int((task.total or 0) - task.completed))
                bar.advance(tasks[0], part)
                n -= part
                if len(tasks) > 1 and task.finished:
                    tasks.pop(0)

        yield step


def show_status(*, quiet: bool) -> Callable[[str], None]:
    """A function that shows what is being waited for, in one line on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda text: None

    def show(text: str) -> None:
        line = f"{escape_control_chars(text)} ..." if text else ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    return show


def table_options(*, verbose: bool, quiet: bool) -> TableOptions:
    """The options of a table on this stdout."""
    width = _columns() or _terminal_width(sys.stdout) or DEFAULT_WIDTH
    return TableOptions(width, "\u2500" if _can_encode("\u2500") else "-", verbose, quiet)


def _can_encode(text: str) -> bool:
    """Can stdout's encoding spell this?"""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def write_lines(lines: Iterable[StyledLine]) -> None:
    """Lines to stdout as they come; in colour where that is a terminal, which is when rich is worth its time."""
    if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        for line in lines:
            console.print(Text.assemble(*line))
        return
    for line in lines:
        sys.stdout.write("".join(part.text for part in line).rstrip() + "\n")
        sys.stdout.flush()


def write_text(parts: Iterable[str]) -> None:
    """A document to stdout, part by part as they come."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()


def write_file(path: Path, parts: Iterable[str]) -> None:
    """A document to a file, whole or not at all; raises OutputError when it cannot be written."""
    import tempfile  # slow to import

    if path.exists() and not path.is_file():
        raise OutputError("is not a regular file", where=str(path))
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
