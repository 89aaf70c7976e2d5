"""Find what a user means by MODEL: a folder, or a repo on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..checkpoint.source import LocalSource, Source
from ..errors import UsageError

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REPO = rf"({_PART}/{_PART})(?:@(\S+))?"
_PAGE = rf"({_PART}/{_PART})(?:/(?:tree|commit)/(refs%2F\w+%2F\w+|refs/\w+/\w+|[^/]+))?/?"
HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")


def parse_repo(text: str) -> tuple[str, str | None] | None:
    """Return (repo id, revision) of `org/name[@revision]`, `hf://org/name[@revision]` or a page's URL, else None.

    URLs are those of huggingface.co, and of the host that HF_ENDPOINT names; raises UsageError when that is not a URL.
    """
    hosts = {*HOSTS, _endpoint_host()}
    if text.startswith(("https://", "http://")):
        try:
            parts = urlsplit(text)
        except ValueError:  # brackets without an IPv6 address
            return None
        m = re.fullmatch(_PAGE, parts.path.removeprefix("/"), re.ASCII)
        return (m[1], unquote(m[2]) if m[2] else None) if m and parts.netloc in hosts else None
    name = text.removeprefix("hf://").removeprefix("models/" if text.startswith("hf://") else "")
    m = re.fullmatch(_REPO, name, re.ASCII)
    return (m[1], m[2]) if m and "--" not in m[1] and ".." not in m[1] else None


def _endpoint_host() -> str:
    try:
        return urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.rpartition("@")[2]
    except ValueError:
        raise UsageError("HF_ENDPOINT is not a valid URL") from None


def open_source(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open the folder of that name if there is one, else the repo on the Hub.

    Args:
        model: A folder, or `org/name[@revision]`. What is not a string is always a folder.
        revision: Branch, tag or commit of a repo.

    Raises:
        UsageError: `model` is neither of the two, or does not agree with `revision`.
        HubError: The Hub cannot serve the repo.
    """
    if not isinstance(model, str) or os.path.lexists(model):
        if revision is not None:
            raise UsageError(f"is a folder, which has no revision {revision!r}", where=os.fspath(model))
        return LocalSource.open(Path(model))
    found = parse_repo(model)
    if found is None:
        raise UsageError(
            "no such folder", where=model, hint="A model is a folder, or a repo on the Hub: org/name[@revision]."
        )
    repo, own = found
    if own and revision and own != revision:
        raise UsageError(f"names revision {own!r}, not {revision!r}", where=model)
    from .source import HubSource  # here, since a scan of a folder must not wait for huggingface_hub

    return HubSource.open(repo, revision or own)
