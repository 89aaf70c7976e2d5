"""Upload a repaired folder to the Hub."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.source import LocalSource, Source
from ..errors import HubError, UsageError
from .resolve import parse_repo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """The repo that a repair is pushed to. `parent` is the commit that a pull request starts from."""

    repo: str
    create_pr: bool
    private: bool
    parent: str | None


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the URL of the commit or pull request, and the commit's sha."""

    repo: str
    url: str
    commit: str


def resolve_destination(source: Source, push_to: str | None, *, create_pr: bool, private: bool) -> Destination | None:
    """Return where to push; None when nothing is to be pushed.

    Args:
        source: What is repaired. Without `push_to` a pull request goes to its repo, and starts from its commit.
        push_to: `org/name` of a repo, which is created where there is none.
        create_pr: Open a pull request instead of a commit to the main branch.
        private: Create the repo as a private one.

    Raises:
        UsageError: The options contradict each other, or `push_to` is not a repo id.
    """
    if push_to is None and not create_pr:
        if private:
            raise UsageError("a private repo needs a repo to push to: org/name")
        return None
    if create_pr and private:
        raise UsageError("only a new repo can be made private, and a pull request needs an existing one")
    if push_to is None:
        if source.origin is None:
            raise UsageError("a pull request needs a repo to push to, and a folder has none of its own")
        return Destination(source.origin["repo"], True, False, source.origin["revision"])
    found = parse_repo(push_to)
    if found is None or found[1] is not None:
        raise UsageError(f"{push_to!r} is not a repo that can be pushed to: org/name")
    return Destination(found[0], create_pr, private, None)


def push_folder(folder: Path, to: Destination, *, message: str, quiet: bool = True) -> Pushed:
    """Upload every file of a folder in one commit.

    Weight and index files in the repo's root that the folder does not replace are deleted: a loader could take them
    for the repaired ones. The caller verifies the folder first.

    Args:
        message: The commit's message.
        quiet: Hide huggingface_hub's progress bars.

    Raises:
        HubError: The Hub refuses, or there is no answer.
    """
    files = LocalSource.open(folder).with_subfolders().files
    try:
        return _commit_files(to, {name: folder / name for name in files}, {}, message, quiet=quiet)
    except HubError as e:
        e.hint = f"{e.hint or ''} The repair itself is done.".strip()
        e.command = shlex.join(["hf", "upload", to.repo, str(folder)])
        raise


def push_changes(
    origin: Mapping[str, str],
    kept: Iterable[str],
    changed: Mapping[str, bytes],
    to: Destination,
    *,
    message: str,
    quiet: bool = True,
) -> Pushed:
    """Upload only the files that a repair of a repo changes, in one commit. The others stay where they are.

    To another repo the Hub copies them by itself, so they are neither downloaded nor uploaded.

    Args:
        origin: What was repaired: {"repo", "revision"}.
        kept: The files that belong to the output and do not change.
        changed: The bytes of those that do.

    Raises:
        HubError: The Hub refuses, or there is no answer.
    """
    if to.repo == origin["repo"]:
        return _commit_files(replace(to, parent=origin["revision"]), changed, {}, message, quiet=quiet, complete=False)
    copied = dict.fromkeys(kept, (origin["repo"], origin["revision"]))
    return _commit_files(to, changed, copied, message, quiet=quiet)


def _commit_files(
    to: Destination,
    added: Mapping[str, Path | bytes],
    copied: Mapping[str, tuple[str, str]],
    message: str,
    *,
    quiet: bool,
    complete: bool = True,
) -> Pushed:
    """One commit; where the files are `complete`, weights that are not among them go."""
    from .client import commit, make_repo, silence
    from .source import HubSource  # here, since only a push needs huggingface_hub

    if not to.create_pr:
        make_repo(to.repo, private=to.private)
    there = HubSource.open(to.repo, to.parent).files if complete else ()
    removed = stale_files(there, {*added, *copied})
    logger.info("pushing %d files to %s, deleting %s", len(added), to.repo, removed or "none")
    with silence() if quiet else nullcontext():
        url, sha = commit(to.repo, added, copied, removed, message, create_pr=to.create_pr, parent=to.parent)
    return Pushed(to.repo, url, sha)


def stale_files(there: Iterable[str], folder: Iterable[str]) -> list[str]:
    """Return the weight and index files in a repo's root that a folder does not replace. Pure."""
    endings = (".safetensors", ".safetensors.index.json")
    return sorted(f for f in set(there) - set(folder) if "/" not in f and f.endswith(endings))
