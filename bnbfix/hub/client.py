"""Talk to the Hub: transient errors are retried, each other error gets its own message, a push is one commit.

Only this module, source.py and listing.py import huggingface_hub. Exceptions of other packages are never chained to our
errors: their messages may hold signed URLs, or a header with the token.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
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
from .limits import answer_limit, patience, read_wait
from .parallel import connections, current_stop, run_parallel

TRIES = 5
FIRST_WAIT, LAST_WAIT = 0.5, 8.0  # seconds between tries, doubled each time
RETRIED = (408, 429, 500, 502, 503, 504)
MAX_REDIRECTS = 10  # of one download
MAX_ANSWER = 200_000_000  # bytes of a listing; that of a repo with 10,000 files has 3 MB
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


def retry(work: Callable[[], T], asked: HubRequest, tries: int = TRIES) -> T:
    """Return the result of `work`, which is repeated after transient errors.

    Raises HubError, and UsageError for an invalid repo id.
    """
    stop = current_stop()
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
            if (get_token() or "").isascii():
                raise HubError("has a name that no address can hold", where=asked.where) from None
            raise HubError(
                "HF_TOKEN has characters that no token has", where=asked.where, hint=LOG_IN, command=LOGIN
            ) from None
        except LocalEntryNotFoundError as e:
            raise no_answer_error(e.__cause__ or e, asked) from None
        if left:
            seconds = pause if wait is None else wait
            logger.info("%s; trying again in %.1f s, %d tries left", error, seconds, left)
            stop.wait(seconds)
        stop.check()
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
    wait = read_wait(status, headers)
    error = hub_error(status, headers.get("X-Error-Code"), asked, wait)
    return RetryableError(error, wait) if status in RETRIED and (wait or 0) <= patience() else error


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
def guard_session() -> Iterator[None]:
    """Watch the requests that huggingface_hub makes, as long as the context lasts.

    It names a file of its cache after the ETag, whatever that is, and only the response itself can be checked in time.
    And it waits for a server as long as its own timeouts, and tries again, whatever happens meanwhile: so that
    `run_parallel` can stop it, each request of this thread asks whether it should. Both are hooks of huggingface_hub's
    session, which the caller's process may use too, and are removed again. Several threads each have their own.
    """
    trace, thread, redirects = stopping_trace(), threading.get_ident(), 0

    def trace_request(request: Any) -> None:
        if threading.get_ident() == thread:
            request.extensions = {**request.extensions, "trace": trace}

    def check_response(answer: Any) -> None:
        nonlocal redirects
        _check_etag(answer)
        redirects += threading.get_ident() == thread and answer.is_redirect
        if redirects > MAX_REDIRECTS:  # huggingface_hub follows those on the same host for ever
            raise HubError(f"the Hub redirects more than {MAX_REDIRECTS} times", hint="Is HF_ENDPOINT a Hub?")

    with hook_session(trace_request, check_response):
        yield


@contextmanager
def bound_answers() -> Iterator[None]:
    """Raise HubError for an answer of this thread that has too many bytes, or takes too long, as long as it lasts."""
    thread = threading.get_ident()

    def bound(answer: Any) -> None:
        if threading.get_ident() == thread:
            answer.iter_bytes = _bound_body(answer.iter_bytes, time.monotonic() + answer_limit())

    with hook_session(lambda request: None, bound):
        yield


def _bound_body(read: Callable[..., Iterator[bytes]], deadline: float) -> Callable[..., Iterator[bytes]]:
    def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
        count = 0
        for chunk in read(chunk_size):
            count += len(chunk)
            if count > MAX_ANSWER:
                raise HubError(f"the Hub's answer has more than {MAX_ANSWER:,} bytes")
            check_deadline(deadline)
            yield chunk

    return iter_bytes


def check_deadline(deadline: float, where: str | None = None) -> None:
    """Raise HubError when the time for an answer is over."""
    if time.monotonic() > deadline:
        words = f"the Hub's answer takes longer than {answer_limit():g} s"
        raise HubError(words, where=where, hint="BNBFIX_HUB_ANSWER_TIMEOUT sets this limit, in seconds.")


@contextmanager
def hook_session(on_request: Callable[[Any], None], on_response: Callable[[Any], None]) -> Iterator[None]:
    """Add hooks to huggingface_hub's session, as long as the context lasts."""
    client, ours = get_session(), {"request": on_request, "response": on_response}
    with _hooks_lock:
        client.event_hooks = {kind: [*hooks, ours[kind]] for kind, hooks in client.event_hooks.items()}
    try:
        yield
    finally:
        with _hooks_lock:
            hooks = {kind: list(hooks) for kind, hooks in client.event_hooks.items()}
            for kind, hook in ours.items():
                hooks[kind].remove(hook)
            client.event_hooks = hooks


def stopping_trace() -> Callable[[str, Mapping[str, Any]], None]:
    """Return what httpx calls with each event of a request: it raises Stopped once this thread has to stop.

    An error would not do, after which huggingface_hub says that it resumes, and does. What is being closed goes on
    to be closed: that may be the garbage collector's work, and what it raises Python prints as a traceback.
    """
    stop = current_stop()

    def trace(event: str, details: Mapping[str, Any]) -> None:
        if "response_closed" not in event and not isinstance(details.get("exception"), GeneratorExit):
            stop.check()
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connections.add(details["return_value"].get_extra_info("socket"))

    return trace


def _check_etag(answer: Any) -> None:
    etag = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
    if answer.request.method == "HEAD" and not {"/", "\\", "\0"}.isdisjoint(etag.removeprefix("W/")):
        raise HubError("the Hub names a file so that it would leave the cache", hint="Is HF_ENDPOINT a Hub?")


def abort_xet() -> None:
    """Stop what hf_xet is transferring: huggingface_hub itself does so only for an interrupt on the same thread."""
    xet = sys.modules.get("huggingface_hub.utils._xet")
    if (abort := getattr(xet, "abort_xet_session", None)) is not None:  # not in every release
        abort()


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

    `copied` maps files to the (repo, revision) that the Hub copies. No user ever loads half of a repaired checkpoint.
    """
    operations: list[Any] = [
        CommitOperationAdd(f, data if isinstance(data, bytes) else str(data)) for f, data in added.items()
    ]
    operations += [CommitOperationCopy(f, f, sha, source, "model") for f, (source, sha) in copied.items()]
    operations += [CommitOperationDelete(f) for f in removed]
    asked = describe_request(repo, parent)

    def create(options: dict[str, Any]) -> Any:
        current_stop().on_interrupt.append(abort_xet)
        with guard_session():
            return retry(lambda: HfApi().create_commit(repo, operations, **options), asked, tries=1)

    options = {"commit_message": message, "create_pr": create_pr, "parent_commit": parent}
    try:
        with wrap_errors(asked, (ValueError, RuntimeError)):
            # One try: a second could make a second commit of one whose answer was lost. On a thread of its own, which
            # an interrupt leaves behind: huggingface_hub waits for the uploads that have begun.
            (done,) = run_parallel(create, [options], 1, name="bnbfix-push")
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
