"""What a rule is: a code, its explanation, and the function that looks for it.

Codes are stable: they are never reused or renumbered. BNB1xx: a tensor and its parameter do not fit. BNB2xx: the files.
BNB3xx: the config and the release. BNB4xx: forms of checkpoint that need more than an edit. BNB5xx: what an installed
vLLM said when it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..engines.engine import DEFAULT, Expectation, Installed, Parameter, ReleaseRange, Target
from ..engines.manifest import Load, group_alike, load_names, parameters
from ..engines.registry import engines, expect
from ..engines.targets import label_ranges
from ..models.family import Model
from ..models.inspection import Inspection, LinearWeight

if TYPE_CHECKING:
    from ..engines.vllm.live import DryLoad


class Severity(str, Enum):
    """How bad a finding is, and the verdict of a release whose worst finding it is. Ordered; equal to its word."""

    LOADS = "loads"  # a verdict: no finding counts
    NOTE = "note"
    DEGRADED = "degraded"
    WRONG = "wrong"
    FAILS = "fails"

    def __str__(self) -> str:
        return self.value

    def __lt__(self, other: str) -> bool:
        return _RANK[self] < _RANK[other]

    def __le__(self, other: str) -> bool:
        return _RANK[self] <= _RANK[other]

    def __gt__(self, other: str) -> bool:
        return _RANK[self] > _RANK[other]

    def __ge__(self, other: str) -> bool:
        return _RANK[self] >= _RANK[other]

    @property
    def counts(self) -> bool:
        """Return True if a finding of this severity counts against a checkpoint. Notes do not."""
        return self > Severity.NOTE


_RANK: dict[str, int] = {severity: rank for rank, severity in enumerate(Severity)}


class Code(str, Enum):
    """The findings. The member's name is for code, the value is what users see."""

    QUANTIZED_IN_UNQUANTIZED = "BNB101"
    UNQUANTIZED_IN_QUANTIZED = "BNB102"
    PARTIALLY_QUANTIZED = "BNB103"
    K_EQ_V_WITHOUT_V = "BNB104"
    EXPLICIT_V = "BNB105"
    SHARED_WITHOUT_KV = "BNB106"
    QUANTIZED_PIXEL_PROJECTION = "BNB107"
    QUANTIZED_LM_HEAD = "BNB108"
    QUANTIZED_BUT_SKIPPED = "BNB109"
    WEIGHT_NOT_A_COLUMN = "BNB110"
    QUANT_STORAGE = "BNB111"
    NOTHING_QUANTIZED = "BNB112"
    UNKNOWN_NAME = "BNB113"
    UNFILLED = "BNB114"
    WRONG_SHAPE = "BNB115"
    TIED_LM_HEAD = "BNB116"
    WRONG_PREFIX = "BNB117"
    PARTLY_FILLED = "BNB118"
    REORDERED = "BNB119"
    QUANT_STATE = "BNB201"
    ORPHANED_STATE_TENSORS = "BNB202"
    INDEX = "BNB203"
    DUPLICATE = "BNB204"
    PICKLES = "BNB205"
    CODE = "BNB206"
    ADAPTER = "BNB207"
    UNUSED_WEIGHTS = "BNB208"
    PROCESSOR = "BNB209"
    SKIP_ENTRY = "BNB301"
    PER_LAYER_CONFIG = "BNB302"
    UNKNOWN_CLASS = "BNB303"
    PLUGIN = "BNB304"
    TRANSFORMERS_REQUANTIZES = "BNB305"
    TRANSFORMERS = "BNB306"
    QUANTIZATION_CONFIG = "BNB307"
    OTHER_CLASS = "BNB308"
    FLOAT16 = "BNB309"
    SOFT_TOKENS = "BNB310"
    MOE_REFUSED = "BNB401"
    FUSED_EXPERTS = "BNB402"
    EXPERT_PREFIX = "BNB403"
    FP4_EXPERTS = "BNB404"
    INT8 = "BNB405"
    MIXED_EXPERTS = "BNB406"
    EXPERT_LINEARS = "BNB407"
    ENGINE_REFUSES = "BNB501"
    REQUANTIZED_AT_LOAD = "BNB502"
    REORDERED_AT_LOAD = "BNB503"

    def __str__(self) -> str:
        return self.value

    @property
    def explanation(self) -> Explanation:
        return EXPLANATIONS[self]


FixText = Callable[[Model, Sequence[ReleaseRange]], str]


class Explanation(NamedTuple):
    """What a code means: a title, what is seen and why, what fixes it, and where it is discussed upstream."""

    title: str
    why: str
    fix: str
    upstream: tuple[str, ...] = ()
    severity: Severity = Severity.FAILS  # of its worst finding, in any release
    fix_for: FixText | None = None  # the fix in words for one model and target, where it depends on them

    def to_dict(self) -> dict[str, Any]:
        """{title, severity, why, fix, upstream}"""
        document = {"title": self.title, "severity": str(self.severity), "why": self.why, "fix": self.fix}
        return document | {"upstream": list(self.upstream)}

    def describe_fix(self, model: Model, releases: Sequence[ReleaseRange]) -> str:
        return self.fix_for(model, releases) if self.fix_for else self.fix


