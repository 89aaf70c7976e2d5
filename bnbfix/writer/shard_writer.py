"""Runs a plan: one sequential pass for each file.

What shards are made of is one stream of parts, drawn by a thread that runs ahead: kernels make their bytes there, and
torch is imported there if it is needed. The consumer writes each part, and copies ranges of the source in the kernel.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from ..checkpoint.checkpoint import INDEX
from ..checkpoint.source import Progress, Source
from ..kernels.bnb import use_threads
from ..kernels.device import resolve_device
from ..planner.layout import Copy, Dequantize, Quantize, ShardPlan, Split, tensors_read
from ..planner.plan import RECORD, Plan
from . import syscalls
from .background import Prefetch
from .output_file import OutputFile, write_small
from .record import build_record
from .source_hashes import SourceHashes
from .staging import Staging
from .tensor_data import made_parts, weight_values

logger = logging.getLogger(__name__)
AHEAD = 4  # chunks made before their turn
CACHED_BYTES = 64 << 20  # of a file that may leave the page cache: those that were hashed last
EnsureLocal = Callable[[str], AbstractContextManager[None]]  # keeps what an output file is made from on this machine


class CopyFile(NamedTuple):
    """A whole file of the source."""

    file: str
    size: int


class CopyRange(NamedTuple):
    """A range of a file of the source."""

    file: str
    offset: int
    length: int


class ShardHeader(NamedTuple):
    """A shard's header, known beforehand."""

    data: bytes


class Chunk(NamedTuple):
    """Bytes that a kernel made."""

    data: bytes | memoryview


Part = CopyFile | CopyRange | ShardHeader | Chunk


def write_order(shards: Iterable[ShardPlan]) -> list[ShardPlan]:
    """Shards in the order they are written: untouched ones first, while torch loads."""
    return sorted(shards, key=lambda s: not s.copied)


