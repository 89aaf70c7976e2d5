"""Finds what a user means by MODEL: a folder, or a repo on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..checkpoint.source import LocalSource, Source
from ..errors import UsageError

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO = re.compile(rf"({_PART}/{_PART})(?:@(\S+))?", re.ASCII)
_PAGE = re.compile(rf"({_PART}/{_PART})(?:/(?:tree|commit)/(refs%2F\w+%2F\w+|refs/\w+/\w+|[^/]+))?/?", re.ASCII)
HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")


def parse_repo(text: str) -> tuple[str, str | None] | None:
    """(repo id, revision) of `org/name[@revision]`, `hf://org/name[@revision]` or a page's address; None of else.

    Addresses are those of huggingface.co, and of the host that HF_ENDPOINT names. Raises UsageError when that is none.
    """
    hosts = {*HOSTS, _endpoint()}
    if text.startswith(("https://", "http://")):
        try:
            parts = urlsplit(text)
        except ValueError:  # brackets that hold no IPv6 address
            return None
        m = _PAGE.fullmatch(parts.path.removeprefix("/"))
        return (m[1], unquote(m[2]) if m[2] else None) if m and parts.netloc in hosts else None
    m = _REPO.fullmatch(text.removeprefix("hf://").removeprefix("models/" if text.startswith("hf://") else ""))
    return (m[1], m[2]) if m and "--" not in m[1] and ".." not in m[1] else None


def _endpoint() -> str:
    try:
        return urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.rpartition("@")[2]
    except ValueError:
        raise UsageError("HF_ENDPOINT is no address") from None


def open_source(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """The folder of that name if there is one, else the repo on the Hub. What is no string is always a folder.

    `revision` is a branch, tag or commit of a repo. Raises UsageError for neither of the two, HubError when the Hub
    cannot serve it.
    """
    if not isinstance(model, str) or os.path.lexists(model):
        if revision is not None:
            raise UsageError("is a folder, which has no --revision", where=os.fspath(model))
        return LocalSource.open(Path(model))
    found = parse_repo(model)
    if found is None:
        raise UsageError(
            "no such folder", where=model, hint="MODEL is a folder, or a repo on the Hub: org/name[@revision]."
        )
    repo, own = found
    if own and revision and own != revision:
        raise UsageError(f"--revision {revision} contradicts it", where=model)
    from .source import HubSource  # here, since a scan of a folder must not wait for huggingface_hub

    return HubSource.open(repo, revision or own)
