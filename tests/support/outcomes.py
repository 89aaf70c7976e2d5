"""Outcomes of scans for the tests of reports, with names as bad as names can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bnbfix.engines.targets import resolve_target
from bnbfix.report.outcome import ScanOutcome, scan_models

EVIL = "\x1b[31m\x07\r\n<script>alert(1)</script>|`*_[x](http://e.vil)%0A,:\u202e@user"


def outcomes(*models: Path | str, target: str = "portable", with_map: bool = False) -> list[ScanOutcome]:
    return list(scan_models(map(str, models), resolve_target(target), with_map=with_map))


def evil(o: ScanOutcome) -> ScanOutcome:
    """The same outcome, whose names are as bad as names can be."""
    assert o.result is not None
    tensors = (f"model.{EVIL}.weight", f"{EVIL}")
    findings = tuple(replace(f, tensors=tensors, message=f"{EVIL} message") for f in o.result.findings)
    result = replace(o.result, model=EVIL, findings=findings, counts=((EVIL, 3),))
    return replace(o, model=EVIL, result=result, files=dict.fromkeys(tensors, f"{EVIL}.safetensors"))
