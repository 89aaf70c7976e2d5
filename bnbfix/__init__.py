"""Scans and repairs bitsandbytes-quantized Gemma4 checkpoints so that vLLM loads them and answers right.

    import bnbfix

    result = bnbfix.scan("gemma-4-E4B-it-bnb-4bit", vllm="0.32.0")
    if not result.ok:
        bnbfix.repair("gemma-4-E4B-it-bnb-4bit", "mended", vllm="0.32.0")

Nothing here prints. Errors are `bnbfix.BnbfixError` and its kinds; each has an `exit_code` and perhaps a `hint`.
Names are imported when they are first used: a scan imports neither torch nor bitsandbytes nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import check_before_upload, plan_repair, repair, scan, verify
    from .codes import Code, Severity
    from .errors import (
        BnbfixError,
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
    from .plan import Edit, Plan
    from .scanner import Finding, ReleaseVerdict, ScanResult
    from .verifier import Problem, VerifyResult
    from .vllm_releases import ReleaseRange, Target
    from .write import RepairResult

__all__ = [
    "BnbfixError", "Code", "Edit", "Finding", "FindingsRemain", "HeaderError", "HubError", "InputError",
    "NotApplicable", "OutputError", "Plan", "Problem", "QuantStateError", "ReleaseRange", "ReleaseVerdict",
    "RepairResult", "ScanResult", "Severity", "Target", "Unrepairable", "UsageError", "VerifyError", "VerifyResult",
    "check_before_upload", "plan_repair", "repair", "scan", "verify",
]  # fmt: skip

_HOME = {
    name: module
    for module, names in {
        "api": ("check_before_upload", "plan_repair", "repair", "scan", "verify"),
        "codes": ("Code", "Severity"),
        "errors": ("BnbfixError", "FindingsRemain", "HeaderError", "HubError", "InputError", "NotApplicable",
                   "OutputError", "QuantStateError", "Unrepairable", "UsageError", "VerifyError"),
        "plan": ("Edit", "Plan"),
        "scanner": ("Finding", "ReleaseVerdict", "ScanResult"),
        "verifier": ("Problem", "VerifyResult"),
        "vllm_releases": ("ReleaseRange", "Target"),
        "write": ("RepairResult",),
    }.items()
    for name in names
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
