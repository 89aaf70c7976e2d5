"""Each way in which the Hub, its CDN or the network can fail has its own error; none costs a large read, or a token."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from bnbfix.hub.client import HubRequest, hub_error
from tests.support.build import Make
from tests.support.hub import Hub
from tests.support.hub_server import TOKEN, FakeHub

WRONG = "hf_WrongTokenThatIsNeverShown"


@pytest.fixture
def repo(hub: Hub, checkpoint: Make) -> str:
    """A repo whose shard is a sparse file of 4 GB: the tail is one tensor of zeros."""
    from tests.support import surgery

    source = checkpoint("e4b", "all")
    shard = source / "model.safetensors"
    header, data = surgery.read_file(shard)
    extra = 4 << 30
    name = "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"
    header[name] = {"dtype": "BF16", "shape": [extra // 2], "data_offsets": [len(data), len(data) + extra]}
    surgery.write_file(shard, header, data)
    with shard.open("r+b") as f:
        f.truncate(shard.stat().st_size + extra)
    hub.server.add("org/model", source)
    return "org/model"


SHARD = {"path": "model.safetensors"}
NONSENSE = "returned an invalid response ("
CHANGED = "org/model: model.safetensors: changed on the Hub while it was being read"


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        # What comes is not what was asked for
        ({"kind": "ignores ranges"}, "ignores byte ranges (HTTP 200) and would send all 4,", "HF_ENDPOINT"),
        ({"kind": "short"}, "sent 131,071 of the 131,072 requested bytes", ""),
        ({"kind": "long"}, "sends more than the 131,072 requested bytes", ""),
        ({"kind": "wrong range"}, "sent bytes 1 to 131,072 instead of 0 to 131,071", "proxy"),
        ({"kind": "no Content-Range"}, "sent an invalid Content-Range (None)", "proxy"),
        ({"kind": "grown"}, "bytes, the listing said 4,", "Run it again"),
        ({"kind": "gzip"}, "compresses byte ranges, so they cannot be used", ""),
        ({"kind": "etag"}, CHANGED, "Run it again"),
        ({"kind": "changed", "origin": "hub"}, CHANGED, "Run it again"),
        ({"kind": "commit", "origin": "hub"}, "the Hub answers with commit ffffffffffff, not ", ""),
        ({"kind": "elsewhere", "origin": "hub", "headers": {"Location": "file:///etc/passwd"}}, "unsafe redirect", ""),
        (
            {
                "kind": "elsewhere",
                "origin": "hub",
                "headers": {"Location": "/org/model/resolve/main/model.safetensors"},
            },
            "redirects more than 10 times",
            "",
        ),
        (
            {"kind": "elsewhere", "origin": "hub", "headers": {"Location": "http://[/?signature=1"}},
            NONSENSE,
            "HF_ENDPOINT",
        ),
        ({"kind": "elsewhere", "origin": "hub", "headers": {"Location": "http://h:99999/"}}, NONSENSE, "HF_ENDPOINT"),
        # httpx says it in its own words in some releases.
        ({"kind": "elsewhere", "origin": "hub", "headers": {"Location": "http://127.0.0.1:1/\x7f"}}, "127.0.0.1:", ""),
        ({"kind": "elsewhere", "origin": "hub", "headers": {"Location": "http://a..b/"}}, NONSENSE, ""),
        # Refusals
        ({"kind": 401, "origin": "hub", "path": "/api/models"}, "no such model on http://127.0.0.1", "hf auth login"),
        ({"kind": 403, "origin": "hub"}, "the Hub does not allow this (HTTP 403)", "HF_TOKEN"),
        ({"kind": 404, "origin": "hub"}, "is no longer there (HTTP 404), though the Hub listed it", "again"),
        ({"kind": 404, "origin": "hub", "path": "/api/models"}, "has no such page (HTTP 404)", "HF_ENDPOINT"),
        ({"kind": 416}, "no longer has the bytes that the listing promised (HTTP 416)", "Run it again"),
        ({"kind": 429, "origin": "hub"}, "rate limited by the Hub (HTTP 429)", "With a token"),
        ({"kind": 429, "headers": {"Retry-After": "3600"}}, "HTTP 429); it asks to wait 3,600 s", "Wait"),
        (
            {"kind": 429, "origin": "hub", "headers": {"RateLimit": '"resolvers";r=0;t=250'}},
            "it asks to wait 250 s",
            "",
        ),
        ({"kind": 500}, "the Hub fails (HTTP 500)", "status.huggingface.co"),
        ({"kind": 503, "origin": "hub", "path": "/api/models"}, "the Hub fails (HTTP 503)", ""),
        ({"kind": 418}, "the Hub answers with HTTP 418", ""),
        ({"kind": "hangs up"}, "no answer from http://127.0.0.1", "HF_HUB_OFFLINE=1"),
    ],
)
def test_each_failure_has_its_own_error(hub: Hub, repo: str, fault: dict[str, Any], words: str, hint: str) -> None:
    hub.server.fault(**({} if "path" in fault else SHARD) | fault)
    done = hub.run("scan", repo, "--vllm", "0.32.0")
    assert (done.code, done.out) == (2, "")
    first, *rest = done.err.splitlines()
    assert first.startswith("error: org/model: ") and words in first
    assert hint in "".join(rest) and "Traceback" not in done.err
    assert hub.server.sent < 16 << 20, "only buffers may hold more than was requested"
    assert "signature" not in done.err, "a signed address is a secret"


@pytest.mark.parametrize(
    "body",
    [
        "<!DOCTYPE html><title>Log in to the network</title>",
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"id": "a/b", "siblings": [{}]}',
        '{"id": "a/b", "siblings": [5]}',
        '{"id": "a/b", "lastModified": "once"}',
        f'{{"id": "a/b", "sha": "{"a" * 40}", "siblings": [{{"rfilename": 5, "size": 1}}]}}',
    ],
    ids=lambda body: body[:40] or "nothing",
)
def test_a_listing_that_is_none_is_the_hubs_error(hub: Hub, repo: str, body: str) -> None:
    hub.server.fault("says", "/api/models", origin="hub", headers={"body": body})
    done = hub.run("scan", repo)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: org/model: http://127.0.0.1:") and NONSENSE in done.err
    assert "Is HF_ENDPOINT a Hub?" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": 500, "times": 3},
        {"kind": 429, "times": 2, "headers": {"Retry-After": "0"}},
        {"kind": 408, "times": 1},
        {"kind": 503, "times": 2, "origin": "hub"},
        {"kind": 502, "times": 2, "origin": "hub", "path": "/api/models"},
        {"kind": "hangs up", "times": 3},
        {"kind": "slow"},
        {"kind": 403, "times": 1, "after": 1},
    ],
    ids=lambda f: f"{f['kind']} x{f.get('times', 'always')}",
)
def test_transient_errors_are_retried(hub: Hub, repo: str, fault: dict[str, Any]) -> None:
    want = hub.run("scan", repo, "--vllm", "0.32.0")
    hub.server.fault(**({} if "path" in fault else SHARD) | fault)
    assert hub.run("scan", repo, "--vllm", "0.32.0") == want
    assert want.code == 0


def test_the_first_failure_stops_the_rest(hub: Hub, pristine: Make) -> None:
    hub.server.add("org/shards", pristine("dense31b", "partial", shards=12))
    hub.server.fault(418)
    done = hub.run("scan", "org/shards")
    assert (done.code, done.err.count("error:")) == (2, 1)


# Who may read


@pytest.mark.parametrize(
    ("access", "allowed", "token", "words", "hint"),
    [
        ("private", True, None, "no such model on", "Log in with `hf auth login`, or set HF_TOKEN."),
        ("private", False, TOKEN, "or it is private (HTTP 404)", "Check the name"),
        ("private", True, WRONG, "the Hub does not accept your token (HTTP 401)", "Log in"),
        ("gated", True, None, "is gated, and no token was sent (HTTP 401)", "Ask for access at http://127.0.0.1"),
        ("gated", False, TOKEN, "is gated, and your account has no access to it (HTTP 403)", "Ask for access"),
    ],
)
def test_private_and_gated_repos(
    hub: Hub, pristine: Make, access: str, allowed: bool, token: str | None, words: str, hint: str
) -> None:
    name = f"org/{access}-{allowed}"
    hub.server.add(name, pristine("e4b", "all"), access=access, allowed=allowed)
    done = hub.run("scan", name, token=token)
    assert done.code == 2 and words in done.err and hint in done.err
    assert "hf_" not in done.err.replace("HF_TOKEN", "")


def test_what_is_not_there(hub: Hub, repo: str) -> None:
    assert "org/missing: no such model on http" in hub.run("scan", "org/missing").err
    done = hub.run("scan", repo, "--revision", "v9")
    assert "org/model: has no revision 'v9' (HTTP 404)" in done.err and "are listed at" in done.err


def test_a_missing_shard_is_the_same_error_as_in_a_folder(hub: Hub, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    hub.server.add("org/half", source)
    assert "shard model-00002-of-00002.safetensors is missing" in hub.run("scan", "org/half").err


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "a\\b", "x\0y", "./z"])
def test_listed_names_cannot_leave_their_folder(hub: Hub, repo: str, name: str) -> None:
    files = hub.server.repos[repo].commits[hub.server.repos[repo].refs["main"]]
    files[name] = next(iter(files.values()))
    done = hub.run("scan", repo)
    assert done.code == 2 and "which is not a valid file name" in done.err


# No Hub


def test_an_endpoint_without_a_server(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    code = "import sys; from bnbfix.cli import main as cli; from bnbfix.hub import client; client.FIRST_WAIT = 0"
    done = process(
        hub, code + "; sys.argv[1:] = ['scan', 'org/x']; cli.main()", HF_ENDPOINT=f"http://user:secret@127.0.0.1:{port}"
    )
    assert f"error: org/x: no answer from http://127.0.0.1:{port} (" in done and "HF_HUB_OFFLINE=1" in done
    assert "secret" not in done


def process(hub: Hub, code: str, **env: str) -> str:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], env=hub.environment | env, capture_output=True, text=True)
    return done.stderr


@pytest.mark.parametrize("token", ["hf_with\x01control", "hf_wïth_umlaut"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub: Hub, repo: str, token: str) -> None:
    done = hub.run("scan", repo, token=token)
    assert done.code == 2 and "Traceback" not in done.err
    assert token not in done.err and "hf_w" not in done.err


def test_the_token_is_in_no_traceback(hub: Hub, repo: str) -> None:
    for fault in ({"kind": 500}, {"kind": 401, "origin": "hub"}, {"kind": "hangs up"}):
        hub.server.reset()
        hub.server.fault(**fault)  # type: ignore[arg-type]
        said = hub.run(script="import bnbfix; bnbfix.scan('org/model')", token=TOKEN).err
        assert "HubError" in said and "Traceback" in said
        assert TOKEN not in said and "signature=" not in said


def test_the_token_follows_no_redirect(hub: Hub, repo: str, tmp_path: Any) -> None:
    other = FakeHub(tmp_path)
    try:
        hub.server.fault("elsewhere", "model.safetensors", origin="hub", headers={"Location": other.url + "/org/m/x"})
        done = hub.run("scan", repo, token=TOKEN)
        assert done.code == 2
        assert {s.authorization for s in hub.server.seen} == {f"Bearer {TOKEN}"}
    finally:
        other.stop()
    assert other.seen == [] or {s.authorization for s in other.seen} == {None}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416, 429, 451, 500, 599])
@pytest.mark.parametrize("code", [None, "GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound"])
@pytest.mark.parametrize("authorized", [False, True])
def test_every_refusal_has_words(status: int, code: str | None, authorized: bool) -> None:
    for file in (None, "f"):
        e = hub_error(status, code, HubRequest("https://hub", "org/name", "rev", authorized, file))
        assert e.exit_code == 2 and str(e).startswith("org/name: ") and len(str(e)) < 200
