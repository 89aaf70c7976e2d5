"""Compares the files of a repo with the SHA-256 that the Hub lists for them, while they are read anyway."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from ..checkpoint.source import Source, as_remote, open_regular
from ..errors import HubError, InputError, OutputError
from .background import HASH_BYTES, STOPPED


class SourceHashes:
    """Each file of a source is hashed once at most, on a thread next to the one that reads it: from memory, mostly.

    Files that the Hub lists without a SHA-256, and those of a folder, count as right.
    """

    def __init__(self, source: Source, stop: threading.Event) -> None:
        self._source, self._remote, self._stop = source, as_remote(source), stop
        self._listed = self._remote.sha256 if self._remote is not None else {}
        self._pool = ThreadPoolExecutor(2, "bnbfix-source")
        self._begun: dict[str, Future[str]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, files: Iterable[str]) -> None:
        """Start to hash files, which may be deleted from now on."""
        for file in files:
            path = self._source.local_path(file) if file in self._listed else None
            with self._lock:
                if path is not None and file not in self._begun:
                    self._begun[file] = self._pool.submit(self._hash, open_regular(path, file), file)

    def check(self, files: Iterable[str]) -> None:
        """Wait for the hashes of files. Raises HubError when one is not what the Hub lists."""
        for file in files:
            if (begun := self._begun.get(file)) is not None:
                self.compare(file, begun.result())

    def compare(self, file: str, digest: str) -> None:
        """Raise HubError when the hash of a whole file of the source is not what the Hub lists."""
        if (listed := self._listed.get(file, digest)) == digest:
            return
        path, hint = self._source.local_path(file), "Run it again."
        if path is not None and self._remote is not None and self._remote.store in path.parents:
            hint = f"Delete {os.path.realpath(path)}, and run it again."
        what = f"has SHA-256 {digest[:12]}... where the Hub lists {listed[:12]}...: it was damaged on the way, or since"
        raise HubError(what, where=file, hint=hint)

    def _hash(self, fd: int, file: str) -> str:
        digest = hashlib.sha256()
        try:
            while data := os.read(fd, HASH_BYTES):
                if self._stop.is_set():
                    raise OutputError(STOPPED)
                digest.update(data)
        except OSError as e:
            raise InputError(f"cannot be read ({e.strerror})", where=file) from e
        finally:
            os.close(fd)
        return digest.hexdigest()
