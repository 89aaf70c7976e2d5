"""Files of a repo that are hashed next to their reading: what stops that, and what cannot be read."""

from __future__ import annotations

import hashlib
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bnbfix.checkpoint.source import LocalSource
from bnbfix.errors import HubError, InputError, OutputError
from bnbfix.writer.source_hashes import SourceHashes


@dataclass(frozen=True)
class Listed(LocalSource):
    """A folder that says that it is a repo, of which the Hub lists one hash for every file."""

    digest: str = ""

    @property
    def origin(self) -> Any:
        return {"repo": "org/name", "revision": "0" * 40}

    @property
    def sha256(self) -> dict[str, str]:
        return dict.fromkeys(self.files, self.digest)

    @property
    def store(self) -> Path:
        return Path("/nowhere")


def listed(folder: Path, digest: str) -> Listed:
    return Listed(**vars(LocalSource.open(folder)), digest=digest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"data")
    return tmp_path


def test_a_hash_is_compared_with_the_listed_one(folder: Path) -> None:
    right = hashlib.sha256(b"data").hexdigest()
    with SourceHashes(listed(folder, right), threading.Event()) as hashes:
        hashes.begin(["file"])
        hashes.check(["file", "another"])
    with SourceHashes(listed(folder, "0" * 64), threading.Event()) as hashes:
        hashes.begin(["file"])
        with pytest.raises(HubError, match=f"file: has SHA-256 {right[:12]}"):
            hashes.check(["file"])


def test_hashing_ends_where_the_rest_has_stopped(folder: Path) -> None:
    stop = threading.Event()
    stop.set()
    with SourceHashes(listed(folder, ""), stop) as hashes:
        hashes.begin(["file"])
        with pytest.raises(OutputError, match="stopped"):
            hashes.check(["file"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a regular file that cannot be read is in /proc")
def test_a_file_that_cannot_be_read_is_an_input_error(folder: Path) -> None:
    source = listed(folder, "")
    (folder / "file").unlink()
    (folder / "file").symlink_to("/proc/self/mem")  # its first page is never there
    with SourceHashes(source, threading.Event()) as hashes:
        hashes.begin(["file"])
        with pytest.raises(InputError, match=r"file: cannot be read \(Input/output error\)"):
            hashes.check(["file"])
