"""Byte ranges as HTTP knows them: near ones merged into one request, and what a server says, checked. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from ..checkpoint.source import MAX_DEPTH
from ..errors import HubError

# Bytes that may lie unasked between two ranges of one request. A request costs a round trip, in which a usual line
# carries more than this; of 600 quant states no more than 40 MB could be wasted, 0.2% of a 20 GB checkpoint.
GAP = 64 << 10

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class MergedRange:
    """A stretch of a file fetched at once, and the ranges asked for that lie in it, by their place in the question."""

    offset: int
    length: int
    members: tuple[tuple[int, int, int], ...]  # (place, offset, length)

    def cut(self, data: bytes) -> list[tuple[int, bytes]]:
        """(place, bytes) of every member, from the span's bytes."""
        return [(i, data[at - self.offset : at - self.offset + n]) for i, at, n in self.members]


def merge_ranges(ranges: Sequence[tuple[int, int]], gap: int = GAP) -> list[MergedRange]:
    """The fewest spans that hold every (offset, length), with no more than `gap` unasked bytes between neighbours."""
    spans: list[tuple[int, int, list[tuple[int, int, int]]]] = []  # (begin, end, members)
    for offset, length, place in sorted((offset, length, i) for i, (offset, length) in enumerate(ranges)):
        if spans and offset - spans[-1][1] <= gap:
            begin, end, members = spans[-1]
            spans[-1] = (begin, max(end, offset + length), [*members, (place, offset, length)])
        else:
            spans.append((offset, offset + length, [(place, offset, length)]))
    return [MergedRange(begin, end - begin, tuple(members)) for begin, end, members in spans]


def content_range_error(content_range: str | None, offset: int, length: int, size: int) -> str | None:
    """What a Content-Range says that was not asked for, in words; None when it fits. `size` is the whole file's."""
    m = _CONTENT_RANGE.fullmatch((content_range or "").strip())
    if m is None:
        return f"sent no Content-Range that makes sense ({content_range!r})"
    if (int(m[1]), int(m[2])) != (offset, offset + length - 1):
        return f"sent bytes {int(m[1]):,} to {int(m[2]):,} where {offset:,} to {offset + length - 1:,} were asked for"
    if m[3] != "*" and int(m[3]) != size:
        return f"says that the file has {int(m[3]):,} bytes, the listing said {size:,}: it changed meanwhile"
    return None


def url_origin(url: str) -> tuple[str, str | None, int | None]:
    """(scheme, host, port): what a token may be sent to is one of these."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def resolve_redirect(url: str, location: str, where: str) -> str:
    """The address that a redirect leads to. Raises HubError for one that is no HTTP, or gives up on encryption."""
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    if not location or new.scheme not in ("https", "http") or (old.scheme, new.scheme) == ("https", "http"):
        raise HubError("redirects to where nothing safe can be read", where=where)
    return target


def safe_name(name: str, where: str) -> str:
    """A listed name, which will name a file here; raises HubError for one that could leave its folder."""
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or "\0" in name or len(parts) > MAX_DEPTH:
        raise HubError(f"lists {name[:300]!r}, which is no name for a file", where=where)
    return name
