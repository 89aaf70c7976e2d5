"""Brings what a plan reads from the Hub to this machine: whole before the first write, or shard by shard.

A file is fetched whole through huggingface_hub, and only then read; a folder's files are there already.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from ..checkpoint.source import RemoteSource, as_remote
from ..errors import OutputError, UsageError
from ..planner.layout import tensors_read
from ..planner.plan import Plan
from .staging import SLACK, check_destination, clear, disk_space, existing_parent, fetched_folder, lock_directory
from .write import Progress, RepairResult, WriteOptions, check_device, in_order, write_plan

DOWNLOADS = 4  # files at a time; each is fetched in parallel pieces where huggingface_hub does so


def source_files_by_output(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The files of the source that each file of the output is made from, in the order in which they are written."""
    out: dict[str, tuple[str, ...]] = {}
    for shard in in_order(plan.shards):
        read = {t.shard for run in shard.runs() for t in tensors_read(run[0].op)}
        out[shard.name] = (shard.name,) if shard.copied else tuple(sorted(read))
    return out | {name: (name,) for name in plan.copied}


def missing_files(plan: Plan) -> dict[str, int]:
    """Sizes of the files that a repair downloads: what it reads, and what is not on this machine yet."""
    source = as_remote(plan.checkpoint.source)
    if source is None or plan.nothing_to_do:
        return {}
    files = dict.fromkeys(f for read in source_files_by_output(plan).values() for f in read)
    return {f: source.files[f] for f in files if source.local_path(f) is None}


def peak_streaming_bytes(plan: Plan, missing: Mapping[str, int]) -> int:
    """The most bytes that output and fetched files take together when each is fetched at its first use and deleted
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
    """Raises OutputError when output and download do not fit together, each where it will lie.

    What an interrupted repair left counts as free.
    """
    source, missing = as_remote(plan.checkpoint.source), missing_files(plan)
    needed, free = disk_space(plan, out)
    download = 0 if stream else sum(missing.values())
    if stream:
        needed = max(needed, peak_streaming_bytes(plan, missing) + SLACK)
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
            hint="With --stream the source never lies whole on disk." if download else None,
        )


def execute_plan(
    plan: Plan,
    out: Path,
    how: WriteOptions,
    *,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | None = None,
) -> RepairResult:
    """`write_plan`, with what it reads fetched from the Hub. Nothing is fetched when there is nothing to do.

    `stream` fetches a file when an output shard first needs it and deletes it after its last use, in a folder beside
    the output; else files go to the Hub's cache, and a repair that was killed finds those it had finished.
    `progress` counts bytes fetched and bytes written. Raises what `write_plan` raises, and HubError; what `progress`
    raises comes out as it is.
    """
    source = as_remote(plan.checkpoint.source)
    check_destination(plan.checkpoint.source, out, overwrite=overwrite)
    if stream and source is None:
        raise UsageError("is a folder; --stream is for repos on the Hub", where=plan.checkpoint.source.name)
    with ExitStack() as stack:
        step, bring = stack.enter_context(reraise_callback_errors(progress)), None
        if source is not None and not plan.nothing_to_do:
            check_device(how.device)
            check_space(plan, out, stream=stream)
            if stream:
                bring = stack.enter_context(_streaming(plan, source, out, step))
            else:
                fetch(source, missing_files(plan), step)
        return write_plan(plan, out, how, overwrite=overwrite, progress=step, bring=bring)


@contextmanager
def reraise_callback_errors(progress: Progress | None) -> Iterator[Progress]:
    """A caller's `progress` whose exception is raised again as it was: an OSError of its own is none of the Hub's."""
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


def fetch(source: RemoteSource, files: Mapping[str, int], step: Progress) -> None:
    """Downloads files into the Hub's cache, the largest first; the first error stops what has not begun."""
    lock = threading.Lock()
    pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="bnbfix-fetch")
    with reraise_callback_errors(step) as told:

        def one_at_a_time(n: int) -> None:
            with lock:
                told(n)

        try:
            names = sorted(files, key=lambda f: -files[f])
            for done in [pool.submit(source.fetch, name, None, one_at_a_time) for name in names]:
                done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _streaming(
    plan: Plan, source: RemoteSource, out: Path, step: Progress
) -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    folder = fetched_folder(out)
    needed = source_files_by_output(plan)
    uses = Counter(f for read in needed.values() for f in read)

    @contextmanager
    def bring(name: str) -> Iterator[None]:
        for file in needed[name]:
            source.fetch(file, folder, step)
        yield
        uses.subtract(needed[name])
        for file in needed[name]:
            if uses[file] == 0:
                source.forget(file, folder)

    lock = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(folder, out)  # what another repair fetched must not be cleared away under it
        for left in folder.iterdir():
            clear(left)
        yield bring
    except OSError as e:
        raise OutputError(f"cannot be written ({e.strerror or e})", where=str(e.filename or folder)) from e
    finally:
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
