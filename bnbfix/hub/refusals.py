"""What the Hub's refusals mean, in words that say what to do next. Pure: no network, no huggingface_hub."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import HubError


@dataclass(frozen=True)
class HubRequest:
    """What was asked of the Hub, for the words of an error. `authorized`: a token went along."""

    endpoint: str  # without a password that may be in it
    repo: str
    revision: str | None
    authorized: bool
    file: str | None = None

    @property
    def where(self) -> str:
        return f"{self.repo}: {self.file}" if self.file else self.repo


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN."


def hub_error(status: int, code: str | None, asked: HubRequest, wait: float | None = None) -> HubError:
    """The error for an HTTP status and the Hub's own X-Error-Code. `wait` is what a 429 asks for, in seconds."""
    message, hint = _words(status, code, asked, wait)
    return HubError(message, where=asked.where, hint=hint)


def _words(status: int, code: str | None, asked: HubRequest, wait: float | None) -> tuple[str, str | None]:
    page = f"{asked.endpoint}/{asked.repo}"
    if code == "GatedRepo":
        if asked.authorized:
            return "is gated, and your account has no access to it (HTTP 403)", f"Ask for access at {page}."
        return f"is gated, and no token was sent (HTTP {status})", f"Ask for access at {page}. {LOG_IN}"
    if status == 401 and asked.authorized:
        return "the Hub does not accept your token (HTTP 401)", LOG_IN
    if status == 401 or code == "RepoNotFound":
        hint = "Look at the name: there is no such folder either." + ("" if asked.authorized else f" {LOG_IN}")
        return f"no such model on {asked.endpoint}, or it is private (HTTP {status})", hint
    if status == 403:
        if asked.authorized:
            return (
                "your token does not allow this (HTTP 403)",
                "See what it may do at https://huggingface.co/settings/tokens.",
            )
        return "the Hub does not allow this (HTTP 403)", LOG_IN
    if code == "RevisionNotFound":
        return f"has no revision {asked.revision!r} (HTTP 404)", f"Branches, tags and commits are listed at {page}."
    if status == 404 and asked.file:
        return "is not there any more (HTTP 404), though the Hub listed it", "Try again."
    if status == 404:
        return f"{asked.endpoint} has no such page (HTTP 404)", "Is HF_ENDPOINT a Hub?"
    if status == 429:
        after = f"; it asks to wait {wait:,.0f} s" if wait else ""
        hint = "Wait, then run it again." + ("" if asked.authorized else " With a token the limit is higher.")
        return f"the Hub had too many requests from here (HTTP 429){after}", hint
    if status == 416:
        return "no longer has the bytes that the listing promised (HTTP 416): it changed meanwhile", "Run it again."
    if status >= 500:
        return f"the Hub fails (HTTP {status})", "See https://status.huggingface.co, and try again later."
    return f"the Hub answers with HTTP {status}", None
