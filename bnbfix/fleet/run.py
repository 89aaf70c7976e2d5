"""A fleet from its list of models to its results: what is finished is left out, the rest is given to workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from ..engines.engine import Target
from ..errors import UsageError
from ..hub.resolve import parse_repo
from .results import Results, Row
from .task import Lines, Task

Workers = Callable[[Sequence[Task]], Lines]


def name_models(names: Iterable[str]) -> dict[str, str | None]:
    """The models of a list, by their names in the results: org/name[@revision], or the path of a folder."""
    out: dict[str, str | None] = {}
    for name in names:
        repo = parse_repo(name) if not os.path.lexists(name) else None
        out["@".join(filter(None, repo)) if repo else os.path.abspath(name)] = None
    return out


def run_fleet(
    models: Mapping[str, str | None],
    target: Target,
    results: Results,
    workers: Workers,
    *,
    repair: bool = False,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> list[Row]:
    """Scan each model, or repair it with a pull request. Models that are finished are not done again.

    Args:
        models: Repos and folders; of a repo the commit, if that is known.
        target: What they should load in.
        results: Where lines go, and where those of an earlier run are.
        workers: What runs the tasks.
        repair: Open a pull request for each repo that needs a repair.
        scratch: Where repaired copies are written before they are pushed; by default next to the results.
        progress: Called with the numbers of models that are done, and of all.

    Returns:
        The rows, in the order of the models.

    Raises:
        UsageError: Two models are the same repo, which only one may write to.
    """
    if repair:
        _check_single_writer(models)
    scratch = scratch or Path(f"{results.path}.scratch")
    tasks, finished = [], 0
    for model, commit in models.items():
        row = results.rows.get(model)
        done = row.commit if row and row.finished(target.name) else None
        if done is not None and done == commit:
            finished += 1
            continue
        address = model if os.path.isabs(model) else f"hf://{model}"
        tasks.append(Task(model, address, target.name, repair, Path(os.path.abspath(scratch)), done))
    progress(finished, len(models))
    with closing(workers(tasks)) as lines:  # an interrupt ends what runs at once
        for _, line in lines if tasks else ():
            if line is not None:
                results.add(line)
            finished += 1
            progress(finished, len(models))
    with suppress(OSError):  # there is none, or there is something in it that the next run goes on with
        scratch.rmdir()
    results.sort(models)
    return [results.rows[model] for model in models]


def _check_single_writer(models: Iterable[str]) -> None:
    repos: dict[str, str] = {}
    for model in models:
        repo = model.partition("@")[0] if not os.path.isabs(model) else model
        if repos.setdefault(repo, model) != model:
            hint = "A repair opens one pull request for a repo."
            raise UsageError(f"is the same repo as {repos[repo]}", where=model, hint=hint)
