"""Carries out a plan: staging beside the destination, one sequential pass for each file, fsync, rename last.

The source is only read. The destination appears whole, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .checkpoint import open_checkpoint
from .codes import Code
from .errors import OutputError, UsageError, VerifyError
from .kernels import resolve_device
from .layout import Copy, Dequantize, Quantize, ShardPlan
from .plan import RECORD, Plan
from .scanner import scan_checkpoint
from .source import LocalSource, Source
from .values import copy_range, plain_values, quantized_parts

SLACK = 16 << 20  # bytes of disk asked for beyond the output: directories, the record, rounding to blocks
Progress = Callable[[int], None]  # called with the number of bytes just written
Bring = Callable[[str], AbstractContextManager[None]]  # around the writing of a file: what it reads lies here meanwhile


@dataclass(frozen=True)
class RepairResult:
    """What a repair did. `files` has the SHA-256 of every file of the output; empty when there was nothing to do."""

    plan: Plan
    out: Path | None
    files: Mapping[str, str]

    @property
    def written(self) -> bool:
        return self.out is not None


def check_destination(source: Source, out: Path, *, overwrite: bool) -> None:
    """Raises UsageError when `out` touches the source, or exists and is not an empty directory."""
    target = Path(os.path.abspath(out))
    if isinstance(source, LocalSource):
        here, there = source.path.resolve(), target.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UsageError(
                "the output must lie outside the source, and the source outside the output", where=str(out)
            )
        for scratch in (p.resolve() for p in (*_scratch(_real(out)), fetched_folder(out))):
            if here == scratch or scratch in here.parents:
                raise UsageError(
                    f"lies in {scratch.name}, which a repair to {out} clears away", where=source.name,
                    hint="Rename it, or name another --out.",
                )  # fmt: skip
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError("exists and is not a folder", where=str(out))
    if not overwrite and next(os.scandir(target), None) is not None:
        raise UsageError("exists and is not empty", where=str(out), hint="Name another --out, or add --overwrite.")


def disk_space(plan: Plan, out: Path) -> tuple[int, int]:
    """(bytes needed, bytes free) where `out` will lie."""
    return plan.bytes_written + SLACK, shutil.disk_usage(existing_parent(out)).free


def check_space(plan: Plan, out: Path) -> None:
    """Raises OutputError when the disk cannot hold the output."""
    needed, free = disk_space(plan, out)
    if needed > free:
        raise OutputError(f"not enough disk: {needed:,} bytes are needed, {free:,} are free", where=str(out))


def pick_device(plan: Plan, request: str) -> str:
    """The torch device a request means, where the plan needs kernels; "auto" imports torch for no plan that does not.

    Raises UsageError for a device that is not there.
    """
    kernels = any(not isinstance(run[0].op, Copy) for s in plan.shards for run in s.runs())
    return resolve_device(request) if kernels or request != "auto" else "cpu"


def write_plan(
    plan: Plan, out: Path, *, device: str, overwrite: bool = False, progress: Progress | None = None,
    bring: Bring | None = None,
) -> RepairResult:  # fmt: skip
    """Writes the output of a plan to the directory `out`. `device` is a torch device that exists.

    `bring` is entered, with the file's name, around the writing of each file that is made from the source's bytes.

    Raises UsageError or OutputError when that is not possible, InputError when the source changes meanwhile,
    VerifyError when what was written does not scan clean. Whatever happens, `out` is then as it was before.
    """
    check_destination(plan.checkpoint.source, out, overwrite=overwrite)
    if plan.nothing_to_do:
        return RepairResult(plan, None, {})
    check_space(plan, out)
    out = _real(out)
    staging, _ = _scratch(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear(staging)
        staging.mkdir()
        files = _write_files(plan, staging, device, progress or (lambda n: None), bring or (lambda name: nullcontext()))
        _check_written(plan, staging)
        _publish(staging, out)
    except OSError as e:
        raise OutputError(f"cannot be written ({e.strerror or e})", where=str(e.filename or out)) from e
    finally:
        with contextlib.suppress(OSError):
            _clear(staging)
    return RepairResult(plan, out, files)


def _real(out: Path) -> Path:
    return Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))


def _scratch(out: Path) -> tuple[Path, Path]:
    """The folders beside an output that a repair makes and clears away: what is being written, and what it replaces."""
    return out.with_name(f".{out.name}.bnbfix-partial"), out.with_name(f".{out.name}.bnbfix-old")


def fetched_folder(out: Path) -> Path:
    """The folder beside an output for what is fetched shard by shard; cleared away as the others."""
    return _real(out).with_name(f".{_real(out).name}.bnbfix-source")


def existing_parent(path: Path) -> Path:
    """The folder that `path` will lie in, or the nearest one above that exists."""
    path = Path(os.path.realpath(path)).parent
    while not path.exists():
        path = path.parent
    return path


def _clear(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _write_files(plan: Plan, staging: Path, device: str, progress: Progress, bring: Bring) -> dict[str, str]:
    source, files = plan.checkpoint.source, {}
    size = source.files
    for name in plan.copied:
        with bring(name):
            files[name] = _write(staging / name, copy_range(source, name, 0, size[name]), progress)
    for shard in plan.shards:
        with bring(shard.name):
            files[shard.name] = _write(staging / shard.name, shard_chunks(source, shard, device), progress)
    for name, text in plan.texts.items():
        files[name] = _write(staging / name, iter([text.encode()]), progress)
    # A file name that is no UTF-8 holds halves of surrogate pairs: written as JSON's own escapes.
    doc = record(plan, files).encode("utf-8", "backslashreplace")
    _write(staging / RECORD, iter([doc]), progress)
    for folder, _, _ in os.walk(staging):
        _fsync_dir(folder)
    return files


def record(plan: Plan, files: Mapping[str, str]) -> str:
    """The text of bnbfix.json: what was changed, for which target, and the SHA-256 of every other file.

    A repo's repair differs from a folder's in the key "source" alone: {"repo", "revision"}.
    """
    origin = plan.checkpoint.source.origin
    doc = {
        "schema": 1,
        "bnbfix": __version__,
        **({"source": dict(origin)} if origin else {}),
        "target": plan.target.name,
        "releases": [r.name for r in plan.target.ranges],
        "options": vars(plan.options),
        "edits": [e.document() for e in plan.edits],
        "sha256": dict(sorted(files.items())),
    }
    return json.dumps(doc, indent=2, ensure_ascii=False) + "\n"


def shard_chunks(source: Source, shard: ShardPlan, device: str) -> Iterator[bytes | memoryview]:
    """The bytes of an output shard, in order, a few MB at a time."""
    if shard.copied:
        yield from copy_range(source, shard.name, 0, shard.size)
        return
    yield shard.header
    for step in steps(shard):
        if isinstance(step, Dequantize):
            yield from plain_values(source, step.weights, step.dtype, device)
        elif isinstance(step, Quantize):
            yield from quantized_parts(source, step, device)
        else:
            yield from copy_range(source, *step)


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


def _write(path: Path, chunks: Iterator[bytes | memoryview], progress: Progress) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            digest.update(chunk)
            write_all(fd, chunk)
            progress(len(chunk))
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes all of it, however short the writes of the system are."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _fsync_dir(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_written(plan: Plan, staging: Path) -> None:
    checkpoint = open_checkpoint(LocalSource.open(staging))
    if plan.options.bf16:
        if checkpoint.damaged or checkpoint.orphans or any(w.packed for w in checkpoint.weights.values()):
            raise VerifyError("the output would not be in full precision")
        return
    after = scan_checkpoint(checkpoint, plan.target)
    left = [f for f in after.findings if f.remains and f.code is not Code.PLUGIN]
    if left:
        raise VerifyError(f"the output would not be clean: {left[0].code.value} {left[0].message}")


def _publish(staging: Path, out: Path) -> None:
    """Renames the staging directory to `out`; what was there is removed only once the new one is in its place."""
    _, old = _scratch(out)
    replaced = out.exists()
    if replaced:
        _clear(old)
    try:
        if replaced:
            out.rename(old)
        staging.rename(out)
        _fsync_dir(out.parent)
    except BaseException:  # an interrupt too
        if not staging.exists():
            out.rename(staging)
        if replaced and old.exists():
            old.rename(out)
        raise
    if replaced:
        with contextlib.suppress(OSError, KeyboardInterrupt):  # too late to interrupt: the output is there
            _clear(old)
