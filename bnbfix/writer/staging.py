"""Where an output appears: checked beforehand, staged next to it under a lock, published by one rename.

When the staging folder of an interrupted run belongs to the same plan, its finished files are kept if their hashes are
right. Otherwise the folder is cleared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..checkpoint.source import LocalSource, Source
from ..errors import OutputError, UsageError
from ..planner.plan import JOURNAL, Plan
from . import syscalls
from .tensor_data import CHUNK_BYTES

logger = logging.getLogger(__name__)
SLACK_BYTES = 16 << 20  # of disk, needed beyond the output: directories, the record, rounding to blocks


def check_destination(source: Source, out: Path, *, overwrite: bool) -> None:
    """Raises UsageError when `out` touches the source, or exists and is not an empty directory."""
    target = Path(os.path.abspath(out))
    if isinstance(source, LocalSource):
        if _holds(source.path, target) or _holds(target, source.path):
            raise UsageError("the output must be outside the source, and the source outside the output", where=str(out))
        for scratch in (*_scratch(resolve_output(out)), fetched_folder(out)):
            if _holds(scratch, source.path):
                raise UsageError(
                    f"is in {scratch.name}, which a repair to {out} deletes",
                    where=source.name,
                    hint="Rename it, or choose another output folder.",
                )
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError("exists and is not a folder", where=str(out))
    if not overwrite and next(os.scandir(target), None) is not None:
        raise UsageError(
            "exists and is not empty",
            where=str(out),
            hint="Choose another output folder, or replace this one with --overwrite (overwrite=True).",
            command="--overwrite",
        )
    if target.parent == target:
        raise UsageError("is the root, which cannot be replaced", where=str(out))


def _holds(outer: Path, inner: Path) -> bool:
    """Is `outer` the same folder as `inner`, or above it? By inode too: a mount gives a folder two names, and so does
    the case of letters on some file systems.
    """
    outer, inner = (Path(os.path.realpath(p)) for p in (outer, inner))
    folders = (inner, *inner.parents)
    return outer in folders or (outer.exists() and any(p.exists() and outer.samefile(p) for p in folders))


def disk_space(plan: Plan, out: Path) -> tuple[int, int]:
    """(bytes needed, bytes free) on the disk of `out`. Files of an interrupted repair count as free space."""
    folder = unfinished(out)
    left = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder else 0
    return plan.bytes_written + SLACK_BYTES, shutil.disk_usage(existing_parent(out)).free + left


def resolve_output(out: Path) -> Path:
    """The path that staging is renamed to: of a symlink, its target."""
    return Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))


def _scratch(out: Path) -> tuple[Path, Path]:
    """The folders next to an output that a repair makes and deletes: for the new output, and for the replaced one."""
    return out.with_name(f".{out.name}.bnbfix-partial"), out.with_name(f".{out.name}.bnbfix-old")


def fetched_folder(out: Path) -> Path:
    """The folder next to an output for files that are downloaded shard by shard; deleted as the others are."""
    return resolve_output(out).with_name(f".{resolve_output(out).name}.bnbfix-source")


def existing_parent(path: Path) -> Path:
    """The folder that `path` will be in, or the nearest one above that exists."""
    path = Path(os.path.realpath(path)).parent
    while not path.exists():
        path = path.parent
    return path


def unfinished(out: Path) -> Path | None:
    """The folder in which an interrupted repair to `out` left finished files; None if there is none."""
    folder, _ = _scratch(resolve_output(out))
    return folder if folder.is_dir() else None


def lock_directory(path: Path, out: Path) -> int | None:
    """Makes a folder next to `out`, if there is none, and locks it until the file descriptor returned is closed.

    None where folders cannot be locked. Raises UsageError while another repair holds it.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        try:
            fd = syscalls.open_folder(path, follow=False)
        except FileNotFoundError:
            continue  # published or deleted by another repair between the two calls
        if fd is None:
            return None
        try:
            locked = syscalls.lock(fd)
            if locked and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            locked = True  # published or deleted by another repair between the two calls
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        if not locked:
            hint = "Wait for it, or choose another output folder."
            raise UsageError("another repair is writing there", where=str(out), hint=hint)


def unlock_directory(lock: int | None) -> None:
    """Releases what `lock_directory` returned."""
    if lock is not None:
        os.close(lock)


