"""Repairs a folder in place, where no shard changes: config.json is replaced, and the index."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from itertools import count
from pathlib import Path

from ..checkpoint.checkpoint import CONFIG, INDEX
from ..checkpoint.source import LocalSource
from ..errors import UsageError
from ..planner.plan import RECORD, Plan
from .output_file import write_small
from .record import build_record
from .staging import wrap_write_errors
from .syscalls import fsync_folder
from .write import RepairResult

logger = logging.getLogger(__name__)
BACKUP = ".before-bnbfix"  # no loader reads a file of this name


def repair_in_place(plan: Plan) -> RepairResult:
    """Replaces the files that change, each at once; the old ones stay next to them. Shards are neither read nor hashed.

    Raises:
        UsageError: The source is no folder, a shard changes, or a file to replace is a link.
        InputError: The folder changed meanwhile.
        OutputError: A file cannot be written.
    """
    source = plan.checkpoint.source
    if not isinstance(source, LocalSource):
        raise UsageError("is a repo; only a folder can be repaired in place", where=source.name)
    if plan.nothing_to_do:
        return RepairResult(plan, None, {})
    if not plan.config_only:
        raise UsageError(
            f"cannot be repaired in place: {_describe_changes(plan)}",
            where=source.name,
            hint="Write a repaired copy with --out DIR (bnbfix.repair), or name a release that needs less.",
        )
    texts = {name: text.encode() for name, text in plan.texts.items() if name in (CONFIG, INDEX)}
    for name in (*texts, RECORD):
        if os.path.islink(source.path / name):
            raise UsageError("is a link, which is not replaced in place", where=str(source.path / name))
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    source.check_unchanged()
    with wrap_write_errors(source.path):
        for name in (*texts, RECORD):
            _keep_old(source.path / name)
        found = LocalSource.open(source.path).with_subfolders().files
        untouched = [name for name in found if name not in (*texts, RECORD)]
        texts[RECORD] = build_record(plan, hashes, untouched, in_place=True)
        for name, data in texts.items():
            _replace(source.path / name, data)
        fsync_folder(source.path)
    return RepairResult(plan, source.path, hashes, in_place=True)


def _describe_changes(plan: Plan) -> str:
    changed = [s.name for s in plan.shards if not s.copied] or list(plan.checkpoint.shards)
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{changed[0]}{more} would have to be written anew"


def _keep_old(path: Path) -> None:
    """Copies a file, if there is one, to a free name next to it."""
    if path.exists():
        names = (path.with_name(f"{path.name}{BACKUP}{n or ''}") for n in count())
        backup = next(name for name in names if not os.path.lexists(name))
        shutil.copy2(path, backup)
        logger.info("%s: the old one is kept as %s", path, backup.name)


def _replace(path: Path, data: bytes) -> None:
    """Puts new bytes in the place of a file, all at once."""
    new = path.with_name(f".{path.name}.bnbfix-new")
    new.unlink(missing_ok=True)
    write_small(new, data)
    if path.exists():
        shutil.copymode(path, new)
    os.replace(new, path)
