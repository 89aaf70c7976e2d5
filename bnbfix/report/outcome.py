"""Scans one model after another. One that fails does not stop the rest: its error is its outcome."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from ..engines.engine import Target
from ..errors import BnbfixError, InputError, UsageError
from ..hub.resolve import open_source
from ..models.detect import read_model
from ..rules.rule import Code, Severity
from ..rules.scan import Finding, ScanResult, scan_by_dry_load, scan_checkpoint
from ..rules.selection import Selection, findings_code
from ..rules.support import ASKED

if TYPE_CHECKING:
    from ..engines.vllm.live import LiveVllm
    from ..planner.choices import Choice
    from .layer_map import LayerMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanOutcome:
    """What became of one MODEL: a result, or the error that kept it from being scanned."""

    model: str
    result: ScanResult | None = None  # with the selected findings only; its verdicts cover all
    error: BnbfixError | None = None
    left_out: int = 0  # findings that were not selected
    files: Mapping[str, str] = field(default_factory=dict, repr=False)  # the shard of each tensor that a finding names
    layer_map: LayerMap | None = field(default=None, repr=False)
    choices: tuple[Choice, ...] = ()  # the repairs that were planned; none for what needs none

    def file(self, finding: Finding) -> str:
        """The file to look at for a finding: the shard of its first tensor, else config.json or the index."""
        if finding.tensors:
            return self.files.get(finding.tensors[0], CONFIG)
        return INDEX if finding.code is Code.INDEX else CONFIG

    def exit_code(self, fail_on: Severity | None = Severity.DEGRADED) -> int:
        """The exit code for only this model."""
        if self.result is None:
            return self.error.exit_code if self.error else 0
        return findings_code(self.result.findings, fail_on)


def scan_models(
    models: Iterable[str],
    target: Target,
    selection: Selection | None = None,
    *,
    revision: str | None = None,
    with_map: bool = False,
    with_choices: bool = False,
    live: LiveVllm | None = None,
) -> Iterator[ScanOutcome]:
    """The outcome of each model, in order, as soon as it is known.

    `revision` applies to every repo. `with_choices` plans the repairs of what has findings. `live` is a vLLM to ask
    about each model, the one that `target` names.
    """
    for model in models:
        try:
            checkpoint = open_checkpoint(open_source(model, revision))
            result = _scan_one(checkpoint, target, live)
            outcome = _select_findings(checkpoint, model, result, selection or Selection())
            if with_map and outcome.result and outcome.result.releases:
                outcome = replace(outcome, layer_map=_draw_map(checkpoint, outcome.result))
            findings = outcome.result.findings if outcome.result else ()
            if with_choices and any(f.blocking and f.code not in ASKED for f in findings):
                from ..planner.choices import find_choices

                outcome = replace(outcome, choices=find_choices(checkpoint, target, None if live else result))
            yield outcome
        except BnbfixError as e:
            yield ScanOutcome(model, error=e)
        except OSError as e:
            error = InputError(e.strerror or str(e), where=str(e.filename or "input/output"))
            yield ScanOutcome(model, error=error)


def _scan_one(checkpoint: Checkpoint, target: Target, live: LiveVllm | None) -> ScanResult:
    if live is None:
        return scan_checkpoint(checkpoint, target)
    return scan_by_dry_load(checkpoint, target, live.ask(checkpoint))


def _select_findings(checkpoint: Checkpoint, model: str, result: ScanResult, selection: Selection) -> ScanOutcome:
    logger.info("%s: %s for %s, %d findings", model, result.verdict, result.target.name, len(result.findings))
    chosen = selection.of(result.findings)
    files = _files(checkpoint, {name for f in chosen for name in f.tensors})
    return ScanOutcome(model, replace(result, findings=chosen), None, len(result.findings) - len(chosen), files)


def _draw_map(checkpoint: Checkpoint, result: ScanResult) -> LayerMap:
    from ..writer.record import repaired_tensors
    from .layer_map import build_layer_map

    repaired = repaired_tensors(checkpoint.source)
    return build_layer_map(checkpoint, read_model(checkpoint.config), result.findings, repaired)


def _files(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """The shard of each tensor; the file itself for a file; config.json for other names, such as skip entries."""
    tensors, files = checkpoint.tensors if names else {}, checkpoint.source.files
    return {n: tensors[n].shard if n in tensors else n if n in files else CONFIG for n in names}


def read_names(text: str, where: str) -> list[str]:
    """The models in a list, one per line, without comments; raises UsageError when there are none."""
    lines = (line.strip() for line in text.splitlines())
    names = [name for line in lines if (name := re.split(r"(?:^|\s+)#", line, maxsplit=1)[0])]
    if not names:
        raise UsageError("names no model", where=where, hint="Write one model per line; # begins a comment.")
    return names
