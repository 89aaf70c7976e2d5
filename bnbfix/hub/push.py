"""Puts a repaired folder on the Hub, once it has been proved to be what its record says."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.source import LocalSource, Source
from ..errors import HubError, UsageError, VerifyError
from ..verifier.verify import verify_output
from ..writer.record import read_record
from ..writer.write import Progress
from .resolve import parse_repo


@dataclass(frozen=True)
class Destination:
    """Where a repair is pushed to. `parent` is the commit that a pull request starts from."""

    repo: str
    create_pr: bool
    private: bool
    parent: str | None


@dataclass(frozen=True)
class Pushed:
    """What a push made: the address of the commit or of the pull request, and the commit."""

    repo: str
    url: str
    commit: str


def destination(source: Source, push_to: str | None, *, create_pr: bool, private: bool) -> Destination | None:
    """What the options mean; None when nothing is to be pushed. Raises UsageError when they make no sense.

    Without a repo a pull request goes to the source's own, and starts from the commit that was repaired.
    """
    if push_to is None and not create_pr:
        if private:
            raise UsageError("--private belongs to --push-to")
        return None
    if create_pr and private:
        raise UsageError("--private is for a new repo, --create-pr for one that is there")
    if push_to is None:
        if source.origin is None:
            raise UsageError("--create-pr needs --push-to: a folder has no repo of its own")
        return Destination(source.origin["repo"], True, False, source.origin["revision"])
    found = parse_repo(push_to)
    if found is None or found[1] is not None:
        raise UsageError(f"--push-to {push_to!r} is no repo on the Hub: org/name")
    return Destination(found[0], create_pr, private, None)


def require_login() -> None:
    """Raises HubError when there is no token to push with: better before a repair than after it."""
    from .client import check_login

    check_login()


def publish(out: Path, to: Destination, progress: Progress | None = None, *, quiet: bool = True) -> Pushed:
    """Verifies a repaired folder and uploads it in one commit. Raises VerifyError, and pushes nothing, when it is not
    what its record says or does not scan clean; HubError when the Hub refuses.

    `progress` is called with the number of bytes just hashed; unless `quiet`, huggingface_hub shows on stderr what it
    uploads. Weights and indexes of the repo that are not in the
    folder go: a loader could take them for the repaired ones.
    """
    result = verify_output(out, None, progress=progress)
    if not result.ok:
        raise VerifyError(f"{result.problems[0]}; nothing was pushed", where=str(out))
    from .client import commit, make_repo, silence
    from .source import HubSource  # here, since only who pushes needs huggingface_hub

    output = LocalSource.open(out)
    message = f"Repair for vLLM {read_record(output)['target']} with bnbfix"
    try:
        if not to.create_pr:
            make_repo(to.repo, private=to.private)
        removed = stale(HubSource.open(to.repo, to.parent).files, output.files)
        with silence() if quiet else nullcontext():
            url, sha = commit(out, to.repo, output.files, removed, message, create_pr=to.create_pr, parent=to.parent)
    except HubError as e:
        e.hint = f"{e.hint or ''} The repair itself is done: hf upload {to.repo} {out}".strip()
        raise
    return Pushed(to.repo, url, sha)


def stale(there: Iterable[str], folder: Iterable[str]) -> list[str]:
    """The weights and indexes beside a repo's config that a folder does not replace. Pure."""
    endings = (".safetensors", ".safetensors.index.json")
    return sorted(f for f in set(there) - set(folder) if "/" not in f and f.endswith(endings))
