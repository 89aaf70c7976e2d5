"""Downloads what a plan reads from the Hub: all of it before the first write, or shard by shard.

A file is downloaded whole through huggingface_hub, and only then read. The files of a folder need no download.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.source import Progress, RemoteSource, as_remote
from ..errors import HubError, OutputError
from ..hub.limits import download_limit
from ..hub.parallel import run_parallel
from ..planner.plan import Plan
from .shard_writer import EnsureLocal, source_files_by_output
from .staging import SLACK_BYTES, clear, disk_space, existing_parent, fetched_folder, lock_directory, unlock_directory

logger = logging.getLogger(__name__)
DOWNLOADS = 4  # files at a time; each is downloaded in parallel pieces where huggingface_hub does so


def missing_files(plan: Plan) -> dict[str, int]:
    """Sizes of the files that a repair downloads: those that it reads and that are not on this machine yet."""
    source = as_remote(plan.checkpoint.source)
    if source is None or plan.nothing_to_do:
        return {}
    files = dict.fromkeys(f for read in source_files_by_output(plan).values() for f in read)
    return {f: source.files[f] for f in files if source.local_path(f) is None}


def peak_streaming_bytes(plan: Plan, missing: Mapping[str, int]) -> int:
    """The most bytes that output and downloads take together when each file is downloaded at its first use and deleted
    after its last.
    """
    sizes = {s.name: s.size for s in plan.shards} | {f: plan.checkpoint.source.files[f] for f in plan.copied}
    uses = Counter(f for read in source_files_by_output(plan).values() for f in read)
    held, written, peak = set[str](), 0, 0
    for name, read in source_files_by_output(plan).items():
        held.update(f for f in read if f in missing)
        written += sizes[name]
        peak = max(peak, written + sum(missing[f] for f in held))
        uses.subtract(read)
        held = {f for f in held if uses[f] > 0}
    return peak


def check_space(plan: Plan, out: Path, *, stream: bool = False) -> None:
    """Raises OutputError when output and download do not fit together, each on its own disk.

    Files of an interrupted repair count as free space.
    """
    source, missing = as_remote(plan.checkpoint.source), missing_files(plan)
    needed, free = disk_space(plan, out)
    download = 0 if stream else sum(missing.values())
    if stream:
        needed = max(needed, peak_streaming_bytes(plan, missing) + SLACK_BYTES)
    if source is not None and download:
        store = existing_parent(source.store / "x")
        if os.stat(store).st_dev == os.stat(existing_parent(out)).st_dev:
            needed += download
        else:
            _compare(download, shutil.disk_usage(store).free, download, source.store)
    _compare(needed, free, download, out)


def _compare(needed: int, free: int, download: int, where: Path) -> None:
    if needed > free:
        what = f", {download:,} of them for the download" if download else ""
        raise OutputError(
            f"not enough disk: {needed:,} bytes are needed{what}, {free:,} are free",
            where=str(where),
            hint="With --stream (stream=True) only a part of the source is on disk at a time." if download else None,
            command="--stream" if download else None,
        )


@contextmanager
def reraise_callback_errors(progress: Progress | None) -> Iterator[Progress]:
    """A caller's `progress` whose exception is raised unchanged: its OSError must not be taken for the Hub's or the
    disk's.
    """
    failed: list[Exception] = []

    def step(n: int) -> None:
        try:
            if progress is not None:
                progress(n)
        except Exception as e:
            failed.append(e)
            raise

    try:
        yield step
    except Exception:  # raised again: as what the caller raised, if that is where it came from
        if failed:
            raise failed[0] from None
        raise


class DownloadInterrupted(KeyboardInterrupt):
    """An interrupt of a download; `hint` says what stays in the cache."""

    def __init__(self, hint: str) -> None:
        super().__init__()
        self.hint = hint


def download_files(source: RemoteSource, files: Mapping[str, int], step: Progress) -> None:
    """Downloads files into the Hub's cache, the largest first.

    After an error those that have begun are downloaded to their end. An interrupt stops all at once, and is raised as
    DownloadInterrupted.
    """
    logger.info("downloading %d files, %s bytes, to %s", len(files), f"{sum(files.values()):,}", source.store)
    lock = threading.Lock()

    def locked_step(n: int) -> None:
        with lock:
            step(n)

    try:
        _fetch_files(source, sorted(files, key=lambda f: -files[f]), None, locked_step)
    except KeyboardInterrupt:
        raise DownloadInterrupted(_describe_downloads(source, files)) from None


def _fetch_files(source: RemoteSource, names: Sequence[str], folder: Path | None, step: Progress) -> None:
    """Fetches files, the first first. Raises HubError when there is no progress for too long."""
    limit, last = download_limit(), time.monotonic()

    def note_step(n: int) -> None:
        nonlocal last
        last = time.monotonic()
        step(n)

    def check_progress() -> HubError | None:
        if time.monotonic() - last <= limit:
            return None
        hint = "Run it again. BNBFIX_HUB_DOWNLOAD_TIMEOUT sets this limit, in seconds."
        return HubError(f"the download makes no progress for {limit:g} s", where=source.name, hint=hint)

    def fetch(name: str) -> None:
        source.fetch(name, folder, note_step)

    run_parallel(fetch, names, DOWNLOADS, name="bnbfix-fetch", finish_running=True, tick=check_progress)


def _describe_downloads(source: RemoteSource, files: Mapping[str, int]) -> str:
    here = [size for name, size in files.items() if source.local_path(name) is not None]
    whole = f"{len(here)} of {len(files)} files ({sum(here) / 1e9:,.1f} GB) are downloaded and stay in {source.store}"
    return f"{whole}; parts of others are deleted."


@contextmanager
def stream_files(plan: Plan, source: RemoteSource, out: Path, step: Progress) -> Iterator[EnsureLocal]:
    """Yields what downloads the files for one output file, and deletes after it those that no later one needs."""
    folder = fetched_folder(out)
    needed = source_files_by_output(plan)
    uses = Counter(f for read in needed.values() for f in read)

    @contextmanager
    def ensure_local(name: str) -> Iterator[None]:
        for file in needed[name]:
            _fetch_files(source, [file], folder, step)
        yield
        uses.subtract(needed[name])
        for file in needed[name]:
            if uses[file] == 0:
                source.forget(file, folder)
                logger.debug("%s: deleted after its last use", file)

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_directory(folder, out)  # another repair must not delete these downloads
    try:
        for left in folder.iterdir():
            clear(left)
        logger.info("streaming %d files through %s", len(uses), folder)
        yield ensure_local
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock_directory(lock)
