"""A checkpoint on the Hugging Face Hub, read by byte ranges.

Settings are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN or a stored login, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE.
How long an answer may take is in limits.py.

What a scan reads: the listing, config.json and the index whole, the first 128 KiB of each shard, the rest of a header
that is longer, and the JSON of each quant state. Quant states are stored between quantized weights of many MB, so each
is a request of its own, except in small models: about 10 + 2 for each shard + 1 for each quantized weight, some 600
for a 31B model with a quantized vision tower, and far below 1% of the bytes. Several ranges in one request would be
fewer, but the storage behind the Hub does not serve those.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in __all__

from ..__version__ import __version__
from ..checkpoint.source import IGNORED_DIRS, LocalSource, Progress, read_ranges
from ..errors import HubError, InputError
from .byte_ranges import MergedRange, check_file_name, content_range_error, merge_ranges, resolve_redirect, url_origin
from .client import (
    RetryableError,
    abort_xet,
    bound_answers,
    check_deadline,
    counting_bar,
    describe_request,
    error_from_response,
    guard_session,
    hub_error,
    redact_token,
    retry,
    stopping_trace,
    wrap_errors,
)
from .limits import answer_limit, byte_limit
from .parallel import current_stop, run_parallel

WORKERS = 16  # requests at a time
REDIRECTS = 10
KEPT = 1 << 20  # bytes; shorter reads are kept in memory, since a plan reads headers and quant states again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubSource:
    """A model repo at one commit. Files in the local Hub cache, or fetched since, are read from there."""

    repo: str
    revision: str  # sha of the commit that every read is pinned to
    name: str
    files: Mapping[str, int] = field(repr=False)
    sha256: Mapping[str, str] = field(repr=False, default_factory=dict)  # of files stored with LFS or Xet
    _all_files: Mapping[str, int] = field(repr=False, default_factory=dict)  # with those in subfolders
    _paths: dict[str, Path] = field(repr=False, default_factory=dict)  # of files on this machine
    _urls: dict[str, str] = field(repr=False, default_factory=dict)  # where redirects led; signed, so never shown
    _etags: dict[tuple[str, str], str] = field(repr=False, default_factory=dict)
    _kept: dict[tuple[str, int, int], bytes] = field(repr=False, default_factory=dict)

    @classmethod
    def open(cls, repo: str, revision: str | None = None) -> HubSource:
        """Ask the Hub for the commit and its files; offline, the local cache. Raises HubError, UsageError."""
        name = f"{repo}@{revision}" if revision else repo

        def get_info() -> ModelInfo | None:
            try:
                with bound_answers():
                    return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=byte_limit())
            except OfflineModeIsEnabled:
                return None

        asked = describe_request(repo, revision)
        with wrap_errors(asked):
            info = retry(get_info, asked)
        if info is None:
            return cls._open_cached(repo, revision, name)
        if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
            raise HubError("the Hub names no commit", where=repo, hint="Is HF_ENDPOINT a Hub?")
        files: dict[str, int] = {}
        hashes: dict[str, str] = {}
        with wrap_errors(asked):  # names may be no strings
            for listed in sorted(info.siblings or (), key=lambda s: s.rfilename):
                if not set(IGNORED_DIRS).isdisjoint(listed.rfilename.split("/")):
                    continue
                files[check_file_name(listed.rfilename, repo)] = _listed_size(listed, repo)
                if listed.lfs is not None:
                    hashes[listed.rfilename] = listed.lfs.sha256
        logger.info("%s: commit %s, %d files", name, info.sha, len(files))
        return cls(repo, info.sha, name, _top_level(files), hashes, files)

    @classmethod
    def _open_cached(cls, repo: str, revision: str | None, name: str) -> HubSource:
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(found, str):
            raise HubError(
                "offline mode is on (HF_HUB_OFFLINE), and the local cache does not have it",
                where=name,
                hint="Unset HF_HUB_OFFLINE, or fetch it while online.",
                command=f"HF_HUB_OFFLINE=0 hf download {repo}",
            )
        folder = LocalSource.open(Path(found).parent).with_subfolders()
        logger.info("%s: offline, commit %s from the local cache", name, folder.path.name)
        # The cache itself makes no links that lead elsewhere.
        files = {f: size for f, size in folder.files.items() if f not in folder.external_links}
        paths = {f: folder.path / f for f in files}
        # The cache names a file by its SHA-256 where the Hub listed one, else by git's SHA-1.
        hashes = {f: blob for f, path in paths.items() if re.fullmatch("[0-9a-f]{64}", blob := path.resolve().name)}
        return cls(repo, folder.path.name, name, _top_level(files), hashes, files, paths)

    def with_subfolders(self) -> HubSource:
        return replace(self, files=self._all_files or self.files)

    @property
    def fingerprint(self) -> str:
        return self.revision

    def check_copyable(self, files: Iterable[str]) -> None:
        """Every file of a repo is a regular one."""

    def check_unchanged(self) -> None:
        """A commit does not change; what a server sends is checked as it arrives."""

    @property
    def origin(self) -> Mapping[str, str]:
        return {"repo": self.repo, "revision": self.revision}

    @property
    def store(self) -> Path:
        """The Hub's cache."""
        return Path(constants.HF_HUB_CACHE)

    def read(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.read_many({file: ranges})[file]

    def read_many(self, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[bytes]]:
        """Read ranges in parallel; raises HubError when the Hub refuses, keeps failing, or sends something else."""
        out: dict[str, list[bytes]] = {file: [b""] * len(ranges) for file, ranges in wanted.items()}
        jobs: list[tuple[str, MergedRange]] = []
        for file, ranges in wanted.items():
            if (path := self.local_path(file)) is not None:
                out[file] = read_ranges(path, ranges, file)
                continue
            missing = []
            for i, (offset, length) in enumerate(ranges):
                if offset + length > self.files[file]:
                    raise InputError(f"ended at byte {self.files[file]:,} while it was being read", where=file)
                known = self._kept.get((file, offset, length)) if length else b""
                if known is None:
                    missing.append((i, offset, length))
                else:
                    out[file][i] = known
            for merged in merge_ranges([(offset, length) for _, offset, length in missing]):
                members = tuple((missing[index][0], at, n) for index, at, n in merged.members)
                jobs.append((file, MergedRange(merged.offset, merged.length, members)))
        if jobs:
            logger.debug("%s: %d requests for ranges", self.repo, len(jobs))
        for (file, merged), data in zip(jobs, self._fetch_ranges(jobs), strict=True):
            for i, part in merged.split(data):
                out[file][i] = part
                if len(part) < KEPT:
                    self._kept[(file, *wanted[file][i])] = part
        return out

    def local_path(self, file: str) -> Path | None:
        """Return the path of a file on this machine: in the Hub cache, of this commit, or where it was fetched to."""
        if file not in self._paths:
            found = try_to_load_from_cache(self.repo, file, revision=self.revision)
            if not isinstance(found, str) or os.path.getsize(found) != self.files[file]:
                return None
            self._paths[file] = Path(found)
        return self._paths[file]

    def fetch(self, file: str, folder: Path | None = None, step: Progress = lambda n: None) -> None:
        """Download a whole file of this commit to the Hub cache, or to `folder`. Raises HubError.

        `step` is called with the number of bytes that just arrived.
        """
        if (path := self.local_path(file)) is not None:
            logger.info("%s: on this machine already, at %s", file, path)
            return
        asked = describe_request(self.repo, self.revision, file)

        def download() -> str:
            current_stop().on_interrupt.append(abort_xet)
            with guard_session():
                return hf_hub_download(
                    self.repo, file, revision=self.revision, local_dir=folder, tqdm_class=counting_bar(step)
                )

        try:
            with wrap_errors(asked, (RuntimeError, ValueError)):
                found = Path(retry(download, asked))
        except (OSError, RuntimeError, ValueError) as e:  # no space, a wrong length; hf_xet when it gives up
            reason = redact_token(str(getattr(e, "strerror", None) or e))
            raise HubError(f"cannot be downloaded ({reason})", where=asked.where) from None
        if (size := found.stat().st_size) != self.files[file]:
            raise HubError(f"came with {size:,} bytes of {self.files[file]:,}", where=asked.where)
        logger.info("%s: downloaded %d bytes to %s", file, size, found)
        self._paths[file] = found

    def forget(self, file: str, folder: Path) -> None:
        """Delete what `fetch` put into `folder`; the cache stays unchanged."""
        if (path := self._paths.get(file)) is not None and folder.resolve() in path.resolve().parents:
            del self._paths[file]
            path.unlink()

    def _fetch_ranges(self, jobs: Sequence[tuple[str, MergedRange]]) -> list[bytes]:
        if len(jobs) < 2:
            return [self._fetch_range(job) for job in jobs]
        return run_parallel(self._fetch_range, jobs, WORKERS, name="bnbfix-hub")

    def _fetch_range(self, job: tuple[str, MergedRange]) -> bytes:
        file, merged = job
        asked = describe_request(self.repo, self.revision, file)
        with wrap_errors(asked):
            return retry(lambda: self._try_range(file, merged.offset, merged.length), asked)

    def _try_range(self, file: str, offset: int, length: int) -> bytes:
        """Make one try. Redirects are followed by hand, so that the token stays with the Hub's own origin."""
        home = hf_hub_url(self.repo, file, revision=self.revision)
        known = self._urls.get(file)
        url = known or home
        for _ in range(REDIRECTS):
            at_home = url_origin(url) == url_origin(home)
            headers = build_hf_headers(
                token=None if at_home else False, library_name="bnbfix", library_version=__version__
            )
            headers |= {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
            asked = describe_request(self.repo, self.revision, file)
            with get_session().stream(
                "GET",
                url,
                headers=headers,
                follow_redirects=False,
                timeout=byte_limit(),
                extensions={"trace": stopping_trace()},
            ) as answer:
                if answer.status_code in (301, 302, 303, 307, 308):
                    self._check_headers(file, answer.headers)
                    url = resolve_redirect(url, answer.headers.get("Location", ""), asked.where)
                    continue
                if answer.status_code in (200, 206):
                    if at_home:
                        self._check_headers(file, answer.headers)
                    data = self._read_body(file, offset, length, answer, urlsplit(url).netloc.rpartition("@")[2])
                    self._urls[file] = url
                    return data
                # A signed URL expires after a while: ask the Hub for another.
                if url == known and answer.status_code in (400, 401, 403, 404, 410):
                    self._urls.pop(file, None)
                    raise RetryableError(hub_error(answer.status_code, None, asked), 0)
                raise error_from_response(answer, asked)
        raise HubError(f"redirects more than {REDIRECTS} times", where=asked.where)

    def _check_headers(self, file: str, headers: Mapping[str, str]) -> None:
        """Raise HubError when the headers of the Hub describe another file than the one listed."""
        where = f"{self.repo}: {file}"
        commit, size = headers.get("X-Repo-Commit"), headers.get("X-Linked-Size")
        etag = (headers.get("X-Linked-ETag") or "").removeprefix("W/").strip('"')
        if commit and commit != self.revision:
            raise HubError(f"the Hub answers with commit {commit[:12]}, not {self.revision[:12]}", where=where)
        if (size and size != str(self.files[file])) or (etag and etag != self.sha256.get(file, etag)):
            raise HubError("changed on the Hub while it was being read", where=where, hint="Run it again.")

    def _read_body(self, file: str, offset: int, length: int, answer: Any, host: str) -> bytes:
        where, size = f"{self.repo}: {file}", self.files[file]
        if answer.status_code == 200 and length != size:
            raise HubError(
                f"{host} ignores byte ranges (HTTP 200) and would send all {size:,} bytes",
                where=where,
                hint="Is a proxy or a mirror (HF_ENDPOINT) between you and the Hub? Download the model instead.",
            )
        if answer.status_code == 206 and (
            why := content_range_error(answer.headers.get("Content-Range"), offset, length, size)
        ):
            raise HubError(f"{host} {why}", where=where, hint="Run it again; a proxy or a mirror may be broken.")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{host} compresses byte ranges, so they cannot be used", where=where)
        etag = answer.headers.get("ETag")
        if etag and self._etags.setdefault((file, host), etag) != etag:
            raise HubError("changed on the Hub while it was being read", where=where, hint="Run it again.")
        data, deadline = bytearray(), time.monotonic() + answer_limit()
        for chunk in answer.iter_raw():
            current_stop().check()
            check_deadline(deadline, where)
            data += chunk
            if len(data) > length:
                raise HubError(f"{host} sends more than the {length:,} requested bytes", where=where)
        if len(data) < length:
            raise HubError(f"{host} sent {len(data):,} of the {length:,} requested bytes", where=where)
        return bytes(data)


def _top_level(files: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType({name: size for name, size in files.items() if "/" not in name})


def _listed_size(listed: Any, repo: str) -> int:
    size = listed.lfs.size if listed.lfs is not None else listed.size
    if type(size) is not int or size < 0:
        raise HubError("the Hub does not say how large it is", where=f"{repo}: {listed.rfilename}")
    return size
