"""One model of a fleet, treated in a worker's process: what goes in and comes out can be sent to another machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import plan_repair, scan
from ..checkpoint.source import Source
from ..engines.targets import resolve_target
from ..errors import BnbfixError, InputError
from ..hub.pace import Pace, keep_pace
from ..hub.resolve import open_source
from ..report.json import outcome_document
from ..report.outcome import ScanOutcome
from ..rules.scan import describe_run

PATIENCE = "600"  # seconds that the Hub may ask to wait; its limits are for windows of five minutes


@dataclass(frozen=True)
class Task:
    """A model, and what to do with it."""

    model: str  # its name in the results
    address: str  # what opens it, whatever folders there are on a worker
    target: str
    repair: bool
    scratch: Path  # where repaired copies are written before they are pushed
    done: str | None = None  # the commit that there is a result for


Lines = Generator[tuple[Task, str | None], None, None]  # of tasks that are done, from `run_task`


def run_task(task: Task, pace: Pace) -> str | None:
    """Return the line of JSON for a model; None where its commit is the one that there is a result for."""
    os.environ.setdefault("BNBFIX_HUB_PATIENCE", PATIENCE)
    commit = None
    try:
        with keep_pace(pace):
            source = open_source(task.address)
            commit = source.origin["revision"] if source.origin else None
            if commit is not None and commit == task.done:
                return None
            return json.dumps(_repair(source, task) if task.repair else scan(source, task.target).to_dict())
    except BnbfixError as e:
        return describe_error(task, e, commit)
    except OSError as e:
        return describe_error(task, InputError(e.strerror or str(e), where=str(e.filename or task.model)), commit)


def describe_error(task: Task, error: BnbfixError, commit: str | None = None) -> str:
    """The line of a model that there is no result for."""
    target = resolve_target(task.target)
    document = outcome_document(ScanOutcome(task.model, error=error))
    return json.dumps(describe_run(commit, target) | {"target": target.name} | document)


def describe_loss(task: Task, reason: object) -> str:
    """The line of a model whose worker gave no answer."""
    hint = "Is there enough memory? Otherwise it is a bug: please report it."
    return describe_error(task, BnbfixError(f"the worker failed ({reason})", where=task.model, hint=hint))


def _repair(source: Source, task: Task) -> dict[str, Any]:
    """Repair a repo and open a pull request, unless there is one: an earlier run may have ended right after that."""
    from ..hub.push import resolve_destination
    from ..verifier.publish import find_pull_request, push_output, push_plan
    from ..writer.write import RepairResult, write_plan

    to = resolve_destination(source, None, create_pr=True, private=False)
    assert to is not None
    plan = plan_repair(source, task.target)
    files: Mapping[str, str] = {}
    pushed = None if plan.nothing_to_do else find_pull_request(plan)
    if not plan.nothing_to_do and pushed is None:
        if plan.config_only:
            pushed, files = push_plan(plan, to)
        else:
            folder = task.scratch / to.repo.replace("/", "--")
            folder.mkdir(parents=True, exist_ok=True)
            files = write_plan(plan, folder / "out", overwrite=True, stream=True).files
            # Asked again, since writing takes long: what a cluster takes for lost is started again elsewhere.
            pushed = find_pull_request(plan) or push_output(folder / "out", to)
            shutil.rmtree(folder)
    return RepairResult(plan, None, files).to_dict() | {"pushed": vars(pushed) if pushed else None}
