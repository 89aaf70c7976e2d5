"""Which repairs to propose for a checkpoint with findings, and what each would cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..engines.engine import Target
from ..engines.registry import engines, find_ranges
from ..engines.targets import target_of
from ..errors import BnbfixError, NotApplicable
from ..models.inspection import Inspection, inspect_checkpoint
from ..rules.scan import ScanResult, scan_inspection
from .plan import Options
from .plan_repair import plan_inspection

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A repair that is possible: for which target, and what it costs."""

    target: Target
    family: str  # the model's class
    bf16: bool
    before: int  # bytes of the checkpoint
    after: int
    nothing_to_do: bool
    config_only: bool


def find_choices(checkpoint: Checkpoint, target: Target, scan: ScanResult | None = None) -> tuple[Choice, ...]:
    """The repairs worth proposing, the best first; none where nothing can be repaired.

    The target's own; where that changes shards and the newest release needs only a change of config.json, that as well;
    where the target has none, the nearest that is possible: another release, the newest first, else --bf16. `scan` is
    the checkpoint's for the target, where that was made already.
    """
    try:
        inspection = inspect_checkpoint(checkpoint)
        find_ranges(inspection.model, target)
    except NotApplicable:  # no rule knows the model; an installed vLLM was asked about it
        return ()
    own = _plan_choice(inspection, target, scan)
    if own is None:
        nearest = next(_other_choices(inspection, target, scan), None)
        return (nearest,) if nearest else ()
    newest = target_of(engines()[target.engine].ranges[-1])
    if own.config_only or target.ranges == newest.ranges:
        return (own,)
    cheaper = _plan_choice(inspection, newest)
    return (own, cheaper) if cheaper and (cheaper.config_only or cheaper.nothing_to_do) else (own,)


def _other_choices(inspection: Inspection, target: Target, scan: ScanResult | None) -> Iterator[Choice]:
    for row in reversed(engines()[target.engine].ranges):
        if (row,) != target.ranges and (choice := _plan_choice(inspection, target_of(row))):
            yield choice
    if choice := _plan_choice(inspection, target, scan, bf16=True):
        yield choice


def _plan_choice(
    inspection: Inspection, target: Target, scan: ScanResult | None = None, *, bf16: bool = False
) -> Choice | None:
    try:
        scan = scan or scan_inspection(inspection, target, judged=target.ranges)
        plan = plan_inspection(inspection, target, Options(bf16), scan)
    except BnbfixError as e:
        logger.info("no repair for %s%s: %s", target.name, " in full precision" if bf16 else "", e)
        return None
    family, before = inspection.model.family.architecture, sum(plan.checkpoint.source.files.values())
    return Choice(target, family, bf16, before, plan.bytes_written, plan.nothing_to_do, plan.config_only)
