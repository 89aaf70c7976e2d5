"""Asks the installed vLLM, in a process of its own: what it makes of a config, and of a whole folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.source import LocalSource
from ...errors import EngineError, UsageError
from ...models.family import Model
from ...models.inspection import Inspection, inspect_checkpoint
from ..engine import Installed, Parameter, ReleaseRange
from ..manifest import parameters
from ..targets import find_range
from .process import Status, run_worker
from .recorded import expect
from .releases import INSTALL, find_installed, ranges

PROBE_SECONDS = 300.0
LOAD_SECONDS = 1800.0
HEADROOM = 1.2  # memory asked for, as a multiple of the checkpoint's size


@dataclass(frozen=True)
class Disagreement:
    """One module for which the release table and the installed vLLM differ."""

    module: str
    table: str
    vllm: str


@dataclass(frozen=True)
class ProbeResult:
    """What the installed vLLM makes of a checkpoint's config. `modules` maps each linear module to quantized or not."""

    versions: Mapping[str, str | None]
    release: ReleaseRange
    modules: Mapping[str, bool]
    skips: Mapping[str, tuple[str, ...]]  # for each skip entry, the modules that this vLLM skips for it
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True)
class LoadResult:
    """What the installed vLLM did with a folder. Names are vLLM's; `error` is None when it ran."""

    versions: Mapping[str, str | None]
    error: str | None
    parameters: int
    quantized: int
    unbound: tuple[str, ...]  # quantized, but without a quant state
    requantized: tuple[str, ...]  # unquantized in the folder, quantized in the engine
    forward: bool

    @property
    def ok(self) -> bool:
        return self.error is None and self.forward and not self.unbound and not self.requantized


def require_vllm() -> tuple[Installed, ReleaseRange]:
    """The installed vLLM and its row; of a release newer than the table, the last row. Raises UsageError if none."""
    here = find_installed()
    if here is None:
        hint = "Run bnbfix in the environment that serves the model."
        raise UsageError("no vLLM is installed next to bnbfix", hint=hint, command=INSTALL)
    return here, find_range(here.version) or ranges()[-1]


def probe_model(folder: Path, status: Status | None = None) -> ProbeResult:
    """Builds the model's skeleton in the installed vLLM and compares the release table with it.

    Raises UsageError without a vLLM, EngineError when it gives no answer, and the errors of `open_checkpoint`.
    """
    _, release = require_vllm()
    inspection = inspect_checkpoint(open_checkpoint(LocalSource.open(folder)))
    (answer,) = run_worker("probe", [folder], seconds=PROBE_SECONDS, status=status)
    if answer["error"]:
        raise EngineError(f"vLLM cannot build the model: {answer['error']}", where=str(folder))
    modules = {m["name"]: bool(m["quantized"]) for m in answer["modules"]}
    skips = {entry: tuple(names) for entry, names in answer["skips"].items()}
    disagreements = find_disagreements(_expect(inspection, release), modules, release, inspection.model)
    return ProbeResult(answer["versions"], release, modules, skips, disagreements)


def _expect(inspection: Inspection, release: ReleaseRange) -> list[Parameter]:
    expectation = expect(inspection.model, release)
    return parameters(inspection.linears, expectation, inspection.checkpoint.skip_modules) if expectation else []


def find_disagreements(
    expected: Sequence[Parameter], modules: Mapping[str, bool], release: ReleaseRange, model: Model
) -> tuple[Disagreement, ...]:
    """Where the table's parameters and vLLM's modules differ. Pure."""
    out = []
    words = {True: "quantized", False: "unquantized", None: "no such module"}
    for p in expected:
        if p.kind not in ("expert", "other") and modules.get(p.module) is not p.quantized:
            out.append(Disagreement(p.module, words[p.quantized], words[modules.get(p.module)]))
    prefix = release.expert_prefix
    if model.moe and prefix is not None:
        for name, quantized in sorted(modules.items()):
            if ".experts" not in name:
                continue
            if f".{prefix}" not in name or (prefix == "experts" and ".moe.experts" in name):
                out.append(Disagreement(name, f"experts under {prefix}", "another prefix"))
            elif not quantized:  # a release that loads experts quantizes them
                out.append(Disagreement(name, words[True], words[False]))
    return tuple(out)


def load_model(folder: Path, seconds: float = LOAD_SECONDS, status: Status | None = None) -> LoadResult:
    """Loads a folder in the installed vLLM and runs a forward pass.

    Raises UsageError without a vLLM, EngineError when the machine is too small or no answer comes within `seconds`,
    and the errors of `open_checkpoint`.
    """
    _, release = require_vllm()
    source = LocalSource.open(folder)
    checkpoint = open_checkpoint(source)
    _check_memory(sum(source.files[s] for s in checkpoint.shards))
    (answer,) = run_worker("load", [folder], seconds=seconds, status=status)
    found = answer.get("parameters", [])
    error = answer["error"]
    if error is None and not answer.get("finite"):
        error = "the forward pass gave no finite numbers"
    return LoadResult(
        versions=answer["versions"],
        error=error,
        parameters=len(found),
        quantized=sum(p["quantized"] for p in found),
        unbound=tuple(p["name"] for p in found if p["quantized"] and not p["states"]),
        requantized=find_requantized(checkpoint, release, {p["name"] for p in found if p["quantized"]}),
        forward=bool(answer.get("forward")),
    )


def find_requantized(checkpoint: Checkpoint, release: ReleaseRange, quantized: set[str]) -> tuple[str, ...]:
    """Parameters that are quantized in the engine though the checkpoint has full precision for them."""
    if not checkpoint.quantization:
        return tuple(sorted(quantized))
    expected = _expect(inspect_checkpoint(checkpoint), release)
    unquantized = (p.module + ".weight" for p in expected if not all(m.quantized for m in p.members))
    return tuple(sorted(quantized.intersection(unquantized)))


def _check_memory(size: int) -> None:
    """Raises EngineError when neither a GPU nor this machine's memory will hold the weights."""
    free = _free_memory()
    if free is not None and not Path("/dev/nvidia0").exists() and free < size * HEADROOM:
        raise EngineError(
            f"the machine is too small to load it: {size / 1e9:,.1f} GB of weights, {free / 1e9:,.1f} GB of memory free"
        )


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no such file on this system: then nothing is known, and nothing is refused
    return None
