"""A repo as a source, and the retries of its client, with the answers of huggingface_hub replaced."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled

from bnbfix.errors import HubError, InputError, UsageError
from bnbfix.hub import client as hub_client
from bnbfix.hub import source as hub
from bnbfix.hub.client import (
    NoAnswer,
    RetryableError,
    abort_xet,
    bound_answers,
    commit,
    describe_request,
    guard_session,
    retry,
    silence,
)
from bnbfix.hub.parallel import run_parallel
from bnbfix.hub.source import KEPT, HubSource
from tests.support.hub import Hub

SHA = "a" * 40
TOKEN = "hf_MustNeverBeShown"
ASKED = describe_request("org/parts", None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setattr(hub_client, "get_token", lambda: TOKEN)


def source(**files: int) -> HubSource:
    return HubSource("org/parts", SHA, "org/parts", files)


# The listing


def listing(monkeypatch: pytest.MonkeyPatch, sha: Any, **sizes: Any) -> HubSource:
    listed = [SimpleNamespace(rfilename=name, size=size, lfs=None) for name, size in sizes.items()]
    api = SimpleNamespace(model_info=lambda *args, **options: SimpleNamespace(sha=sha, siblings=listed))
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return HubSource.open("org/parts")


@pytest.mark.parametrize("sha", [None, "", "main", "A" * 40, "a" * 39, "a" * 65, 7])
def test_an_answer_without_a_commit_is_not_a_hub_s(monkeypatch: pytest.MonkeyPatch, sha: Any) -> None:
    with pytest.raises(HubError, match="org/parts: the Hub names no commit") as caught:
        listing(monkeypatch, sha)
    assert caught.value.hint == "Is HF_ENDPOINT a Hub?"


@pytest.mark.parametrize("size", [None, -1, True, "10", 1.0])
def test_a_listing_without_sizes_is_refused(monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    with pytest.raises(HubError, match=r"org/parts: config\.json: the Hub does not say how large it is"):
        listing(monkeypatch, SHA, **{"config.json": size})


def test_records_of_git_and_of_downloads_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("config.json", ".git/config", ".cache/huggingface/x", "sub/.cache/x", ".gitattributes", "sub/a.cache")
    found = listing(monkeypatch, SHA, **dict.fromkeys(names, 1))
    assert set(found.files) == {"config.json", ".gitattributes"}
    assert set(found.with_subfolders().files) == {"config.json", ".gitattributes", "sub/a.cache"}
    assert (found.revision, found.origin) == (SHA, {"repo": "org/parts", "revision": SHA})


# Reading


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are asked of the Hub, whose files count from 0 to 250 again and again."""
    seen: list[tuple[int, int]] = []

    def stream(method: str, url: str, *, headers: dict[str, str], **options: object) -> Any:
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        seen.append((first, last - first + 1))
        data = bytes(i % 251 for i in range(first, last + 1))
        answer = {"Content-Range": f"bytes {first}-{last}/*"}
        return nullcontext(SimpleNamespace(status_code=206, headers=answer, iter_raw=lambda: [data]))

    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(stream=stream))
    return seen


def test_a_range_beyond_the_listed_size_is_not_asked_for(asked: list[tuple[int, int]]) -> None:
    with pytest.raises(InputError, match="file: ended at byte 10 while it was being read"):
        source(file=10).read("file", [(0, 2), (5, 6)])
    assert asked == [] and source(file=10).read("file", [(5, 5)]) == [bytes(range(5, 10))]


def test_short_pieces_are_read_once_and_long_ones_are_not_kept(asked: list[tuple[int, int]]) -> None:
    s = source(file=4 * KEPT)
    for length, times in ((KEPT - 1, 1), (KEPT, 2)):
        asked.clear()
        assert s.read("file", [(3, length)]) == s.read("file", [(3, length)])
        assert asked == [(3, length)] * times


# Whole files


Download = Callable[..., str]


def downloading(monkeypatch: pytest.MonkeyPatch, download: Download) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", download)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "cannot be downloaded (No space left on device)"),
        (RuntimeError(f"header 'Bearer {TOKEN}' refused"), "cannot be downloaded (header 'Bearer ***' refused)"),
        (ValueError("odd"), "cannot be downloaded (odd)"),
    ],
    ids=["full", "token", "value"],
)
def test_a_download_that_fails_is_an_error_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*args: object, **options: object) -> str:
        raise error

    downloading(monkeypatch, fail)
    with pytest.raises(HubError) as caught:
        source(file=10).fetch("file")
    assert str(caught.value) == f"org/parts: file: {words}"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__, "what it says is said, no more"


def test_a_download_of_another_length_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    downloading(monkeypatch, lambda *args, **options: str(tmp_path / "file"))
    with pytest.raises(HubError, match="org/parts: file: came with 3 bytes of 10"):
        source(file=10).fetch("file")


