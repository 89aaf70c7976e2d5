"""The results of a fleet: a file of JSON Lines that grows as models are done, and a row of each for tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..__version__ import __version__
from ..errors import OutputError, UsageError
from ..report.terminal import write_file
from ..rules.rule import Code, Severity
from ..rules.selection import BROKEN, CLEAN, FINDINGS, NOTHING_TO_CHECK
from ..writer import syscalls

REPAIRED, NOTHING_TO_DO = "repaired", "nothing to do"
# Worst first.
VERDICTS = ("error", "fails", "wrong", "degraded", REPAIRED, "note", "loads", NOTHING_TO_DO, "skipped")
COUNTING = {str(s) for s in Severity if s.counts}


class Verdict(NamedTuple):
    """What one range of releases makes of a model."""

    first: str
    last: str
    verdict: str
    codes: tuple[str, ...]


class Row(NamedTuple):
    """What matters of a model's line."""

    model: str
    commit: str | None
    made_by: tuple[str, str]  # bnbfix, target
    verdict: str  # one of VERDICTS
    because: str
    releases: tuple[Verdict, ...]
    exit_code: int
    url: str | None = None  # of the pull request

    @property
    def kind(self) -> str | None:
        """Whether it is of a scan or of a repair; None where there was nothing to scan or repair."""
        return "repair" if self.verdict in (REPAIRED, NOTHING_TO_DO) else "scan" if self.releases else None

    def finished(self, target: str) -> bool:
        """Whether the model need not be done again, as long as its commit is the same."""
        return self.commit is not None and self.verdict != "error" and self.made_by == (__version__, target)


def read_row(document: Mapping[str, Any]) -> Row:
    """The row of a document; raises KeyError, TypeError or AttributeError where it is none."""
    common = document["model"], document["commit"], (document["bnbfix"], document["target"])
    if (error := document.get("error")) is not None:
        code = error["exit_code"]
        return Row(*common, "skipped" if code == NOTHING_TO_CHECK else "error", error["message"], (), code)
    if "nothing_to_do" in document:
        pushed = document["pushed"]
        return Row(*common, REPAIRED if pushed else NOTHING_TO_DO, "", (), CLEAN, pushed and pushed["url"])
    releases = [Verdict(r["first"], r["last"], r["verdict"], tuple(r["codes"])) for r in document["releases"]]
    codes = sorted({f["code"] for f in document["findings"] if f["severity"] in COUNTING})
    code = BROKEN if str(Code.QUANT_STATE) in codes else FINDINGS if codes else CLEAN
    return Row(*common, document["verdict"], " ".join(codes), tuple(releases), code)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file of results of scans, by model. Raises UsageError where it cannot be read, or is none."""
    try:
        with path.open("rb") as file:
            return {row.model: row for row, _, _ in _read_lines(file, path, "scan")}
    except OSError as e:
        raise UsageError(f"cannot be read ({e.strerror})", where=str(path)) from e


def _read_lines(file: IO[bytes], path: Path, kind: str) -> Iterator[tuple[Row, int, int]]:
    """(row, offset, length) of each line. A last one that was not written whole is left out."""
    at = 0
    for number, line in enumerate(file, 1):
        if line.startswith(b'{"schema"') and not line.endswith(b"\n"):
            return
        try:
            row = read_row(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            words = f"line {number} is not a result of `bnbfix fleet`"
            raise UsageError(words, where=str(path), hint="Name another file.") from None
        if row.kind not in (kind, None):
            raise UsageError(f"holds results of a {row.kind}", where=str(path), hint="Name another file.")
        yield row, at, len(line)
        at += len(line)


class Results:
    """A file of results of scans or of repairs, locked against a second driver, to which lines are added."""

    def __init__(self, path: Path, kind: str) -> None:
        """Raises UsageError where the file holds something else, or another fleet is writing to it."""
        self.path, self.rows = path, dict[str, Row]()
        self._lines: dict[str, tuple[int, int]] = {}
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | syscalls.open_flags("CLOEXEC"), 0o666), "r+b")
        except OSError as e:
            raise OutputError(f"cannot be written ({e.strerror})", where=str(path)) from e
        try:
            if not syscalls.lock(self._file.fileno()):
                raise UsageError("another fleet is writing to it", where=str(path), hint="Wait for it to end.")
            end = 0
            for row, at, length in _read_lines(self._file, path, kind):
                self.rows[row.model], self._lines[row.model] = row, (at, length)
                end = at + length
            self._file.truncate(end)
        except BaseException:  # an interrupt too, raised again
            self._file.close()
            raise

    def add(self, line: str) -> Row:
        """Write the line of a model, in place of any that it has."""
        data = line.encode() + b"\n"
        row, at = read_row(json.loads(line)), self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as e:
            raise OutputError(f"cannot be written ({e.strerror})", where=str(self.path)) from e
        self.rows[row.model], self._lines[row.model] = row, (at, len(data))
        return row

    def sort(self, models: Iterable[str]) -> None:
        """Replace the file by one with a line for each model, these first: it then depends on no worker's speed."""
        order = dict.fromkeys([*(m for m in models if m in self._lines), *sorted(self._lines)])
        write_file(self.path, (self._read(*self._lines[model]) for model in order))

    def _read(self, at: int, length: int) -> str:
        self._file.seek(at)
        return self._file.read(length).decode().rstrip("\n") + "\n"

    def close(self) -> None:
        """Release the lock."""
        self._file.close()
