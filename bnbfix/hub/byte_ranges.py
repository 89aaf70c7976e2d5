"""Byte ranges of HTTP: near ranges merged into one request, and a server's answers checked. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from ..checkpoint.source import MAX_DEPTH
from ..errors import HubError

# Unused bytes that may come between two ranges of one request. A request costs a round trip, in which a usual line
# carries more than this; of 600 quant states no more than 40 MB could be wasted, 0.2% of a 20 GB checkpoint.
GAP = 64 << 10

_DRIVE = re.compile(r"[A-Za-z]:")  # on Windows, C:x is in another folder
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class MergedRange:
    """A range of a file that is fetched at once, and the wanted ranges in it."""

    offset: int
    length: int
    members: tuple[tuple[int, int, int], ...]  # (index among the wanted ranges, offset, length)

    def split(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return (index, bytes) of every member, from the merged range's bytes."""
        return [(i, data[at - self.offset : at - self.offset + n]) for i, at, n in self.members]


def merge_ranges(ranges: Sequence[tuple[int, int]], gap: int = GAP) -> list[MergedRange]:
    """Return the fewest ranges that cover every (offset, length), with gaps of at most `gap` unused bytes."""
    merged: list[tuple[int, int, list[tuple[int, int, int]]]] = []  # (begin, end, members)
    for offset, length, index in sorted((offset, length, i) for i, (offset, length) in enumerate(ranges)):
        if merged and offset - merged[-1][1] <= gap:
            begin, end, members = merged[-1]
            merged[-1] = (begin, max(end, offset + length), [*members, (index, offset, length)])
        else:
            merged.append((offset, offset + length, [(index, offset, length)]))
    return [MergedRange(begin, end - begin, tuple(members)) for begin, end, members in merged]


def content_range_error(content_range: str | None, offset: int, length: int, size: int) -> str | None:
    """Describe how a Content-Range differs from the request; None when it matches. `size` is the whole file's."""
    m = _CONTENT_RANGE.fullmatch((content_range or "").strip())
    if m is None:
        return f"sent an invalid Content-Range ({content_range!r})"
    if (int(m[1]), int(m[2])) != (offset, offset + length - 1):
        return f"sent bytes {int(m[1]):,} to {int(m[2]):,} instead of {offset:,} to {offset + length - 1:,}"
    if m[3] != "*" and int(m[3]) != size:
        return f"says that the file has {int(m[3]):,} bytes, the listing said {size:,}: it changed meanwhile"
    return None


def url_origin(url: str) -> tuple[str, str | None, int | None]:
    """Return (scheme, host, port): a token is sent to one of these only."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def resolve_redirect(url: str, location: str, where: str) -> str:
    """Return the address that a redirect leads to; raises HubError if it is not HTTP, or gives up encryption."""
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    if not location or new.scheme not in ("https", "http") or (old.scheme, new.scheme) == ("https", "http"):
        raise HubError("unsafe redirect: not HTTP, or from HTTPS to HTTP", where=where)
    return target


def check_file_name(name: str, where: str) -> str:
    """Return a listed name, which will name a file here; raises HubError if it could leave its folder."""
    parts = name.split("/")
    leaves = not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or any(_DRIVE.match(part) for part in parts)
    if leaves or "\0" in name or len(parts) > MAX_DEPTH:
        raise HubError(f"lists {name[:300]!r}, which is not a valid file name", where=where)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise HubError(f"lists {name[:300]!r}, a file name with half a surrogate pair in it", where=where) from None
    return name