def test_a_file_is_fetched_once_and_forgotten_only_where_it_was_put(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Path | None] = []

    def download(repo: str, file: str, *, revision: str, local_dir: Path | None, tqdm_class: type) -> str:
        assert (repo, revision) == ("org/parts", SHA)
        calls.append(local_dir)
        path = (local_dir or tmp_path / "cache") / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0123456789")
        return str(path)

    downloading(monkeypatch, download)
    s, folder = source(a=10, b=10), tmp_path / "fetched"
    for _ in range(2):
        s.fetch("a")
        s.fetch("b", folder)
    assert calls == [None, folder] and s.read("b", [(2, 3)]) == [b"234"]
    for name in ("a", "b", "b"):
        s.forget(name, folder)
    assert (tmp_path / "cache" / "a").exists() and s.local_path("a") == tmp_path / "cache" / "a"
    assert not (folder / "b").exists() and s.local_path("b") is None
    s.fetch("b", folder)
    assert calls == [None, folder, folder] and (folder / "b").exists()


def test_the_hooks_of_the_session_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session, during = get_session(), []
    before = {event: list(hooks) for event, hooks in session.event_hooks.items()}

    def download(*args: object, **options: object) -> str:
        during.append(len(session.event_hooks["response"]))
        (tmp_path / "file").write_bytes(b"0123456789")
        return str(tmp_path / "file")

    downloading(monkeypatch, download)
    source(file=10).fetch("file")
    with pytest.raises(ZeroDivisionError), guard_session(), guard_session():
        1 / 0  # noqa: B018
    assert during == [len(before["response"]) + 1]
    assert session.event_hooks == before


# Retries


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_a_name_that_cannot_be_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="org/parts: is not a valid repo id"):
        retry(raising(HFValidationError("no")), ASKED)


def test_a_file_that_is_not_in_the_cache_is_an_error_with_its_reason() -> None:
    error = LocalEntryNotFoundError("huggingface_hub's own words")
    error.__cause__ = TimeoutError(f"timed out with {TOKEN}")
    with pytest.raises(HubError, match=r"no answer from https?://\S+ \(timed out with \*\*\*\)"):
        retry(raising(error), ASKED)


def test_retries_are_logged_without_the_token(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.0)
    errors = [NoAnswer(f"refused with {TOKEN}"), RetryableError(HubError("busy"), 0)]

    def work() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    with caplog.at_level(logging.INFO, "bnbfix"):
        assert retry(work, ASKED) == "done"
    first, second = (record.getMessage() for record in caplog.records)
    assert "refused with ***" in first and first.endswith("trying again in 0.0 s, 4 tries left")
    assert second == "busy; trying again in 0.0 s, 3 tries left"


def test_a_retry_that_is_stopped_does_not_wait() -> None:
    tries = []

    def work(job: int) -> None:
        if job == 0:
            raise HubError("refused")
        tries.append(1)
        raise RetryableError(HubError("busy"), 3600)

    with pytest.raises(HubError, match="refused"):
        run_parallel(lambda job: retry(lambda: work(job), ASKED), [1, 0], 2, name="test")
    assert len(tries) == 1


@pytest.mark.parametrize("cause", [NoAnswer("the line is dead"), None], ids=["no answer", "none"])
def test_a_failed_push_is_reported_without_the_token(monkeypatch: pytest.MonkeyPatch, cause: Exception | None) -> None:
    def create_commit(*args: object, **options: object) -> None:
        raise RuntimeError(f"upload failed for {TOKEN}") from cause

    monkeypatch.setattr(hub_client, "HfApi", lambda: SimpleNamespace(create_commit=create_commit))
    with pytest.raises(HubError) as caught:
        commit("org/parts", {}, {}, ["old"], "message", create_pr=False, parent=SHA)
    said = str(caught.value)
    if cause is None:
        assert said == "org/parts: cannot be pushed: upload failed for ***"
    else:
        assert said.startswith("org/parts: no answer from ") and said.endswith("(the line is dead)")


@pytest.mark.parametrize(("setting", "inside"), [(None, True), (False, False)], ids=["ours", "the user's"])
def test_progress_bars_are_silenced_unless_the_user_set_them(
    monkeypatch: pytest.MonkeyPatch, setting: bool | None, inside: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", setting)
    monkeypatch.setattr("huggingface_hub.utils.tqdm.HF_HUB_DISABLE_PROGRESS_BARS", setting, raising=False)
    assert not are_progress_bars_disabled()
    with silence():
        assert are_progress_bars_disabled() is inside
    assert not are_progress_bars_disabled()


def test_a_transfer_is_stopped_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []
    name = "huggingface_hub.utils._xet"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(abort_xet_session=lambda: stopped.append(1)))
    abort_xet()
    assert stopped == [1]
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # as in older releases
    abort_xet()
    monkeypatch.delitem(sys.modules, name)
    abort_xet()
    assert stopped == [1]


def test_only_answers_of_the_own_thread_are_bounded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "MAX_ANSWER", 10)

    def ask() -> int:
        answer = get_session().get(f"{hub.server.url}/api/models/org/no-such-repo")
        return len(answer.content)

    with bound_answers():
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(ask).result() > 10
        with pytest.raises(HubError, match="the Hub's answer has more than 10 bytes"):
            ask()
