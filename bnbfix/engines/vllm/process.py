"""Runs `inside/` under a Python that has vLLM, in a process of its own, with bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import EngineError, UsageError

INSIDE = Path(__file__).parent / "inside"
MAX_ANSWER = 64_000_000  # bytes
POLL_SECONDS = 0.1
Status = Callable[[str], None]  # called with what the worker is doing
logger = logging.getLogger(__name__)


def run_worker(
    what: str,
    folders: Sequence[Path],
    *,
    seconds: float,
    python: str | None = None,
    max_memory: int | None = None,
    status: Status | None = None,
) -> list[dict[str, Any]]:
    """Has the vLLM of a Python look at folders, and returns its answer to each.

    Args:
        what: probe, load or dry_load.
        seconds: How long all of it may take.
        python: The interpreter that has vLLM; this one by default. Nothing of bnbfix has to be installed there.
        max_memory: Bytes of RAM that the process may hold (Linux only).
        status: Called with what the process is doing, whenever that changes.

    Raises:
        UsageError: There is no such interpreter, or it has no vLLM.
        EngineError: No answer, or none that makes sense.
    """
    with scratch_folder() as scratch:
        package, log, status_file = (Path(scratch) / name for name in ("bnbfix_worker", "log", "status"))
        answers = [Path(scratch) / f"answer-{i}.json" for i in range(len(folders))]
        shutil.copytree(INSIDE, package, ignore=shutil.ignore_patterns("__pycache__"))
        command = [python or sys.executable, "-m", package.name, what]
        for folder, answer in zip(folders, answers, strict=True):
            command += [str(folder.resolve()), str(answer)]
        logger.info("asking vLLM: %s", " ".join(command))
        try:
            with log.open("wb") as out:
                process = subprocess.Popen(  # noqa: S603  # our own module, under the interpreter that the user names
                    command,
                    stdin=subprocess.PIPE,  # nothing is written to it: its end tells the worker that this process ended
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=scratch,
                    env=os.environ | {"BNBFIX_STATUS": str(status_file)},
                    start_new_session=True,
                )
        except OSError as e:
            raise UsageError(f"cannot be run ({e.strerror})", where=command[0]) from e
        try:
            _wait(process, folders[0], seconds, max_memory, status_file, status)
        finally:
            _end(process)
        found = zip(folders, answers, strict=True)
        return [_read_answer(answer, log, process.returncode, folder) for folder, answer in found]


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A temporary folder. Raises EngineError when there is none, or it cannot be written to."""
    try:
        with tempfile.TemporaryDirectory(prefix="bnbfix-", ignore_cleanup_errors=True) as folder:
            yield folder
    except OSError as e:
        hint = "vLLM is asked through a temporary folder: set TMPDIR to one that can be written to."
        reason = e.args[0][0][2] if isinstance(e, shutil.Error) else e.strerror or e  # of the first of many files
        raise EngineError(f"cannot be asked ({reason})", where="vLLM", hint=hint) from e


def _wait(
    process: subprocess.Popen[bytes],
    folder: Path,
    seconds: float,
    max_memory: int | None,
    status_file: Path,
    status: Status | None,
) -> None:
    deadline, last = time.monotonic() + seconds, ""
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise EngineError(f"vLLM gave no answer within {seconds:,.0f} s", where=str(folder))
        if max_memory is not None and (held := _resident_bytes(process.pid)) > max_memory:
            message = f"vLLM holds {held / 1e9:,.1f} GB of memory, above the limit of {max_memory / 1e9:,.1f} GB"
            raise EngineError(message, where=str(folder), hint="Is config.json the one of this model?")
        if status is not None and status_file.exists() and (now := status_file.read_text()) not in ("", last):
            status(now)
            last = now
        time.sleep(POLL_SECONDS)


def _resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, with everything it started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _read_answer(answer: Path, log: Path, returncode: int, folder: Path) -> dict[str, Any]:
    if not answer.exists():
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        killed = returncode < 0
        hint = "It was killed; was there too little memory?" if killed else "".join(tail)[:300] or None
        raise EngineError(f"vLLM ended with status {returncode} and no answer", where=str(folder), hint=hint)
    if (size := answer.stat().st_size) > MAX_ANSWER:
        raise EngineError(f"vLLM's answer has {size:,} bytes, above the limit of {MAX_ANSWER:,}", where=str(folder))
    try:
        found = json.loads(answer.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise EngineError(f"vLLM's answer is not JSON ({e})", where=str(folder)) from e
    if not isinstance(found, dict) or not isinstance(found.get("versions"), dict) or "error" not in found:
        raise EngineError("vLLM's answer lacks versions or error", where=str(folder))
    return found
