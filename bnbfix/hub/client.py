"""Talk to the Hub: transient errors are retried, each other error gets its own message, a push is one commit.

Next to source.py this is the only module that imports huggingface_hub. Exceptions of other packages are never chained
to our errors: their messages may hold signed URLs, or a header with the token.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]  # of httpx, whichever it is
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, tqdm  # type: ignore[attr-defined]  # not in __all__

from ..checkpoint.source import Progress
from ..errors import BnbfixError, HubError, UsageError

TRIES = 5
FIRST_WAIT, LAST_WAIT = 0.5, 8.0  # seconds between tries, doubled each time
PATIENCE = 60.0  # seconds; a 429 that asks for more is an error at once
RETRIED = (408, 429, 500, 502, 503, 504)
LOGIN = "hf auth login"
LOG_IN = f"Log in with `{LOGIN}`, or set HF_TOKEN."

logger = logging.getLogger(__name__)
T = TypeVar("T")
_hooks_lock = threading.Lock()


@dataclass(frozen=True)
class HubRequest:
    """A request to the Hub, for the message of an error."""

    endpoint: str  # without a password that may be in it
    repo: str
    revision: str | None
    authorized: bool  # was a token sent?
    file: str | None = None

    @property
    def where(self) -> str:
        return f"{self.repo}: {self.file}" if self.file else self.repo


class RetryableError(Exception):
    """A try that failed and may be repeated after `wait` seconds (None: as usual).

    `error` is what is raised when no try is left.
    """

    def __init__(self, error: HubError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


def describe_request(repo: str, revision: str | None, file: str | None = None) -> HubRequest:
    """Return the request as an error will describe it."""
    parts = urlsplit(constants.ENDPOINT)
    endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return HubRequest(endpoint, repo, revision, get_token() is not None, file)


def retry(work: Callable[[], T], asked: HubRequest, tries: int = TRIES, stop: threading.Event | None = None) -> T:
    """Return the result of `work`, which is repeated after transient errors until `stop` is set.

    Raises HubError, and UsageError for an invalid repo id.
    """
    stop = stop or threading.Event()
    error, pause = HubError("no answer", where=asked.where), FIRST_WAIT
    for left in reversed(range(tries)):
        wait = None
        try:
            return work()
        except OfflineModeIsEnabled:
            raise HubError(
                "offline mode is on (HF_HUB_OFFLINE)", where=asked.where, hint="Unset HF_HUB_OFFLINE."
            ) from None
        except RetryableError as e:
            error, wait = e.error, e.wait
        except HfHubHTTPError as e:
            again = error_from_response(e.response, asked)
            if isinstance(again, HubError):
                raise again from None
            error, wait = again.error, again.wait
        except HFValidationError:
            raise UsageError("is not a valid repo id", where=asked.repo) from None
        except NoAnswer as e:
            error = no_answer_error(e, asked)
        except UnicodeEncodeError:
            raise HubError(
                "HF_TOKEN has characters that no token has", where=asked.where, hint=LOG_IN, command=LOGIN
            ) from None
        except LocalEntryNotFoundError as e:
            raise no_answer_error(e.__cause__ or e, asked) from None
        if left:
            seconds = pause if wait is None else wait
            logger.info("%s; trying again in %.1f s, %d tries left", error, seconds, left)
            if stop.wait(seconds):
                break
        pause = min(LAST_WAIT, pause * 2)
    raise error from None


@contextmanager
def wrap_errors(asked: HubRequest, unwrapped: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise a HubError for whatever an invalid response made another package raise: a page for people, say.

    BnbfixError, OSError and the types in `unwrapped` pass through.
    """
    try:
        yield
    except (BnbfixError, OSError):
        raise
    except unwrapped:  # mypy takes no tuple with a star
        raise
    except Exception as e:  # urllib, httpx and huggingface_hub each raise exceptions of any type
        what = type(e).__name__  # and nothing else of it: its message may hold signed URLs
        raise HubError(
            f"{asked.endpoint} returned an invalid response ({what})", where=asked.where, hint="Is HF_ENDPOINT a Hub?"
        ) from None


def no_answer_error(error: BaseException, asked: HubRequest) -> HubError:
    """Return the error for what a client raised instead of an answer, or around one."""
    if isinstance(error, HfHubHTTPError):
        found = error_from_response(error.response, asked)
        return found if isinstance(found, HubError) else found.error
    reason = redact_token(str(error)) or type(error).__name__
    hint = "Is there a network? HF_HUB_OFFLINE=1 uses only the local cache."
    return HubError(f"no answer from {asked.endpoint} ({reason})", where=asked.where, hint=hint)


def error_from_response(answer: Any, asked: HubRequest) -> HubError | RetryableError:
    """Return what a status means: an error at once, or a transient one."""
    headers, status = answer.headers, answer.status_code
    after = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"r=0\b.*?\bt=(\d+)", headers.get("RateLimit", "")
    )
    wait = float(after[1]) if after and status in (429, 503) else None
    error = hub_error(status, headers.get("X-Error-Code"), asked, wait)
    return RetryableError(error, wait) if status in RETRIED and (wait or 0) <= PATIENCE else error


def hub_error(status: int, code: str | None, asked: HubRequest, wait: float | None = None) -> HubError:
    """Return the error for an HTTP status and the Hub's own X-Error-Code; `wait` is what a 429 asks for, in seconds."""
    message, hint = _describe_status(status, code, asked, wait)
    return HubError(message, where=asked.where, hint=hint, command=LOGIN if hint and LOG_IN in hint else None)


