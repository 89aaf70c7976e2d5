"""Runs the rules: an inspected checkpoint and a target in, findings and a verdict for every release range out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..__version__ import __version__
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.quant_state import split_state_tensor
from ..engines.engine import ReleaseRange, Target
from ..engines.registry import find_ranges
from ..engines.transformers import check_skip_entries
from ..engines.vllm.releases import find_installed
from ..errors import NotApplicable
from ..models.inspection import Inspection, inspect_checkpoint
from .manifest import MANIFEST
from .rule import AFTER_LOADING, CHECKS, RELEASE_INDEPENDENT, Case, Code, Hit, Severity, make_cases
from .support import ASKED, describe_dry_load

if TYPE_CHECKING:
    from ..engines.vllm.live import DryLoad

SCHEMA = 1
NO_RULES = "bnbfix has no rules for this model yet, so it cannot repair it"
NO_CAUSE = "no rule finds the cause, so there is nothing that a repair in 4 bits would fix; --bf16 may load"


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit, in the releases it concerns."""

    code: Code
    severity: Severity
    tensors: tuple[str, ...]  # tensor names; for BNB301 skip entries, for BNB205 and BNB206 files
    releases: tuple[ReleaseRange, ...]
    message: str
    fix: str | None  # what a repair for the target does about it
    reason: str | None  # why a repair does nothing about it

    def __repr__(self) -> str:
        code, severity, tensors = self.code.value, self.severity.value, len(self.tensors)
        return f"Finding(code={code!r}, severity={severity!r}, message={self.message!r}, tensors={tensors})"

    @property
    def counts(self) -> bool:
        """Return True if it counts against the checkpoint. Notes do not."""
        return self.severity.counts

    @property
    def blocking(self) -> bool:
        """Return True if it counts and is in the files: what is installed says nothing about them."""
        return self.counts and self.code not in (Code.PLUGIN, Code.TRANSFORMERS)


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
    dry_load: DryLoad | None = None  # what an installed vLLM said, where one was asked
    commit: str | None = None  # of a repo

    def __repr__(self) -> str:
        found = " ".join(sorted({f.code.value for f in self.findings}))
        target, verdict = self.target.name, self.verdict.value
        return f"ScanResult(model={self.model!r}, target={target!r}, verdict={verdict!r}, findings={found!r})"

    def _repr_html_(self) -> str | None:
        """How a notebook shows it."""
        return RENDERERS["html"](self) if "html" in RENDERERS else None

    def _repr_markdown_(self) -> str | None:
        return RENDERERS["markdown"](self) if "markdown" in RENDERERS else None

    @property
    def ok(self) -> bool:
        """Return True if nothing counts against the checkpoint for the target."""
        return not any(f.counts for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as `bnbfix schema scan` describes it."""
        return describe_run(self.commit, self.target) | {
            "model": self.model,
            "family": self.family,
            "target": self.target.name,
            "verdict": str(self.verdict),
            "weights": dict(self.counts),
            "shards": self.shards,
            "releases": [
                _range_dict(v.release)
                | {"verdict": str(v.verdict), "codes": list(map(str, v.codes)), "tensors": v.tensors}
                for v in self.releases
            ],
            "findings": [
                {
                    "code": str(f.code),
                    "severity": str(f.severity),
                    "title": f.code.explanation.title,
                    "tensors": list(f.tensors),
                    "releases": list(map(_range_dict, f.releases)),
                    "message": f.message,
                    "fix": f.fix,
                    "reason": f.reason,
                }
                for f in self.findings
            ],
            "dry_load": self.dry_load.to_dict() if self.dry_load else None,
        }


RENDERERS: dict[str, Callable[[ScanResult], str]] = {}  # "html" and "markdown", which reports bring


def describe_run(commit: str | None, target: Target | None = None) -> dict[str, Any]:
    """How every document begins: {schema, bnbfix, installed, commit, warning}."""
    here = find_installed()
    return {
        "schema": SCHEMA,
        "bnbfix": __version__,
        "installed": {"vllm": here.version, "plugin": here.plugin} if here else None,
        "commit": commit,
        "warning": target.warning if target else None,
    }


def _range_dict(release: ReleaseRange) -> dict[str, str]:
    return {"first": release.first, "last": release.last}


def scan_checkpoint(checkpoint: Checkpoint, target: Target) -> ScanResult:
    """Findings for the target, and a verdict for each range of the release table.

    Raises NotApplicable when this is not a bitsandbytes checkpoint of a known family, InputError when its config makes
    no sense.
    """
    return scan_inspection(inspect_checkpoint(checkpoint), target)


def scan_inspection(
    inspection: Inspection,
    target: Target,
    dry_load: DryLoad | None = None,
    judged: Sequence[ReleaseRange] | None = None,
) -> ScanResult:
    """`scan_checkpoint` of a checkpoint that was inspected already, perhaps with the target's own answer to it.

    `judged` are the ranges that get a verdict; by default, all of which something is known.
    """
    checkpoint, model = inspection.checkpoint, inspection.model
    rows = find_ranges(model, target)
    check_skip_entries(checkpoint.skip_modules, len(inspection.linears))
    merged: dict[tuple[Code, Hit], list[ReleaseRange]] = {}
    verdicts = []
    known: dict[Code, list[Hit]] = {}
    for case in make_cases(inspection, rows if judged is None else judged, target, dry_load):
        hits = find_hits(case, known)
        for code, hit in hits:
            merged.setdefault((code, hit), []).append(case.release)
        verdicts.append(_judge_release(case.release, hits))
    wanted = target.ranges_for(model)
    findings = []
    for (code, hit), found in merged.items():
        if any(r in wanted for r in found):
            fix = None if hit.reason else code.explanation.describe_fix(model, wanted)
            findings.append(Finding(code, hit.severity, hit.tensors, tuple(found), hit.message, fix, hit.reason))
    findings.sort(key=lambda f: (f.code, f.tensors))
    findings.sort(key=lambda f: f.severity, reverse=True)
    return ScanResult(
        model=checkpoint.source.name,
        family=model.family.architecture,
        target=target,
        verdict=_worst(f.severity for f in findings),
        releases=tuple(verdicts),
        findings=tuple(findings),
        counts=_count_forms(checkpoint),
        shards=len(checkpoint.shards),
        dry_load=dry_load,
        commit=_commit_of(checkpoint),
    )


def scan_by_dry_load(checkpoint: Checkpoint, target: Target, dry_load: DryLoad) -> ScanResult:
    """A scan for the vLLM that was asked. Of a model that no rule knows, its answer is all that is said."""
    try:
        return scan_inspection(inspect_checkpoint(checkpoint), target, dry_load)
    except NotApplicable:
        hits = describe_dry_load(dry_load)
        findings = tuple(Finding(c, h.severity, h.tensors, target.ranges, h.message, None, NO_RULES) for c, h in hits)
        architectures = checkpoint.config.get("architectures")
        return ScanResult(
            model=checkpoint.source.name,
            family=str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown",
            target=target,
            verdict=_worst(f.severity for f in findings),
            releases=(),
            findings=findings,
            counts=_count_forms(checkpoint),
            shards=len(checkpoint.shards),
            dry_load=dry_load,
            commit=_commit_of(checkpoint),
        )


def _commit_of(checkpoint: Checkpoint) -> str | None:
    origin = checkpoint.source.origin
    return origin["revision"] if origin else None


def _count_forms(checkpoint: Checkpoint) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(w.form for w in checkpoint.weights.values()).most_common())


def find_hits(case: Case, known: dict[Code, list[Hit]]) -> list[tuple[Code, Hit]]:
    """Every hit of every rule; of a release that does not know the model's class, only that.

    `known` keeps the answers that do not depend on the release, for the next one.
    """
    if unknown := list(CHECKS[Code.UNKNOWN_CLASS](case)):
        return [(Code.UNKNOWN_CLASS, hit) for hit in unknown]
    out = []
    for code, check in CHECKS.items():
        hits = known.get(code)
        if hits is None:
            hits = list(check(case))
            if code in RELEASE_INDEPENDENT:
                known[code] = hits
        out += [(code, hit) for hit in hits]
    out = list(_drop_consequences(case, out))
    if case.dry_load is not None and case.dry_load.ok:  # whatever would stop a load or change a weight in it, does not
        out = [(code, hit) for code, hit in out if code in AFTER_LOADING or not hit.severity.counts]
    if all(code in ASKED for code, hit in out if hit.severity.counts):
        out = [(code, hit._replace(reason=NO_CAUSE) if code in ASKED else hit) for code, hit in out]
    return out


def _drop_consequences(case: Case, hits: list[tuple[Code, Hit]]) -> Iterator[tuple[Code, Hit]]:
    """The hits, without names that are unknown or missing because of what another hit says."""
    causes = [(code, hit) for code, hit in hits if hit.severity.counts and code not in MANIFEST]
    whole = any(code in (Code.MOE_REFUSED, Code.ADAPTER) for code, _ in causes)
    experts = any(code in (Code.FUSED_EXPERTS, Code.EXPERT_PREFIX, Code.EXPERT_LINEARS) for code, _ in causes)
    explained = {case.inspection.canonical(name) for _, hit in causes for name in hit.tensors}
    explained |= {case.inspection.canonical(split[0]) for n in explained if (split := split_state_tensor(n))}
    for code, hit in hits:
        if code in MANIFEST:
            left = [n for n in hit.tensors if case.inspection.canonical(n) not in explained]
            left = [n for n in left if not (whole or (experts and ".experts." in n))]
            if not left:
                continue
            hit = hit._replace(tensors=tuple(left))
        yield code, hit


def _judge_release(release: ReleaseRange, hits: list[tuple[Code, Hit]]) -> ReleaseVerdict:
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
