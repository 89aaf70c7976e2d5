"""What the release lacks or refuses as a whole, and what an installed one says itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..engines.engine import version_key
from ..engines.registry import engines, find_refusal
from ..engines.targets import label_ranges
from ..engines.vllm.releases import plugin_bounds, unfit_plugin
from .rule import Case, Code, Hit, Severity, names_of, releases_where, rule

if TYPE_CHECKING:
    from ..engines.vllm.live import DryLoad

ASKED = frozenset({Code.ENGINE_REFUSES, Code.REQUANTIZED_AT_LOAD, Code.REORDERED_AT_LOAD})  # what a dry load says
_REQUIRES = releases_where(lambda r: r.plugin == "required")
_REFUSES = releases_where(lambda r: r.plugin == "refused")
_BOUNDS = ", ".join(f"{plugin} and newer need vLLM {vllm} or newer" for plugin, vllm in plugin_bounds())
_OLDER = "; ".join(f"before vLLM {vllm}: pip install 'vllm-bnb-plugin<{plugin}'" for plugin, vllm in plugin_bounds())


@rule(
    Code.UNKNOWN_CLASS,
    "model class that the release does not load",
    why="The release has no class for this architecture, or refuses it under bitsandbytes: `Model ... does not support "
    "BitsAndBytes quantization yet`.",
    fix="Nothing in the checkpoint; another vLLM is needed.",
)
def check_unknown_class(case: Case) -> Iterator[Hit]:
    name = case.inspection.model.family.architecture
    if case.expectation is None:
        refusal = find_refusal(case.inspection.model, case.release)
        words = f"{name} is unknown to the release" if refusal is None else f"the release refuses it: {refusal}"
        loading = label_ranges(r for r in engines()[case.release.engine].ranges if name in r.classes)
        yield Hit(Severity.FAILS, (), words, f"{loading} loads a {name}")


@rule(
    Code.PLUGIN,
    "vllm-bnb-plugin",
    why=f"In {_REQUIRES} bitsandbytes support is a plugin; without it: `Unknown quantization method: bitsandbytes`. "
    f"With {_REFUSES} the plugin must not be installed. Of its versions, {_BOUNDS}.",
    fix=f"pip install vllm-bnb-plugin ({_OLDER}); with {_REFUSES}: pip uninstall vllm-bnb-plugin",
    upstream=[52802],
)
def check_plugin(case: Case) -> Iterator[Hit]:
    here = case.installed
    if case.release.plugin == "required" and (here is None or here.plugin is None):
        severity = Severity.NOTE if here is None else Severity.FAILS
        reason = f"not in the checkpoint: pip install vllm-bnb-plugin ({_OLDER})"
        yield Hit(severity, (), "needs vllm-bnb-plugin", reason)
    if case.release.plugin == "required" and here is not None and (limit := unfit_plugin(here)) is not None:
        words = f"vllm-bnb-plugin {here.plugin} is installed, which does not work with vLLM {here.version}"
        yield Hit(Severity.FAILS, (), words, f"not in the checkpoint: pip install 'vllm-bnb-plugin<{limit}'")
    if case.release.plugin == "refused" and here is not None and here.plugin is not None:
        reason = "not in the checkpoint: pip uninstall vllm-bnb-plugin"
        words = "vllm-bnb-plugin is installed, but this release is incompatible with it"
        yield Hit(Severity.FAILS, (), words, reason)


@rule(
    Code.TRANSFORMERS,
    "transformers too new for the release",
    why=f"{releases_where(lambda r: r.transformers_below is not None)} reads head_dim in a way that transformers 5.15 "
    "and newer refuse for every Gemma4: `AmbiguousGlobalPerLayerAttributeError: 'head_dim' is a per-layer attribute`. "
    "The official images of 0.27.0 and 0.27.1 have transformers 5.15.0. No edit of config.json helps.",
    fix="pip install 'transformers<5.15'",
    upstream=[51744, 52768, 53836],
)
def check_transformers(case: Case) -> Iterator[Hit]:
    limit, here = case.release.transformers_below, case.installed.transformers if case.installed else None
    if limit is None or not case.inspection.model.family.architecture.startswith("Gemma4"):
        return
    reason = f"not in the checkpoint: pip install 'transformers<{limit}'"
    if here is None:
        yield Hit(Severity.NOTE, (), f"needs transformers older than {limit}", reason)
    elif (version_key(here) or (0,)) >= (version_key(limit) or (0,)):
        words = f"transformers {here} is installed, with which the release starts no Gemma4"
        yield Hit(Severity.FAILS, (), words, reason)


@rule(
    Code.INT8,
    "LLM.int8",
    why="The weights are quantized to 8 bits, not 4. vLLM loads such dense models when the skip list is in its own "
    f"spelling, and {releases_where(lambda r: r.needs_v)} lacks V's scales where K serves as V; a mixture of experts "
    "is refused.",
    fix="Skip entries are added, and V where it is missing. What would need a weight dequantized needs the whole model "
    "dequantized: `repair --bf16`.",
)
def check_int8(case: Case) -> Iterator[Hit]:
    names = names_of(m for m in case.inspection.linears if m.weight.int8)
    if not names:
        return
    reason = "what would need a weight dequantized needs the whole model dequantized: --bf16"
    if case.inspection.model.moe:
        yield Hit(Severity.FAILS, names, "LLM.int8 in a mixture of experts, which vLLM refuses", reason)
    else:
        yield Hit(Severity.NOTE, names, "LLM.int8, of which a repair fixes only the skip list and V", reason)


@rule(
    Code.ENGINE_REFUSES,
    "the installed vLLM refuses the checkpoint",
    why="The loader of the vLLM that was asked (`--dry-load`) stops with the error that is quoted, given the names, "
    "dtypes and shapes of the checkpoint's tensors; or it leaves quantized parameters without a quant state, on which "
    "the first forward pass stops.",
    fix="A repair fixes the other findings, and asks the same vLLM about the result before it is written.",
)
def check_engine_refuses(case: Case) -> Iterator[Hit]:
    yield from (hit for code, hit in describe_dry_load(case.dry_load) if code is Code.ENGINE_REFUSES)


@rule(
    Code.REQUANTIZED_AT_LOAD,
    "unquantized weight that the installed vLLM quantizes",
    severity=Severity.WRONG,
    why="The vLLM that was asked (`--dry-load`) quantizes this unquantized weight while it loads, without a message, "
    "because no skip entry names its module as vLLM does.",
    fix="A repair names the module in llm_int8_skip_modules, in vLLM's spelling.",
)
def check_requantized_at_load(case: Case) -> Iterator[Hit]:
    yield from (hit for code, hit in describe_dry_load(case.dry_load) if code is Code.REQUANTIZED_AT_LOAD)


@rule(
    Code.REORDERED_AT_LOAD,
    "quantized weight that the installed vLLM reorders",
    severity=Severity.WRONG,
    why="The vLLM that was asked (`--dry-load`) reorders the rows of this weight while it loads. A quantized one has "
    "packed bytes in place of rows, which are decoded in their new order with the scales of the old one.",
    fix="A repair dequantizes it, where BNB119 names it too. `repair --bf16` dequantizes everything.",
)
def check_reordered_at_load(case: Case) -> Iterator[Hit]:
    yield from (hit for code, hit in describe_dry_load(case.dry_load) if code is Code.REORDERED_AT_LOAD)


def describe_dry_load(answer: DryLoad | None) -> Iterator[tuple[Code, Hit]]:
    """What an installed vLLM's answer comes to; nothing where it loads the checkpoint, or none was asked."""
    if answer is None:
        return
    if answer.error is not None:
        words = f"vLLM {answer.vllm} stops: {answer.error}"
        yield Code.ENGINE_REFUSES, Hit(Severity.FAILS, answer.tensors, words)
    elif answer.unbound:
        words = f"vLLM {answer.vllm} loads it, but {len(answer.unbound)} quantized parameters have no quant state"
        yield Code.ENGINE_REFUSES, Hit(Severity.FAILS, answer.unbound, words)
    if answer.reordered:
        words = f"vLLM {answer.vllm} reorders its packed bytes at load time"
        yield Code.REORDERED_AT_LOAD, Hit(Severity.WRONG, answer.reordered, words)
    if answer.requantized:
        words = f"vLLM {answer.vllm} silently quantizes it at load time"
        yield Code.REQUANTIZED_AT_LOAD, Hit(Severity.WRONG, answer.requantized, words)