@dataclass(frozen=True)
class Reading:
    """A checkpoint, and what the releases with one expectation make of its names and shapes."""

    inspection: Inspection
    expectation: Expectation | None  # None where the releases do not know the class

    @cached_property
    def params(self) -> tuple[Parameter, ...]:
        """The parameters that are made for it."""
        skip = self.inspection.checkpoint.skip_modules
        return tuple(parameters(self.inspection.linears, self.expectation, skip) if self.expectation else ())

    @cached_property
    def load(self) -> Load | None:
        """What becomes of the tensors by their names and shapes; None where the class is not known."""
        damaged = self.inspection.damaged
        weights = {n: w for n, w in self.inspection.checkpoint.weights.items() if n not in damaged}
        return load_names(weights, self.expectation) if self.expectation else None


class Case(NamedTuple):
    """A checkpoint and one range of releases, with the parameters that the release makes for it."""

    inspection: Inspection
    release: ReleaseRange
    expectation: Expectation | None  # None where the release does not know the class
    reading: Reading  # perhaps of an earlier release that reads the checkpoint alike
    installed: Installed | None = None
    dry_load: DryLoad | None = None  # what the installed release itself says

    @property
    def params(self) -> tuple[Parameter, ...]:
        """The parameters that the release makes."""
        return self.reading.params

    @property
    def load(self) -> Load | None:
        """What becomes of the tensors by their names and shapes; None where the release does not know the class."""
        return self.reading.load

    @property
    def expert_prefix(self) -> str | None:
        """What the release looks for before an expert's number; None where it does not load the model's experts."""
        return self.expectation.expert_prefix if self.expectation else None

    @property
    def ignores_lm_head(self) -> bool:
        """Return True if an lm_head in the file is not used, since config.json says that it is tied."""
        return self.expectation is not None and ignores_lm_head(self.inspection, self.expectation)


def make_cases(
    inspection: Inspection, releases: Sequence[ReleaseRange], target: Target, dry_load: DryLoad | None
) -> Iterator[Case]:
    """A case for each range; what the target's own vLLM is and says belongs to the target's."""
    expectations = [expect(inspection.model, release) for release in releases]
    alike = group_alike((e for e in expectations if e is not None), inspection.checkpoint.weights)
    readings: dict[Expectation | None, Reading] = {}
    for release, expectation in zip(releases, expectations, strict=True):
        first = alike[expectation] if expectation is not None else None
        reading = readings.setdefault(first, Reading(inspection, first))
        own = (target.installed, dry_load) if release in target.ranges else (None, None)
        yield Case(inspection, release, expectation, reading, *own)


def ignores_lm_head(inspection: Inspection, expectation: Expectation) -> bool:
    """Return True if a release does not use the file's lm_head, since config.json says that it is tied."""
    return expectation.tied and inspection.lm_head is not None and expectation.ignores(inspection.lm_head.name)


class Hit(NamedTuple):
    """One rule's answer: which tensors, how bad, in which words; `reason` says why a repair does nothing about it."""

    severity: Severity
    tensors: tuple[str, ...]
    message: str
    reason: str | None = None


Check = Callable[[Case], Iterator[Hit]]
CHECKS: dict[Code, Check] = {}
EXPLANATIONS: dict[Code, Explanation] = {}
RELEASE_INDEPENDENT: set[Code] = set()
AFTER_LOADING: set[Code] = set()  # what shows only in the first forward pass, or in values


def rule(
    code: Code,
    title: str,
    *,
    why: str,
    fix: str,
    upstream: Iterable[int] = (),
    severity: Severity = Severity.FAILS,
    fix_for: FixText | None = None,
    release_independent: bool = False,
    after_loading: bool = False,
) -> Callable[[Check], Check]:
    """Registers the function that looks for a code, with its explanation.

    Args:
        upstream: numbers of vLLM issues.
        severity: that of its worst finding.
        release_independent: it looks at the checkpoint only, so its answer is the same for every release.
        after_loading: a load does not show it, so a load that succeeds does not contradict it.
    """
    urls = tuple(f"https://github.com/vllm-project/vllm/issues/{n}" for n in upstream)
    EXPLANATIONS[code] = Explanation(title, why, fix, urls, severity, fix_for)
    if release_independent:
        RELEASE_INDEPENDENT.add(code)
    if after_loading:
        AFTER_LOADING.add(code)

    def register(function: Check) -> Check:
        CHECKS[code] = function
        return function

    return register


def releases_where(predicate: Callable[[ReleaseRange], bool]) -> str:
    """`vLLM 0.19.0-0.22.1`: the releases that have a trait, for the words of an explanation."""
    return label_ranges(r for r in engines()[DEFAULT].ranges if predicate(r))


def names_of(linears: Iterable[LinearWeight]) -> tuple[str, ...]:
    """Tensor names."""
    return tuple(linear.name for linear in linears)
