"""Carries out a plan: one sequential pass for each file, into a staging folder that is published whole.

Bytes that stay are moved in the kernel; those that are made come from a thread that runs ahead, which is also where
torch is imported if it is needed; a third thread hashes what was just written. The source is only read.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..checkpoint.checkpoint import INDEX, open_checkpoint
from ..checkpoint.source import LocalSource, Source
from ..errors import OutputError, UsageError, VerifyError
from ..kernels.bnb import resolve_device, use_threads
from ..planner.layout import Copy, Dequantize, Quantize, ShardPlan
from ..planner.plan import RECORD, Plan
from ..rules.scan import scan_checkpoint
from . import syscalls
from .background import Prefetch
from .output_file import OutputFile, write_small
from .record import plan_digest, record
from .staging import Staging, check_destination, check_space
from .tensor_data import CHUNK, quantized_parts, weight_values

AHEAD = 4  # chunks made before their turn
BASE_MEMORY = 400 << 20  # bytes that Python, torch and bitsandbytes take
Progress = Callable[[int], None]  # called with the number of bytes just written
EnsureLocal = Callable[
    [str], AbstractContextManager[None]
]  # around the writing of a file: what it reads lies here meanwhile


@dataclass(frozen=True)
class WriteOptions:
    """How a plan is carried out. What comes out does not depend on it, but for `hardlink`."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N
    hardlink: bool = False  # untouched shards become hard links, which are not hashed
    workers: int | None = None  # shards written side by side; None: as many as the cores and the memory bear
    max_memory: int | None = None  # bytes of RAM in all


@dataclass(frozen=True)
class RepairResult:
    """What a repair did. `files` has the SHA-256 of every file of the output but the record; empty when there was
    nothing to do. `linked` names the hard links among them, which have no hash, `kept` what an interrupted run left.
    """

    plan: Plan
    out: Path | None
    files: Mapping[str, str]
    linked: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def written(self) -> bool:
        return self.out is not None


def check_device(request: str) -> None:
    """Raises UsageError for a device that is not there. "auto" and "cpu" are there always; torch is not asked."""
    if request != "auto":
        resolve_device(request)