def source_files_by_output(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The files of the source that each file of the output is made from, in the order in which they are written."""
    out: dict[str, tuple[str, ...]] = {}
    for shard in write_order(plan.shards):
        read = {t.shard for run in shard.runs() for t in tensors_read(run[0].op)}
        out[shard.name] = (shard.name,) if shard.copied else tuple(sorted(read))
    return out | {name: (name,) for name in plan.copied}


def copied_files(plan: Plan) -> frozenset[str]:
    """The files of the output that are files of the source, unchanged."""
    return frozenset((*(s.name for s in plan.shards if s.copied), *plan.copied))


def shard_parts(source: Source, shards: Iterable[ShardPlan], device: str) -> Iterator[tuple[str, Part]]:
    """(file name, part) of everything that shards are made of, in order. Kernels run as their parts are drawn."""
    chosen: str | None = None
    for shard in shards:
        if shard.copied:
            yield shard.name, CopyFile(shard.name, shard.size)
            continue
        yield shard.name, ShardHeader(shard.header)
        for step in _merge_copies(shard):
            if isinstance(step, CopyRange):
                yield shard.name, step
                continue
            if chosen is None:
                chosen = resolve_device(device)
                logger.info("kernels run on %s", chosen)
                use_threads(max(1, (os.cpu_count() or 1) - 1))
            if isinstance(step, Dequantize):
                made = weight_values(source, step, chosen)
            else:
                made = made_parts(source, step, chosen)
            for data in made:
                yield shard.name, Chunk(data)


def _merge_copies(shard: ShardPlan) -> Iterator[CopyRange | Dequantize | Quantize | Split]:
    """What makes the bytes of a shard's tensors, in order; copies of adjacent ranges are one."""
    pending: CopyRange | Dequantize | Quantize | Split | None = None
    for run in shard.runs():
        op = run[0].op
        step = CopyRange(op.origin.shard, op.origin.offset, run[0].info.nbytes) if isinstance(op, Copy) else op
        if isinstance(step, CopyRange) and isinstance(pending, CopyRange):
            if step[:2] == (pending.file, pending.offset + pending.length):
                pending = pending._replace(length=pending.length + step.length)
                continue
        if pending is not None:
            yield pending
        pending = step
    if pending is not None:
        yield pending


def keep_in_page_cache(output: int, free: int | None) -> bool:
    """Says whether an output of so many bytes is left in the page cache, for the next program that loads it.

    Not one beyond half of the free memory (bytes; None: unknown): it would push out what others use, and taking a page
    from the cache costs the writer more than filling it.
    """
    return free is None or output <= free // 2


@dataclass
class Job:
    """One run of a plan, with what its workers share.

    `ensure_local` is entered, with the file's name, around the writing of each file that is made from the source.
    """

    plan: Plan
    staging: Staging
    progress: Progress
    device: str
    hardlink: bool
    ensure_local: EnsureLocal | None = None
    linked: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def cached_bytes(self) -> int | None:
        keep = keep_in_page_cache(self.plan.bytes_written, syscalls.free_memory())
        return None if keep else CACHED_BYTES

    @cached_property
    def hashes(self) -> SourceHashes:
        return SourceHashes(self.plan.checkpoint.source, self.stop)

    @cached_property
    def _sources(self) -> Mapping[str, tuple[str, ...]]:
        return source_files_by_output(self.plan)

    @cached_property
    def _copies(self) -> frozenset[str]:
        return copied_files(self.plan)

    def run(self, workers: int) -> dict[str, str]:
        """Writes every file; the index last. Returns their hashes."""
        plan, source = self.plan, self.plan.checkpoint.source
        files = dict(self.staging.kept)
        for name in files:
            self.step((self.staging.path / name).stat().st_size)
        with self.hashes, ThreadPoolExecutor(2, "bnbfix-flush") as flush:
            finished: dict[str, Future[str]] = {}
            try:
                finished = self._write_shards([s for s in plan.shards if s.name not in files], workers, flush)
                for name in plan.copied:
                    if name not in files:
                        with self.ensure_local(name) if self.ensure_local else nullcontext():
                            finished[name] = self._write_file(name, [CopyFile(name, source.files[name])], flush)
                files |= {name: done.result() for name, done in finished.items()}
            except BaseException:  # an interrupt too, raised again: the threads must stop first
                self.stop.set()
                flush.shutdown(cancel_futures=True)
                raise
        texts = {name: text.encode() for name, text in plan.texts.items()}
        files |= {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
        texts[RECORD] = build_record(plan, files, self.linked)
        for name in sorted(texts, key=lambda name: name == INDEX):
            write_small(self.staging.path / name, texts[name])
            self.step(len(texts[name]))
        return files

    def step(self, n: int) -> None:
        """Reports progress; raises KeyboardInterrupt in a worker that has to stop."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        with self.lock:
            self.progress(n)

    def _write_shards(
        self, shards: Sequence[ShardPlan], workers: int, flush: ThreadPoolExecutor
    ) -> dict[str, Future[str]]:
        if self.ensure_local is not None:
            finished: dict[str, Future[str]] = {}
            for shard in write_order(shards):
                with self.ensure_local(shard.name):
                    finished |= self._write_batch([shard], flush)
            return finished
        batches: list[list[ShardPlan]] = [[] for _ in range(min(workers, len(shards)))]
        for shard in sorted(shards, key=lambda s: -s.size):
            min(batches, key=lambda batch: sum(s.size for s in batch)).append(shard)
        if len(batches) <= 1:
            return self._write_batch(shards, flush)
        with ThreadPoolExecutor(len(batches), "bnbfix-shard") as pool:
            jobs = [pool.submit(self._write_batch, batch, flush) for batch in batches]
            try:
                return {name: done for job in jobs for name, done in job.result().items()}
            except BaseException:  # an interrupt too, raised again: the other workers must stop first
                self.stop.set()
                raise

    def _write_batch(self, shards: Sequence[ShardPlan], flush: ThreadPoolExecutor) -> dict[str, Future[str]]:
        ordered = [s for s in write_order(shards) if not (s.copied and self.hardlink and self._link(s.name))]
        source = self.plan.checkpoint.source
        parts = Prefetch(shard_parts(source, ordered, self.device), AHEAD, lambda item: isinstance(item[1], Chunk))
        try:
            files = groupby(parts, key=itemgetter(0))
            return {name: self._write_file(name, (part for _, part in items), flush) for name, items in files}
        finally:
            parts.close()

    def _link(self, name: str) -> bool:
        path = self.plan.checkpoint.source.local_path(name)
        if path is None:
            return False
        try:
            os.link(os.path.realpath(path), self.staging.path / name)
        except OSError as e:
            if e.errno in syscalls.CANNOT:  # another file system, or a file of another user
                logger.info("%s: cannot be linked (%s), so it is copied", name, e.strerror)
                return False
            raise
        logger.debug("%s: hard link", name)
        self.linked.append(name)
        self.step(self.plan.checkpoint.source.files[name])
        return True

    def _write_file(self, name: str, parts: Iterable[Part], flush: ThreadPoolExecutor) -> Future[str]:
        source = self.plan.checkpoint.source

        def finished(digest: str) -> None:
            if name in self._copies:
                self.hashes.compare(name, digest)
            else:
                self.hashes.check(self._sources[name])
            with self.lock:
                self.staging.finished(name, digest)

        if name not in self._copies:
            self.hashes.begin(self._sources[name])
        path = self.staging.path / name
        with OutputFile(path, self.step, finished, self.stop, cached_bytes=self.cached_bytes) as out:
            for part in parts:
                match part:
                    case CopyFile(file, size):
                        out.copy_file(source, file, size)
                    case CopyRange(file, offset, length):
                        out.copy(source, file, offset, length)
                    case ShardHeader(data) | Chunk(data):
                        out.append(data)
            return out.finish(flush)
