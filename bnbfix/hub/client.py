"""How to talk to the Hub: patience with what passes, words for what does not, one commit for a push.

Beside hub.py the only module that imports huggingface_hub. What others raise is never chained to our errors: their
words may hold signed addresses, or a header with the token.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

from ..errors import BnbfixError, HubError, UsageError
from .refusals import LOG_IN, HubRequest, hub_error

TRIES = 5
FIRST_WAIT, LAST_WAIT = 0.5, 8.0  # seconds between tries, doubled each time
PATIENCE = 60.0  # seconds; a 429 that asks for more is an error at once
RETRIED = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


class RetryableError(Exception):
    """A try that failed and may be repeated after `wait` seconds (None: as usual); `error` is what it comes to."""

    def __init__(self, error: HubError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


def describe_request(repo: str, revision: str | None, file: str | None = None) -> HubRequest:
    """What is about to be asked of the Hub, for the words of an error."""
    parts = urlsplit(constants.ENDPOINT)
    return HubRequest(
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", repo, revision, get_token() is not None, file
    )


def retry(work: Callable[[], T], asked: HubRequest, tries: int = TRIES, stop: threading.Event | None = None) -> T:
    """Does it, again after failures that may pass, until `stop` is set. Raises HubError, and UsageError for a name
    that cannot be.
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
            raise UsageError("is no name that a model on the Hub can have", where=asked.repo) from None
        except NoAnswer as e:
            error = no_answer_error(e, asked)
        except UnicodeEncodeError:
            raise HubError("HF_TOKEN holds characters that no token has", where=asked.where, hint=LOG_IN) from None
        except LocalEntryNotFoundError as e:
            raise no_answer_error(e.__cause__ or e, asked) from None
        if left and stop.wait(pause if wait is None else wait):
            break
        pause = min(LAST_WAIT, pause * 2)
    raise error from None


@contextmanager
def wrap_errors(asked: HubRequest, left: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Makes a HubError of what is raised over an answer without sense: a page for people, a redirect to no address.

    The kinds in `left` are left as they are.
    """
    try:
        yield
    except (BnbfixError, OSError):
        raise
    except left:  # mypy takes no tuple with a star
        raise
    except Exception as e:  # urllib, httpx and huggingface_hub each raise what they stumble over, of any kind
        what = type(e).__name__  # and no more of it: their words may hold signed addresses
        raise HubError(
            f"{asked.endpoint} sent what no Hub would send ({what})", where=asked.where, hint="Is HF_ENDPOINT a Hub?"
        ) from None


def no_answer_error(error: BaseException, asked: HubRequest) -> HubError:
    """The error for what a client raised instead of an answer, or around one."""
    if isinstance(error, HfHubHTTPError):
        found = error_from_response(error.response, asked)
        return found if isinstance(found, HubError) else found.error
    words = redact_token(str(error)) or type(error).__name__
    hint = "Is there a network? HF_HUB_OFFLINE=1 uses what is in the local cache."
    return HubError(f"no answer from {asked.endpoint} ({words})", where=asked.where, hint=hint)


def error_from_response(answer: Any, asked: HubRequest) -> HubError | RetryableError:
    """What a status means: an error at once, or one that may pass."""
    headers, status = answer.headers, answer.status_code
    after = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"r=0\b.*?\bt=(\d+)", headers.get("RateLimit", "")
    )
    wait = float(after[1]) if after and status in (429, 503) else None
    error = hub_error(status, headers.get("X-Error-Code"), asked, wait)
    return RetryableError(error, wait) if status in RETRIED and (wait or 0) <= PATIENCE else error


def redact_token(text: str) -> str:
    """Without the token, which a client quotes when it cannot be sent."""
    token = get_token()
    return text.replace(token, "***") if token else text


def guard_cache() -> None:
    """From now on refuses answers that would make huggingface_hub write outside its cache.

    It names a file after the ETag, whatever that is, and nothing but the answer itself can be asked in time.
    """
    client = get_session()
    if _stays_in_cache not in (hooks := client.event_hooks)["response"]:
        client.event_hooks = {**hooks, "response": [*hooks["response"], _stays_in_cache]}


def _stays_in_cache(answer: Any) -> None:
    etag = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
    if answer.request.method == "HEAD" and not {"/", "\\", "\0"}.isdisjoint(etag.removeprefix("W/")):
        raise HubError("the Hub names a file so that it would leave the cache", hint="Is HF_ENDPOINT a Hub?")


def check_login() -> None:
    """Raises HubError when there is no token to push with."""
    if get_token() is None:
        raise HubError("pushing needs a token, and there is none", hint=LOG_IN)


@contextmanager
def silence() -> Iterator[None]:
    """huggingface_hub's own progress bars off, but where HF_HUB_DISABLE_PROGRESS_BARS decides."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def make_repo(repo: str, *, private: bool) -> None:
    """Makes a repo, unless it is there. Raises HubError."""
    asked = describe_request(repo, None)
    with wrap_errors(asked):
        retry(lambda: HfApi().create_repo(repo, private=private or None, exist_ok=True), asked)


def commit(
    folder: Path,
    repo: str,
    files: Iterable[str],
    removed: Iterable[str],
    message: str,
    *,
    create_pr: bool,
    parent: str | None,
) -> tuple[str, str]:
    """Commits files of a folder to a repo and returns (address of the commit or pull request, sha). Raises HubError.

    One commit, where `upload_folder` may make several: nobody ever loads half of a repaired checkpoint. What a push
    that broke off had uploaded is not uploaded again.
    """
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete]
    operations = [CommitOperationAdd(f, str(folder / f)) for f in files]
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
    except (ValueError, RuntimeError) as e:  # huggingface_hub's words for a card it refuses, or an upload that failed
        if isinstance(e.__cause__, (HfHubHTTPError, NoAnswer)):
            raise no_answer_error(e.__cause__, asked) from None
        raise HubError(f"cannot be pushed: {redact_token(str(e))}", where=repo) from None
    return done.pr_url or done.commit_url, done.oid


def counting(step: Callable[[int], None]) -> type[tqdm]:
    """A progress bar that shows nothing and counts."""

    class Counting(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]  # tqdm has no types

        def update(self, n: float | None = 1) -> None:
            step(int(n or 0))

        # With these, downloads through Xet use one bar for what arrives and what is put together of it, not two.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
            pass

    return Counting
