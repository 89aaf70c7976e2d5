"""Publishes a repair on the Hub: a folder that verifies, or only the files that change where no shard does."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from ..checkpoint.source import Progress, as_remote, read_file
from ..errors import InputError, VerifyError
from ..hub.push import Destination, Pushed, push_changes, push_folder
from ..hub.resolve import open_source
from ..planner.plan import RECORD, Plan
from ..writer.record import build_record, read_record
from .verify import verify_output

MESSAGE = "Repair for vLLM {} with bnbfix"


def push_output(out: Path, to: Destination, *, progress: Progress | None = None, quiet: bool = True) -> Pushed:
    """Verifies a folder that `repair` wrote, then uploads it in one commit.

    Args:
        out: The folder.
        to: The repo to push to.
        progress: Called with the number of bytes just hashed.
        quiet: Keep huggingface_hub from showing its progress on stderr.

    Raises:
        VerifyError: The folder does not verify; nothing is pushed.
        HubError: The Hub refuses the upload.
    """
    result = verify_output(out, None, progress=progress)
    if not result.ok:
        raise VerifyError(f"{result.problems[0]}; nothing was pushed", where=str(out))
    return push_folder(out, to, message=MESSAGE.format(result.target), quiet=quiet)


def push_plan(plan: Plan, to: Destination, *, quiet: bool = True) -> tuple[Pushed, dict[str, str]]:
    """Uploads what the repair of a repo changes where no shard does, and returns the SHA-256 of every file.

    Weights are neither downloaded nor uploaded: a plan is a scan of its output, and the Hub knows their hashes.

    Args:
        plan: A plan for a repo; `plan.config_only` is True.
        to: The repo to push to.
        quiet: As in `push_output`.

    Raises:
        HubError: The Hub refuses the upload.
    """
    source = as_remote(plan.checkpoint.source)
    assert source is not None and source.origin is not None and plan.config_only
    changed = {name: text.encode() for name, text in plan.texts.items()}
    kept = [name for name in (*plan.checkpoint.shards, *plan.copied) if name not in changed]
    hashes = {name: sha256(data).hexdigest() for name, data in changed.items()}
    hashes |= {name: source.sha256.get(name) or sha256(read_file(source, name)).hexdigest() for name in kept}
    changed[RECORD] = build_record(plan, hashes)
    message = MESSAGE.format(plan.target.name)
    return push_changes(source.origin, kept, changed, to, message=message, quiet=quiet), hashes


def find_pull_request(plan: Plan) -> Pushed | None:
    """The pull request that an earlier run opened for the plan's commit and target; one that was closed counts too.

    Raises:
        HubError: The Hub gives no answer.
    """
    from ..hub.listing import list_pull_requests

    origin = plan.checkpoint.source.origin
    assert origin is not None
    for number, url in list_pull_requests(origin["repo"], MESSAGE.format(plan.target.name)):
        there = open_source(origin["repo"], f"refs/pr/{number}")
        assert there.origin is not None
        try:
            if read_record(there).get("source") == dict(origin):
                return Pushed(origin["repo"], url, there.origin["revision"])
        except InputError:  # no record of a repair: somebody else's pull request
            continue
    return None