def _describe_status(status: int, code: str | None, asked: HubRequest, wait: float | None) -> tuple[str, str | None]:
    page = f"{asked.endpoint}/{asked.repo}"
    if code == "GatedRepo":
        if asked.authorized:
            return "is gated, and your account has no access to it (HTTP 403)", f"Ask for access at {page}."
        return f"is gated, and no token was sent (HTTP {status})", f"Ask for access at {page}. {LOG_IN}"
    if status == 401 and asked.authorized:
        return "the Hub does not accept your token (HTTP 401)", LOG_IN
    if status == 401 or code == "RepoNotFound":
        hint = "Check the name: there is no such folder either." + ("" if asked.authorized else f" {LOG_IN}")
        return f"no such model on {asked.endpoint}, or it is private (HTTP {status})", hint
    if status == 403:
        if asked.authorized:
            hint = "Check its permissions at https://huggingface.co/settings/tokens."
            return "your token does not allow this (HTTP 403)", hint
        return "the Hub does not allow this (HTTP 403)", LOG_IN
    if code == "RevisionNotFound":
        return f"has no revision {asked.revision!r} (HTTP 404)", f"Branches, tags and commits are listed at {page}."
    if status == 404 and asked.file:
        return "is no longer there (HTTP 404), though the Hub listed it", "Try again."
    if status == 404:
        return f"{asked.endpoint} has no such page (HTTP 404)", "Is HF_ENDPOINT a Hub?"
    if status == 429:
        after = f"; it asks to wait {wait:,.0f} s" if wait else ""
        hint = "Wait, then run it again." + ("" if asked.authorized else " With a token the limit is higher.")
        return f"rate limited by the Hub (HTTP 429){after}", hint
    if status == 416:
        return "no longer has the bytes that the listing promised (HTTP 416): it changed meanwhile", "Run it again."
    if status >= 500:
        return f"the Hub fails (HTTP {status})", "See https://status.huggingface.co, and try again later."
    return f"the Hub answers with HTTP {status}", None


def redact_token(text: str) -> str:
    """Replace the token, which a client quotes when it cannot be sent."""
    token = get_token()
    return text.replace(token, "***") if token else text


@contextmanager
def guard_cache() -> Iterator[None]:
    """Refuse responses that would make huggingface_hub write outside its cache, as long as the context lasts.

    It names a file after the ETag, whatever that is, and only the response itself can be checked in time: so the check
    is a hook of huggingface_hub's session, which the caller's process may use too, and is removed again. Downloads in
    several threads each have their own.
    """
    client = get_session()
    with _hooks_lock:
        client.event_hooks = client.event_hooks | {"response": [*client.event_hooks["response"], _check_etag]}
    try:
        yield
    finally:
        with _hooks_lock:
            hooks = list(client.event_hooks["response"])
            hooks.remove(_check_etag)
            client.event_hooks = client.event_hooks | {"response": hooks}


def _check_etag(answer: Any) -> None:
    etag = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
    if answer.request.method == "HEAD" and not {"/", "\\", "\0"}.isdisjoint(etag.removeprefix("W/")):
        raise HubError("the Hub names a file so that it would leave the cache", hint="Is HF_ENDPOINT a Hub?")


def check_login() -> None:
    """Raise HubError when there is no token to push with."""
    if get_token() is None:
        raise HubError("pushing needs a token, and there is none", hint=LOG_IN, command=LOGIN)


@contextmanager
def silence() -> Iterator[None]:
    """Turn off huggingface_hub's progress bars, unless HF_HUB_DISABLE_PROGRESS_BARS decides."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def make_repo(repo: str, *, private: bool) -> None:
    """Create a repo unless it exists. Raises HubError."""
    asked = describe_request(repo, None)
    with wrap_errors(asked):
        retry(lambda: HfApi().create_repo(repo, private=private or None, exist_ok=True), asked)


def commit(
    repo: str,
    added: Mapping[str, Path | bytes],
    copied: Mapping[str, tuple[str, str]],
    removed: Iterable[str],
    message: str,
    *,
    create_pr: bool,
    parent: str | None,
) -> tuple[str, str]:
    """Commit files to a repo and return (URL of the commit or pull request, sha). Raises HubError.

    `copied` maps files to the (repo, revision) that the Hub takes them from by itself. It is one commit, where
    `upload_folder` may make several: no user ever loads half of a repaired checkpoint. Files that an interrupted push
    had uploaded are not uploaded again.
    """
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]
    operations = [CommitOperationAdd(f, data if isinstance(data, bytes) else str(data)) for f, data in added.items()]
    operations += [
        CommitOperationCopy(f, f, src_revision=revision, src_repo_id=source, src_repo_type="model")
        for f, (source, revision) in copied.items()
    ]
    operations += [CommitOperationDelete(f) for f in removed]
    asked = describe_request(repo, parent)
    try:
        with wrap_errors(asked, (ValueError, RuntimeError)):
            done = retry(
                lambda: HfApi().create_commit(
                    repo, operations, commit_message=message, create_pr=create_pr, parent_commit=parent
                ),
                asked,
                tries=1,
            )  # a second try could make a second commit of one whose answer was lost
    except (ValueError, RuntimeError) as e:  # of a card that huggingface_hub refuses, or a failed upload
        if isinstance(e.__cause__, (HfHubHTTPError, NoAnswer)):
            raise no_answer_error(e.__cause__, asked) from None
        raise HubError(f"cannot be pushed: {redact_token(str(e))}", where=repo) from None
    return done.pr_url or done.commit_url, done.oid


def counting_bar(step: Progress) -> type[tqdm]:
    """Return a progress bar class that shows nothing and reports bytes to `step`."""

    class Counting(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            # tqdm has no types
            super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            step(int(n or 0))

        # With these, downloads through Xet use one bar for bytes received and bytes reconstructed, not two.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
            pass

    return Counting
