"""A checkpoint on the Hugging Face Hub, read by byte ranges.

Its settings are huggingface_hub's own: HF_ENDPOINT, HF_TOKEN or a stored login, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE.

What a scan reads: the listing, config.json and the index whole, the first 128 KiB of each shard, the rest of a header
that is longer, and the JSON of each quant state. Quant states lie between quantized weights of many MB, so each is a
request of its own, but for those of small models: about 10 + 2 for each shard + 1 for each quantized weight altogether,
some 600 for 31B with its tower quantized, and far below 1% of the bytes. Several ranges in one request would be fewer, but
the storage behind the Hub does not serve those.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
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
from ..checkpoint.source import IGNORED_DIRS, LocalSource, open_regular, read_exactly
from ..errors import HubError, InputError
from .byte_ranges import MergedRange, content_range_error, merge_ranges, resolve_redirect, safe_name, url_origin
from .client import (
    RetryableError,
    counting,
    describe_request,
    error_from_response,
    guard_cache,
    redact_token,
    retry,
    wrap_errors,
)
from .refusals import hub_error

WORKERS = 16  # requests at a time
TIMEOUT = 15.0  # seconds without a byte
REDIRECTS = 10
CHUNK = 64 << 10
KEPT = 1 << 20  # bytes; what was read in shorter pieces is kept, since a plan reads headers and quant states again

T = TypeVar("T")


@dataclass(frozen=True)
class HubSource:
    """A model repo at one commit. Files in the local Hub cache, or fetched since, are read from there."""

    repo: str
    revision: str  # sha of the commit that every read is pinned to
    name: str
    files: Mapping[str, int] = field(repr=False)
    _hashes: Mapping[str, str] = field(repr=False, default_factory=dict)  # SHA-256 of what is stored as a large file
    _paths: dict[str, Path] = field(repr=False, default_factory=dict)  # of files that lie here
    _places: dict[str, str] = field(repr=False, default_factory=dict)  # where redirects led; not for eyes, it is signed
    _etags: dict[tuple[str, str], str] = field(repr=False, default_factory=dict)
    _kept: dict[tuple[str, int, int], bytes] = field(repr=False, default_factory=dict)

    @classmethod
    def open(cls, repo: str, revision: str | None = None) -> HubSource:
        """Asks the Hub for the commit and its files; offline, the local cache. Raises HubError, UsageError."""
        name = f"{repo}@{revision}" if revision else repo

        def look() -> ModelInfo | None:
            try:
                return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
            except OfflineModeIsEnabled:
                return None

        asked = describe_request(repo, revision)
        with wrap_errors(asked):
            info = retry(look, asked)
        if info is None:
            return cls._cached(repo, revision, name)
        if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
            raise HubError("the Hub names no commit", where=repo, hint="Is HF_ENDPOINT a Hub?")
        files, hashes = {}, {}
        with wrap_errors(asked):  # names may be no strings
            for sibling in sorted(info.siblings or (), key=lambda s: s.rfilename):
                if not set(IGNORED_DIRS).isdisjoint(sibling.rfilename.split("/")):
                    continue
                files[safe_name(sibling.rfilename, repo)] = _size(sibling, repo)
                if sibling.lfs is not None:
                    hashes[sibling.rfilename] = sibling.lfs.sha256
        return cls(repo, info.sha, name, MappingProxyType(files), hashes)

    @classmethod
    def _cached(cls, repo: str, revision: str | None, name: str) -> HubSource:
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(found, str):
            raise HubError(
                "offline mode is on (HF_HUB_OFFLINE), and the local cache does not have it",
                where=name,
                hint=f"Unset HF_HUB_OFFLINE, or fetch it while online: hf download {repo}",
            )
        folder = LocalSource.open(Path(found).parent)
        files = {
            f: size for f, size in folder.files.items() if f not in folder.external_links
        }  # the cache makes no others
        return cls(repo, folder.path.name, name, MappingProxyType(files), {}, {f: folder.path / f for f in files})

    @property
    def fingerprint(self) -> str:
        return self.revision

    def check_unchanged(self) -> None:
        """A commit does not change; what a server sends is checked as it comes."""

    @property
    def external_links(self) -> frozenset[str]:
        return frozenset()

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
        """Raises HubError when the Hub refuses, fails five times, or sends anything but what was asked for."""
        out: dict[str, list[bytes]] = {file: [b""] * len(ranges) for file, ranges in wanted.items()}
        jobs: list[tuple[str, MergedRange]] = []
        for file, ranges in wanted.items():
            if (path := self.local_path(file)) is not None:
                out[file] = _read_local(path, file, ranges)
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
            spans = merge_ranges([(offset, length) for _, offset, length in missing])
            for span in spans:
                members = tuple((missing[place][0], at, n) for place, at, n in span.members)
                jobs.append((file, MergedRange(span.offset, span.length, members)))
        for (file, span), data in zip(jobs, _in_parallel(self._fetch, jobs), strict=True):
            for i, part in span.cut(data):
                out[file][i] = part
                if len(part) < KEPT:
                    self._kept[(file, *wanted[file][i])] = part
        return out

    def local_path(self, file: str) -> Path | None:
        """Where a file lies on this machine, if it does: in the Hub cache, of this very commit, or fetched."""
        if file not in self._paths:
            found = try_to_load_from_cache(self.repo, file, revision=self.revision)
            if not isinstance(found, str) or os.path.getsize(found) != self.files[file]:
                return None
            self._paths[file] = Path(found)
        return self._paths[file]

    def fetch(self, file: str, folder: Path | None = None, step: Callable[[int], None] = lambda n: None) -> None:
        """Downloads a file of this commit whole: into the Hub cache, or into `folder`. Raises HubError.

        `step` is called with the number of bytes that just came.
        """
        if self.local_path(file) is not None:
            return
        asked = describe_request(self.repo, self.revision, file)
        guard_cache()
        try:
            with wrap_errors(asked, (RuntimeError, ValueError)):
                found = Path(
                    retry(
                        lambda: hf_hub_download(
                            self.repo, file, revision=self.revision, local_dir=folder, tqdm_class=counting(step)
                        ),
                        asked,
                    )
                )
        except (OSError, RuntimeError, ValueError) as e:  # no space, a wrong length; what hf_xet says when it gives up
            words = redact_token(str(getattr(e, "strerror", None) or e))
            raise HubError(f"cannot be downloaded ({words})", where=asked.where) from None
        if found.stat().st_size != self.files[file]:
            raise HubError(f"came with {found.stat().st_size:,} bytes of {self.files[file]:,}", where=asked.where)
        self._paths[file] = found

    def forget(self, file: str, folder: Path) -> None:
        """Deletes what `fetch` put into `folder`; what lies in the cache stays."""
        if (path := self._paths.get(file)) is not None and folder.resolve() in path.resolve().parents:
            del self._paths[file]
            path.unlink()

    def _fetch(self, job: tuple[str, MergedRange], stop: threading.Event) -> bytes:
        file, span = job
        asked = describe_request(self.repo, self.revision, file)
        with wrap_errors(asked):
            return retry(lambda: self._once(file, span.offset, span.length), asked, stop=stop)

    def _once(self, file: str, offset: int, length: int) -> bytes:
        """One try, following redirects by hand: only so the token surely stays with the Hub's own origin."""
        home = hf_hub_url(self.repo, file, revision=self.revision)
        place = self._places.get(file)
        url = place or home
        for _ in range(REDIRECTS):
            at_home = url_origin(url) == url_origin(home)
            headers = build_hf_headers(
                token=None if at_home else False, library_name="bnbfix", library_version=__version__
            )
            headers |= {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
            asked = describe_request(self.repo, self.revision, file)
            with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=TIMEOUT) as answer:
                if answer.status_code in (301, 302, 303, 307, 308):
                    self._check_promise(file, answer.headers)
                    url = resolve_redirect(url, answer.headers.get("Location", ""), asked.where)
                    continue
                if answer.status_code in (200, 206):
                    if at_home:
                        self._check_promise(file, answer.headers)
                    data = self._body(file, offset, length, answer, urlsplit(url).netloc.rpartition("@")[2])
                    self._places[file] = url
                    return data
                # A signed address runs out after a while: ask the Hub for another.
                if url == place and answer.status_code in (400, 401, 403, 404, 410):
                    self._places.pop(file, None)
                    raise RetryableError(hub_error(answer.status_code, None, asked), 0)
                raise error_from_response(answer, asked)
        raise HubError(f"redirects more than {REDIRECTS} times", where=asked.where)

    def _check_promise(self, file: str, headers: Mapping[str, str]) -> None:
        """Raises HubError when the Hub itself says that another file than the one listed will come."""
        where = f"{self.repo}: {file}"
        commit, size = headers.get("X-Repo-Commit"), headers.get("X-Linked-Size")
        etag = (headers.get("X-Linked-ETag") or "").removeprefix("W/").strip('"')
        if commit and commit != self.revision:
            raise HubError(f"the Hub answers with commit {commit[:12]}, not {self.revision[:12]}", where=where)
        if (size and size != str(self.files[file])) or (etag and etag != self._hashes.get(file, etag)):
            raise HubError("changed on the Hub while it was being read", where=where, hint="Run it again.")

    def _body(self, file: str, offset: int, length: int, answer: Any, host: str) -> bytes:
        where, size = f"{self.repo}: {file}", self.files[file]
        if answer.status_code == 200 and length != size:
            raise HubError(
                f"{host} ignores byte ranges (HTTP 200): reading on would fetch all {size:,} bytes",
                where=where,
                hint="Is a proxy or a mirror (HF_ENDPOINT) between you and the Hub? Download the model instead.",
            )
        if answer.status_code == 206 and (
            why := content_range_error(answer.headers.get("Content-Range"), offset, length, size)
        ):
            raise HubError(f"{host} {why}", where=where, hint="Run it again; a proxy or a mirror may be broken.")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{host} compresses byte ranges, which makes them useless", where=where)
        etag = answer.headers.get("ETag")
        if etag and self._etags.setdefault((file, host), etag) != etag:
            raise HubError("changed on the Hub while it was being read", where=where, hint="Run it again.")
        data = bytearray()
        for chunk in answer.iter_raw(CHUNK):
            data += chunk
            if len(data) > length:
                raise HubError(f"{host} sends more than the {length:,} bytes that were asked for", where=where)
        if len(data) < length:
            raise HubError(f"{host} sent {len(data):,} bytes of the {length:,} that were asked for", where=where)
        return bytes(data)


def _size(sibling: Any, repo: str) -> int:
    size = sibling.lfs.size if sibling.lfs is not None else sibling.size
    if type(size) is not int or size < 0:
        raise HubError("the Hub does not say how large it is", where=f"{repo}: {sibling.rfilename}")
    return size


def _read_local(path: Path, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    fd = open_regular(path, file)
    try:
        return [read_exactly(fd, offset, length, file) for offset, length in ranges]
    finally:
        os.close(fd)


def _in_parallel(work: Callable[[Any, threading.Event], T], jobs: Sequence[Any]) -> list[T]:
    """The results in order; the first error, or an interrupt, stops what has not begun or waits for another try."""
    stop = threading.Event()
    if len(jobs) < 2:
        return [work(job, stop) for job in jobs]
    pool = ThreadPoolExecutor(min(WORKERS, len(jobs)), thread_name_prefix="bnbfix-hub")
    try:
        futures = [pool.submit(work, job, stop) for job in jobs]
        return [f.result() for f in futures]
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
