"""Carries out a plan: downloads what it reads, writes it into a staging folder, and publishes that whole."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.source import LocalSource, Progress, as_remote
from ..errors import InputError, UsageError, VerifyError
from ..kernels.device import resolve_device
from ..kernels.packages import require_packages
from ..planner.layout import Dequantize, MadeWeight
from ..planner.plan import RECORD, Plan
from ..rules.scan import scan_checkpoint
from .download import check_space, download_files, missing_files, reraise_callback_errors, stream_files
from .record import plan_digest
from .shard_writer import AHEAD, EnsureLocal, Job
from .staging import Staging, check_destination, wrap_write_errors
from .tensor_data import CHUNK_BYTES

logger = logging.getLogger(__name__)
BASE_MEMORY = 400 << 20  # bytes that Python, torch and bitsandbytes take


@dataclass(frozen=True)
class WriteOptions:
    """How a plan is carried out. Only `hardlink` changes what is written."""

    device: str = "auto"  # auto, cpu, cuda, cuda:N
    hardlink: bool = False  # untouched shards become hard links, which are not hashed
    workers: int | None = None  # shards written at the same time; None: as many as cores and memory allow
    max_memory: int | None = None  # bytes of RAM in all


@dataclass(frozen=True)
class RepairResult:
    """What a repair did.

    `files` has the SHA-256 of every file of the output except the record; it is empty when there was nothing to do.
    `linked` names the hard links in the output, which have no hash, `kept` the files that an interrupted run had
    finished.
    """

    plan: Plan
    out: Path | None
    files: Mapping[str, str]
    linked: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    in_place: bool = False  # `out` is the source's own folder

    def __repr__(self) -> str:
        out = str(self.out) if self.out else None
        return f"RepairResult(out={out!r}, files={len(self.files)}, linked={len(self.linked)}, kept={len(self.kept)})"

    @property
    def written(self) -> bool:
        return self.out is not None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as `bnbfix schema repair` describes it."""
        return self.plan.to_dict() | {
            "out": str(self.out) if self.out else None,
            "in_place": self.in_place,
            "sha256": dict(self.files),
            "linked": list(self.linked),
            "resumed": list(self.kept),
        }


