"""Runs the rules: a checkpoint and a target in, findings and a verdict for every release range out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..engines.vllm.parameters import projections
from ..engines.vllm.releases import ReleaseRange, Target, ranges
from ..errors import NotApplicable
from ..models.gemma4 import Model, read_model
from .rule import Code, Severity
from .weights import OF_FILES, RULES, Case, Hit

SCHEMA = 1


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit, in the releases it concerns."""

    code: Code
    severity: Severity
    tensors: tuple[str, ...]  # tensor names; for BNB301 skip entries, for BNB205 and BNB206 files
    releases: tuple[ReleaseRange, ...]
    message: str
    fix: str | None  # what a repair does about it
    reason: str | None  # why a repair does nothing about it

    @property
    def counts(self) -> bool:
        """Does it count against the checkpoint? Notes do not."""
        return self.severity.counts

    @property
    def blocking(self) -> bool:
        """Does it count, and lie in the files? Whether the plugin is installed here says nothing about a checkpoint."""
        return self.counts and self.code is not Code.PLUGIN


@dataclass(frozen=True)
class ReleaseVerdict:
    """What one range of releases makes of the checkpoint."""

    release: ReleaseRange
    verdict: Severity
    codes: tuple[Code, ...]  # of the findings that count
    tensors: int  # how many tensors these findings name


@dataclass(frozen=True)
class ScanResult:
    """All that a scan says. `findings` are those that concern the target; `releases` covers the whole table."""

    model: str
    family: str
    target: Target
    verdict: Severity  # loads, degraded, wrong or fails, for the target
    releases: tuple[ReleaseVerdict, ...]
    findings: tuple[Finding, ...]
    counts: tuple[tuple[str, int], ...]  # weights by form: nf4, fp4, int8, BF16, ...
    shards: int

    @property
    def ok(self) -> bool:
        """Does nothing count against the checkpoint for the target?"""
        return not any(f.counts for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON document, the one that `bnbfix scan --format json` prints."""
        return _scan_document(self)


def check_applicable(checkpoint: Checkpoint) -> Model:
    """The model, if this is a bitsandbytes Gemma4 checkpoint; raises NotApplicable with what it is instead."""
    model = read_model(checkpoint.config)
    what, method = model.family.architecture, checkpoint.quantization.get("quant_method")
    quantized = sum(w.quantized for w in checkpoint.weights.values())
    if method is None and not checkpoint.quantization and not quantized and not checkpoint.damaged:
        raise NotApplicable(f"is an unquantized {what}; there is nothing to check", where=checkpoint.source.name)
    if method not in ("bitsandbytes", None):
        raise NotApplicable(f"is a {what} quantized with {method}, not bitsandbytes", where=checkpoint.source.name)
    if method is None:
        raise NotApplicable(
            f"is a {what} with {quantized} quantized weights, but config.json has no bitsandbytes quantization_config",
            where=checkpoint.source.name,
            hint="Take config.json from the model that was quantized.",
        )
    return model


def scan_checkpoint(checkpoint: Checkpoint, target: Target) -> ScanResult:
    """Findings for the target, and a verdict for each range of the release table.

    Raises NotApplicable when this is no bitsandbytes Gemma4 checkpoint, InputError when its config makes no sense.
    """
    model = check_applicable(checkpoint)
    members = tuple(projections(checkpoint))
    merged: dict[tuple[Code, Hit], list[ReleaseRange]] = {}
    verdicts = []
    known: dict[Code, list[Hit]] = {}
    for release in ranges():
        installed = target.installed if release in target.ranges else None
        hits = find(Case.of(checkpoint, model, members, release, installed), known)
        for code, hit in hits:
            merged.setdefault((code, hit), []).append(release)
        verdicts.append(_verdict(release, hits))
    wanted = target_ranges(target, model)
    findings = []
    for (code, hit), found in merged.items():
        if any(r in wanted for r in found):
            fix = None if hit.reason else code.explanation.fix
            findings.append(Finding(code, hit.severity, hit.tensors, tuple(found), hit.message, fix, hit.reason))
    findings.sort(key=lambda f: (f.code, f.tensors))
    findings.sort(key=lambda f: f.severity, reverse=True)
    counts: dict[str, int] = {}
    for w in checkpoint.weights.values():
        counts[w.form] = counts.get(w.form, 0) + 1
    return ScanResult(
        model=checkpoint.source.name,
        family=model.family.architecture,
        target=target,
        verdict=_worst(f.severity for f in findings),
        releases=tuple(verdicts),
        findings=tuple(findings),
        counts=tuple(sorted(counts.items(), key=lambda c: -c[1])),
        shards=len(checkpoint.shards),
    )


def target_ranges(target: Target, model: Model) -> tuple[ReleaseRange, ...]:
    """The ranges a target means for a model: of several, those that know its class."""
    if len(target.ranges) == 1:
        return target.ranges
    return tuple(r for r in target.ranges if model.family.name in r.families)


def find(case: Case, known: dict[Code, list[Hit]]) -> list[tuple[Code, Hit]]:
    """Every hit of every rule; of a release that does not know the model's class, that one alone.

    `known` keeps what rules of the files alone have answered, for the next release of the same checkpoint.
    """
    if unknown := list(RULES[Code.UNKNOWN_CLASS](case)):
        return [(Code.UNKNOWN_CLASS, hit) for hit in unknown]
    out = []
    for code, function in RULES.items():
        hits = known.get(code)
        if hits is None:
            hits = list(function(case))
            if code in OF_FILES:
                known[code] = hits
        out += [(code, hit) for hit in hits]
    return out


def _verdict(release: ReleaseRange, hits: list[tuple[Code, Hit]]) -> ReleaseVerdict:
    counting = [(code, hit) for code, hit in hits if hit.severity.counts]
    return ReleaseVerdict(
        release=release,
        verdict=_worst(hit.severity for _, hit in counting),
        codes=tuple(sorted({code for code, _ in counting})),
        tensors=len({name for _, hit in counting for name in hit.tensors}),
    )


def _worst(severities: Iterable[Severity]) -> Severity:
    """The verdict that findings of these severities make."""
    return max((s for s in severities if s.counts), default=Severity.LOADS)


def _scan_document(result: ScanResult) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": result.model,
        "family": result.family,
        "target": result.target.name,
        "verdict": result.verdict.value,
        "weights": dict(result.counts),
        "shards": result.shards,
        "releases": [_verdict_document(v) for v in result.releases],
        "findings": [_finding_document(f) for f in result.findings],
    }


def _verdict_document(v: ReleaseVerdict) -> dict[str, Any]:
    codes = [c.value for c in v.codes]
    return {**_range_document(v.release), "verdict": v.verdict.value, "codes": codes, "tensors": v.tensors}


def _finding_document(f: Finding) -> dict[str, Any]:
    return {
        "code": f.code.value,
        "severity": f.severity.value,
        "title": f.code.explanation.title,
        "tensors": list(f.tensors),
        "releases": [_range_document(r) for r in f.releases],
        "message": f.message,
        "fix": f.fix,
        "reason": f.reason,
    }


def _range_document(r: ReleaseRange) -> dict[str, str]:
    return {"first": r.first, "last": r.last}
