"""Scans and repairs bitsandbytes-quantized checkpoints so that vLLM loads them and answers correctly.

    import bnbfix

    result = bnbfix.scan("gemma-4-E4B-it-bnb-4bit", vllm="0.32.0")
    if not result.ok:
        bnbfix.repair("gemma-4-E4B-it-bnb-4bit", "repaired", vllm="0.32.0")

Nothing here prints. Errors are subclasses of `bnbfix.BnbfixError`, with an `exit_code` and sometimes a `hint`. Logs go
to the logger "bnbfix". Names are imported when they are first used: a scan imports neither torch nor bitsandbytes nor
numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .__version__ import __version__ as __version__

if TYPE_CHECKING:
    from .api import (
        check_before_upload,
        explain,
        plan_repair,
        releases,
        repair,
        repair_in_place,
        scan,
        scan_many,
        verify,
    )
    from .engines.engine import ReleaseRange, Target
    from .engines.vllm.live import DryLoad, LiveVllm
    from .errors import (
        BnbfixError,
        EngineError,
        FindingsRemain,
        HeaderError,
        HubError,
        InputError,
        NotApplicable,
        OutputError,
        QuantStateError,
        Unrepairable,
        UsageError,
        VerifyError,
    )
    from .planner.plan import Edit, Plan
    from .rules.rule import Code, Explanation, Severity
    from .rules.scan import Finding, ReleaseVerdict, ScanResult
    from .verifier.verify import Problem, VerifyResult
    from .writer.write import RepairResult

__all__ = [
    "BnbfixError",
    "Code",
    "DryLoad",
    "Edit",
    "EngineError",
    "Explanation",
    "Finding",
    "FindingsRemain",
    "HeaderError",
    "HubError",
    "InputError",
    "LiveVllm",
    "NotApplicable",
    "OutputError",
    "Plan",
    "Problem",
    "QuantStateError",
    "ReleaseRange",
    "ReleaseVerdict",
    "RepairResult",
    "ScanResult",
    "Severity",
    "Target",
    "Unrepairable",
    "UsageError",
    "VerifyError",
    "VerifyResult",
    "check_before_upload",
    "explain",
    "plan_repair",
    "releases",
    "repair",
    "repair_in_place",
    "scan",
    "scan_many",
    "verify",
]

_HOME = {
    name: module
    for module, names in {
        "api": (
            "check_before_upload",
            "explain",
            "plan_repair",
            "releases",
            "repair",
            "repair_in_place",
            "scan",
            "scan_many",
            "verify",
        ),
        "rules.rule": ("Code", "Explanation", "Severity"),
        "errors": (
            "BnbfixError",
            "EngineError",
            "FindingsRemain",
            "HeaderError",
            "HubError",
            "InputError",
            "NotApplicable",
            "OutputError",
            "QuantStateError",
            "Unrepairable",
            "UsageError",
            "VerifyError",
        ),
        "planner.plan": ("Edit", "Plan"),
        "rules.scan": ("Finding", "ReleaseVerdict", "ScanResult"),
        "verifier.verify": ("Problem", "VerifyResult"),
        "engines.engine": ("ReleaseRange", "Target"),
        "engines.vllm.live": ("DryLoad", "LiveVllm"),
        "writer.write": ("RepairResult",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