def worker_memory(plan: Plan) -> int:
    """Bytes that one worker needs at most: waiting chunks, and the scales of the largest weight that is decoded."""
    blocks = [0]
    for shard in plan.shards:
        for run in shard.runs():
            op = run[0].op
            weights = op.weights if isinstance(op, Dequantize) else ()
            blocks += [w.state.blocks for w in weights if w.state is not None]
            if isinstance(op, MadeWeight):
                blocks.append(op.state().blocks + sum(i.nbytes for i in op.infos()) // 4)
    return (AHEAD + 4) * CHUNK_BYTES + 16 * max(blocks)


def choose_workers(asked: int | None, shards: int, cores: int, each: int, max_memory: int | None) -> int:
    """How many shards are written at the same time: the number asked for, else one for every four cores, up to four.

    Never more than there are shards, nor than fit into `max_memory` bytes at `each` bytes a worker. Raises UsageError
    when not even one fits, or the number is not positive.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"workers is {asked}, not a positive number")
    wanted = min(asked or max(1, min(4, cores // 4)), max(1, shards))
    if max_memory is None:
        return wanted
    fit = (max_memory - BASE_MEMORY) // each
    if fit < 1:
        raise UsageError(
            f"max_memory is {max_memory:,} bytes, which is too little",
            hint=f"At least {BASE_MEMORY + each:,} bytes are needed.",
        )
    return min(wanted, fit)


def check_names(names: Iterable[str]) -> None:
    """Raises InputError for file names that are not two files everywhere, or not in the folder everywhere.

    Windows and macOS take `A` and `a` for one name, and so macOS takes the two ways to spell an accented letter.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        if any(re.match(r"[A-Za-z]:", part) for part in name.split("/")):
            raise InputError("begins with a drive letter, as Windows has them", where=name, hint="Rename it.")
        same = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if (other := seen.setdefault(same, name)) != name:
            what = f"differs from {other} only in case or in how its letters are spelled"
            raise InputError(f"{what}: Windows or macOS would keep one of them", where=name, hint="Rename one of them.")


def write_plan(
    plan: Plan,
    out: Path,
    options: WriteOptions | None = None,
    *,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | None = None,
) -> RepairResult:
    """Writes the output of a plan to the directory `out`. Nothing is downloaded or written when there is nothing to do.

    A repo's files go to the Hub's cache first, where an interrupted repair finds those that are complete. With `stream`
    each is downloaded next to the output when an output shard first needs it, and deleted after its last use.

    Whatever is raised, `out` is then unchanged. Finished files of an interrupted run stay in the staging folder next
    to it, where the next run finds them.

    Args:
        progress: called with the number of bytes just downloaded or written. Its exceptions are raised unchanged.

    Raises:
        UsageError, OutputError: the output cannot be written with these options.
        HubError: a download fails.
        InputError: the source changes meanwhile.
        VerifyError: the output does not scan clean.
    """
    options, source = options or WriteOptions(), as_remote(plan.checkpoint.source)
    if stream and source is None:
        raise UsageError(
            "is a folder; only repos on the Hub can be streamed",
            where=plan.checkpoint.source.name,
            hint="Leave out --stream (stream=True).",
        )
    if plan.nothing_to_do:
        return RepairResult(plan, None, {})
    if plan.computes:
        require_packages(f"this repair {plan.computes}")
    check_names({*(s.name for s in plan.shards), *plan.texts, *plan.copied, RECORD})
    if options.device != "auto":
        resolve_device(options.device)  # raises before the work begins; "auto" always works, and torch is not asked
    cores, each = os.cpu_count() or 1, worker_memory(plan)
    workers = choose_workers(options.workers, len(plan.shards), cores, each, options.max_memory)
    with reraise_callback_errors(progress) as step, wrap_write_errors(out), ExitStack() as stack:
        check_space(plan, out, stream=stream)
        ensure_local = None
        if source is not None and stream:
            ensure_local = stack.enter_context(stream_files(plan, source, out, step))
            workers = 1  # the files downloaded for one shard are deleted before the next
        elif source is not None:
            download_files(source, missing_files(plan), step)
        return _write_staged(plan, out, options, workers, overwrite, step, ensure_local)


def _write_staged(
    plan: Plan,
    out: Path,
    options: WriteOptions,
    workers: int,
    overwrite: bool,
    step: Progress,
    ensure_local: EnsureLocal | None,
) -> RepairResult:
    staging = Staging(out, plan_digest(plan))
    try:
        # Under the lock: another repair may have published meanwhile, or a killed one left its old output.
        check_destination(plan.checkpoint.source, out, overwrite=overwrite)
        logger.info("writing %d shards to %s with %d workers", len(plan.shards), staging.path, workers)
        job = Job(plan, staging, step, options.device, options.hardlink, ensure_local)
        files = job.run(workers)
        plan.checkpoint.source.check_unchanged()
        _check_written(plan, staging.path)
        staging.publish({*files, *job.linked, RECORD}, overwrite=overwrite)
    except (KeyboardInterrupt, SystemExit, UsageError):  # finished files are still good for another run
        if staging.has_resumable_files:
            logger.info("finished files are kept in %s", staging.path)
        else:
            staging.discard()
        raise
    except BaseException:  # raised again; nothing half done stays
        staging.discard()
        raise
    finally:
        staging.close()
    return RepairResult(plan, staging.out, files, tuple(job.linked), tuple(staging.kept))


def _check_written(plan: Plan, staging: Path) -> None:
    checkpoint = open_checkpoint(LocalSource.open(staging))
    if plan.drops_quantization:
        if checkpoint.damaged or checkpoint.orphans or any(w.quantized for w in checkpoint.weights.values()):
            raise VerifyError("the output would not be in full precision")
        return
    after = scan_checkpoint(checkpoint, plan.target)
    left = [f for f in after.findings if f.blocking]
    if left:
        raise VerifyError(f"the output would not be clean: {left[0].code.value} {left[0].message}")