def worker_memory(plan: Plan) -> int:
    """Bytes that one worker needs at most: chunks that wait, and the scales of the largest weight that is decoded."""
    blocks = [0]
    for shard in plan.shards:
        for run in shard.runs():
            op = run[0].op
            weights = op.weights if isinstance(op, Dequantize) else ()
            blocks += [w.state.blocks for w in weights if w.state is not None]
            if isinstance(op, Quantize):
                blocks.append(op.state().blocks + sum(i.nbytes for i in op.infos()) // 4)
    return (AHEAD + 4) * CHUNK + 16 * max(blocks)


def choose_workers(asked: int | None, shards: int, cores: int, each: int, max_memory: int | None) -> int:
    """How many shards are written side by side: the number asked for, else one for every four cores, up to four.

    Never more than there are shards, nor than fit into `max_memory` bytes at `each` bytes a worker. Raises UsageError
    when not even one fits, or the number makes no sense.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--workers {asked} is not a number of workers")
    wanted = min(asked or max(1, min(4, cores // 4)), max(1, shards))
    if max_memory is None:
        return wanted
    fit = (max_memory - BASE_MEMORY) // each
    if fit < 1:
        raise UsageError(
            f"--max-memory {max_memory:,} is too little", hint=f"At least {BASE_MEMORY + each:,} bytes are needed."
        )
    return min(wanted, fit)


def keep_in_page_cache(output: int, free: int | None) -> bool:
    """Should an output of so many bytes be left in the page cache, for whoever loads it next?

    Not one beyond half of the memory that is free (bytes; None: unknown): it would push out what others use, and taking
    a page from the cache costs the writer more than filling it.
    """
    return free is None or output <= free // 2


def write_plan(
    plan: Plan,
    out: Path,
    how: WriteOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    bring: EnsureLocal | None = None,
) -> RepairResult:
    """Writes the output of a plan to the directory `out`.

    `bring` is entered, with the file's name, around the writing of each file that is made from the source's bytes, in
    the order of `in_order`.

    Raises UsageError or OutputError when that is not possible, InputError when the source changes meanwhile,
    VerifyError when what was written does not scan clean. Whatever happens, `out` is then as it was before. Finished
    files of an interrupted run stay in the staging folder beside it, where the next run takes them up.
    """
    how = how or WriteOptions()
    check_destination(plan.checkpoint.source, out, overwrite=overwrite)
    if plan.nothing_to_do:
        return RepairResult(plan, None, {})
    check_device(how.device)
    workers = choose_workers(how.workers, len(plan.shards), os.cpu_count() or 1, worker_memory(plan), how.max_memory)
    if bring is not None:
        workers = 1  # what is brought for one file is gone before the next
    try:
        check_space(plan, out)
        staging = Staging(out, plan_digest(plan))
        try:
            # Again, under the lock: another repair may have published meanwhile, or a killed one left its old output.
            check_destination(plan.checkpoint.source, out, overwrite=overwrite)
            job = _Job(plan, how, staging, progress or (lambda n: None), bring)
            files = job.run(workers)
            plan.checkpoint.source.check_unchanged()
            _check_written(plan, staging.path)
            staging.publish(overwrite=overwrite)
        except (KeyboardInterrupt, SystemExit, UsageError):  # finished files are still good for another run
            if not staging.has_resumable_files:
                staging.discard()
            raise
        except BaseException:  # raised again; nothing half done stays
            staging.discard()
            raise
        finally:
            staging.close()
    except OSError as e:
        raise OutputError(f"cannot be written ({e.strerror or e})", where=str(e.filename2 or e.filename or out)) from e
    return RepairResult(plan, staging.out, files, tuple(job.linked), tuple(staging.kept))


@dataclass
class _Job:
    """One run of a plan: what is shared by its workers."""

    plan: Plan
    how: WriteOptions
    staging: Staging
    progress: Progress
    bring: EnsureLocal | None = None
    linked: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def stays(self) -> bool:
        return keep_in_page_cache(self.plan.bytes_written, syscalls.free_memory())

    def run(self, workers: int) -> dict[str, str]:
        """Writes every file; the index last."""
        plan, source = self.plan, self.plan.checkpoint.source
        files = dict(self.staging.kept)
        for name in files:
            self.step((self.staging.path / name).stat().st_size)
        with ThreadPoolExecutor(2, "bnbfix-flush") as flush:
            finished: dict[str, Future[str]] = {}
            try:
                finished = self._shards(workers, [s for s in plan.shards if s.name not in files], flush)
                for name in plan.copied:
                    if name not in files:
                        with self.bring(name) if self.bring else nullcontext():
                            finished[name] = self._whole(name, source.files[name], flush)
                files |= {name: done.result() for name, done in finished.items()}
            except BaseException:  # an interrupt too, raised again: the threads must stop first
                self.stop.set()
                flush.shutdown(cancel_futures=True)
                raise
        texts = {name: text.encode() for name, text in plan.texts.items()}
        files |= {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
        texts[RECORD] = record(plan, files, self.linked)
        for name in sorted(texts, key=lambda name: name == INDEX):
            write_small(self.staging.path / name, texts[name])
            self.step(len(texts[name]))
        return files

    def step(self, n: int) -> None:
        """Reports progress, and stops a worker that shall stop."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        with self.lock:
            self.progress(n)

    def _shards(self, workers: int, shards: Sequence[ShardPlan], flush: ThreadPoolExecutor) -> dict[str, Future[str]]:
        lots: list[list[ShardPlan]] = [[] for _ in range(min(workers, len(shards)))]
        for shard in sorted(shards, key=lambda s: -s.size):
            min(lots, key=lambda lot: sum(s.size for s in lot)).append(shard)
        if self.bring is not None:
            out: dict[str, Future[str]] = {}
            for shard in in_order(shards):
                with self.bring(shard.name):
                    out |= self._lot([shard], flush)
            return out
        if len(lots) <= 1:
            return self._lot(shards, flush)
        with ThreadPoolExecutor(len(lots), "bnbfix-shard") as pool:
            jobs = [pool.submit(self._lot, lot, flush) for lot in lots]
            try:
                return {name: done for job in jobs for name, done in job.result().items()}
            except BaseException:  # an interrupt too, raised again: the other workers must stop first
                self.stop.set()
                raise

    def _lot(self, shards: Sequence[ShardPlan], flush: ThreadPoolExecutor) -> dict[str, Future[str]]:
        ordered = in_order(shards)
        made = Prefetch(made_chunks(self.plan.checkpoint.source, ordered, self.how.device), AHEAD)
        try:
            out = {}
            for shard in ordered:
                if shard.copied and self.how.hardlink and self._link(shard.name):
                    continue
                out[shard.name] = (
                    self._whole(shard.name, shard.size, flush) if shard.copied else self._shard(shard, made, flush)
                )
            return out
        finally:
            made.close()

    def _link(self, name: str) -> bool:
        path = self.plan.checkpoint.source.local_path(name)
        if path is None:
            return False
        try:
            os.link(os.path.realpath(path), self.staging.path / name)
        except OSError as e:
            if e.errno in syscalls.CANNOT:  # another file system, or somebody else's file
                return False
            raise
        self.linked.append(name)
        self.step(self.plan.checkpoint.source.files[name])
        return True

    def _file(self, name: str) -> OutputFile:
        def finished(digest: str) -> None:
            with self.lock:
                self.staging.finished(name, digest)

        return OutputFile(self.staging.path / name, self.step, finished, self.stop, stays=self.stays)

    def _whole(self, name: str, size: int, flush: ThreadPoolExecutor) -> Future[str]:
        with self._file(name) as out:
            out.copy_file(self.plan.checkpoint.source, name, size)
            return out.finish(flush)

    def _shard(
        self, shard: ShardPlan, made: Iterator[bytes | memoryview | None], flush: ThreadPoolExecutor
    ) -> Future[str]:
        with self._file(shard.name) as out:
            out.append(shard.header)
            for step in steps(shard):
                if isinstance(step, tuple):
                    out.copy(self.plan.checkpoint.source, *step)
                    continue
                while (chunk := next(made)) is not None:
                    out.append(chunk)
            return out.finish(flush)


def in_order(shards: Sequence[ShardPlan]) -> list[ShardPlan]:
    """Shards in the order they are written: those that only move come first, while torch loads."""
    return sorted(shards, key=lambda s: not s.copied)


def made_chunks(source: Source, shards: Sequence[ShardPlan], device: str) -> Iterator[bytes | memoryview | None]:
    """The bytes that shards get from kernels, in order, a few MB at a time; None after each operation."""
    chosen: str | None = None
    for shard in shards:
        for step in () if shard.copied else steps(shard):
            if isinstance(step, tuple):
                continue
            if chosen is None:
                chosen = resolve_device(device)
                use_threads(max(1, (os.cpu_count() or 1) - 1))
            if isinstance(step, Dequantize):
                yield from weight_values(source, step.weights, step.dtype, chosen)
            else:
                yield from quantized_parts(source, step, chosen)
            yield None


def steps(shard: ShardPlan) -> Iterator[tuple[str, int, int] | Dequantize | Quantize]:
    """What makes a shard's bytes, in order: (file, offset, length) to copy, neighbours merged, or an operation."""
    pending: tuple[str, int, int] | None = None
    for run in shard.runs():
        op = run[0].op
        if isinstance(op, Copy):
            at, nbytes = op.origin, run[0].info.nbytes
            if pending and (pending[0], pending[1] + pending[2]) == (at.shard, at.offset):
                pending = (pending[0], pending[1], pending[2] + nbytes)
                continue
            if pending:
                yield pending
            pending = (at.shard, at.offset, nbytes)
            continue
        if pending:
            yield pending
        pending = None
        yield op
    if pending:
        yield pending


def _check_written(plan: Plan, staging: Path) -> None:
    checkpoint = open_checkpoint(LocalSource.open(staging))
    if plan.options.bf16:
        if checkpoint.damaged or checkpoint.orphans or any(w.quantized for w in checkpoint.weights.values()):
            raise VerifyError("the output would not be in full precision")
        return
    after = scan_checkpoint(checkpoint, plan.target)
    left = [f for f in after.findings if f.blocking]
    if left:
        raise VerifyError(f"the output would not be clean: {left[0].code.value} {left[0].message}")