class Staging:
    """The folder that grows next to an output, locked against a second repair to the same output.

    `kept` has the SHA-256 of each finished file of an interrupted run of the same plan; these are not written again.
    """

    def __init__(self, out: Path, plan_digest: str) -> None:
        """Makes the folder, or resumes the one that is there. Raises UsageError while another repair holds it."""
        self.out = resolve_output(out)
        self.path, self._old = _scratch(self.out)
        self._digest = plan_digest
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink() or self.path.is_file():
            self.path.unlink()
        self._lock = lock_directory(self.path, self.out)
        try:
            self._resume()
        except BaseException:  # an interrupt too: the lock must not outlive this object
            self.discard()
            self.close()
            raise

    def _resume(self) -> None:
        """Keeps what belongs to this plan, deletes the rest, and starts a new journal."""
        if not os.path.lexists(self.out) and self._old.is_dir():
            self._old.rename(self.out)  # an earlier run was killed between its two renames
            logger.info("put back %s, which a killed repair had moved to %s", self.out, self._old)
        self.kept = dict(self._journaled())
        self.has_resumable_files = bool(self.kept)  # is there anything in it that the next run could use?
        if self.kept:
            logger.info("resuming an interrupted repair: %d finished files in %s", len(self.kept), self.path)
        for entry in os.scandir(self.path):
            if entry.name not in self.kept:
                logger.debug("deleting %s of an interrupted repair", entry.path)
                clear(Path(entry.path))
        self._note({"plan": self._digest}, *({"file": n, "sha256": h} for n, h in self.kept.items()))

    def _journaled(self) -> Iterator[tuple[str, str]]:
        """Finished files of an earlier run of the same plan that match the journal; only those of the top level."""
        plan, files = _read_journal(self.path)
        for name, want in files.items() if plan == self._digest else ():
            path = self.path / name
            if name == os.path.basename(name) and name != JOURNAL and _sha256(path) == want:
                yield name, want

    def finished(self, name: str, sha256: str) -> None:
        """Notes that a file is whole and flushed."""
        self._note({"file": name, "sha256": sha256}, append=True)
        self.has_resumable_files = True

    def _note(self, *rows: Mapping[str, str], append: bool = False) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        flags = syscalls.open_flags("WRONLY", "CREAT", "CLOEXEC", "NOFOLLOW", "APPEND" if append else "TRUNC")
        fd = os.open(self.path / JOURNAL, flags, 0o666)
        try:
            os.write(fd, text.encode("utf-8", "surrogateescape"))
        finally:
            os.close(fd)

    def publish(self, files: Collection[str], *, overwrite: bool) -> None:
        """Makes the folder the output. An old output is removed only once the new one is in its place and synced.

        Without `overwrite` the rename itself refuses a folder that is not empty, which another process may have filled.

        Raises OutputError when other files than `files` are in it: somebody else put them there.
        """
        there = {os.path.relpath(os.path.join(at, n), self.path) for at, _, names in os.walk(self.path) for n in names}
        if strangers := sorted(there - {*files, JOURNAL}):
            raise OutputError("was put into the output by another program", where=str(self.path / strangers[0]))
        (self.path / JOURNAL).unlink()
        fsync_tree(self.path)
        leftover: Path | None = None
        if not overwrite or not os.path.lexists(self.out):
            syscalls.rename_folder(self.path, self.out)
        elif syscalls.exchange(self.path, self.out):
            leftover = self.path
        else:
            leftover = self._old
            clear(leftover)
            self.out.rename(leftover)
            try:
                self.path.rename(self.out)
            except BaseException:  # an interrupt too: the old output goes back to its place
                leftover.rename(self.out)
                raise
        try:
            syscalls.fsync_folder(self.out.parent)
            logger.info("published %s", self.out)
        except BaseException:  # an interrupt too: an output that may not survive a power cut is not published
            self._unpublish(leftover)
            raise
        if leftover is not None:
            with contextlib.suppress(OSError, KeyboardInterrupt):  # too late to interrupt: the output is there
                clear(leftover)

    def _unpublish(self, leftover: Path | None) -> None:
        if leftover == self.path:
            syscalls.exchange(self.path, self.out)
            return
        self.out.rename(self.path)
        if leftover is not None:
            leftover.rename(self.out)

    def discard(self) -> None:
        """Removes the folder and what is in it, unless another repair has replaced it."""
        with contextlib.suppress(OSError):
            if self._lock is None or os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                clear(self.path)
                logger.info("discarded %s", self.path)

    def close(self) -> None:
        """Releases the lock."""
        unlock_directory(self._lock)


def _read_journal(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The plan whose finished files are in a folder, and their hashes; None and nothing for what is not a journal."""
    try:
        if not stat.S_ISREG(os.lstat(folder / JOURNAL).st_mode):
            return None, {}
        first, *lines = (folder / JOURNAL).read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut
        return str(json.loads(first)["plan"]), {str(row["file"]): str(row["sha256"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, {}


def stale_bytes(out: Path, plan_digest: str) -> int:
    """Bytes of finished files next to `out`, of an interrupted repair by another plan: the next one deletes them."""
    folder = unfinished(out)
    plan, files = _read_journal(folder) if folder is not None else (plan_digest, {})
    if folder is None or plan == plan_digest:
        return 0
    return sum((folder / name).stat().st_size for name in files if (folder / name).is_file())


@contextlib.contextmanager
def wrap_write_errors(out: Path) -> Iterator[None]:
    """Raises OutputError for an OSError of the block, and where the system starts no thread."""
    try:
        yield
    except RuntimeError as e:
        if "new thread" not in str(e):  # threading has no type for it
            raise
        hint = "Is the number of processes, or memory, limited (ulimit -u, ulimit -v, a container)?"
        raise OutputError("cannot be written (no thread can be started)", where=str(out), hint=hint) from e
    except OSError as e:
        raise OutputError(f"cannot be written ({e.strerror or e})", where=str(e.filename2 or e.filename or out)) from e


def fsync_tree(root: Path) -> None:
    """Flushes a folder and those inside it, innermost first."""
    for folder, _, _ in os.walk(root, topdown=False):
        syscalls.fsync_folder(folder)


def clear(path: Path) -> None:
    """Removes a file, a link or a whole folder; a link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _sha256(path: Path) -> str | None:
    """Of a regular file; None of anything else."""
    try:
        fd = os.open(path, syscalls.open_flags("RDONLY", "CLOEXEC", "NOFOLLOW", "NONBLOCK"))
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        digest = hashlib.sha256()
        while data := os.read(fd, CHUNK_BYTES):
            digest.update(data)
        return digest.hexdigest()
    except OSError:
        return None
    finally:
        os.close(fd)
