"""llm_int8_skip_modules: what vLLM and transformers make of its entries, and a list that both obey.

vLLM compares entries with its own module names, transformers with its own; neither translates the other's. An entry
that one of them does not know is harmless there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ..engines.manifest import find_slot, group_alike
from ..engines.skip_entries import Matches, NamedModules, SkipList, read_skip_list
from ..engines.transformers import find_module, transformers_linears, transformers_skips
from ..models.inspection import LinearWeight
from ..models.roles import classify_tensor
from .changes import Changes, ConfigEdit, Request
from .rule import Case, Code, Hit, Severity, names_of, rule


@rule(
    Code.QUANTIZED_BUT_SKIPPED,
    "quantized weight of a skipped module",
    why="A skip entry that vLLM matches names this module, so its parameter is unquantized, but the file holds the "
    "weight quantized: a bare AssertionError.",
    fix="The entry is removed and replaced by entries for the unquantized modules that it also named. No tensor "
    "changes.",
)
def check_quantized_but_skipped(case: Case) -> Iterator[Hit]:
    hits = [(m, p.skipped_by) for p in case.params if p.quantizable and p.skipped_by for m in p.members if m.quantized]
    if hits:
        entries = sorted({e for _, by in hits for e in by})
        yield Hit(Severity.FAILS, names_of(m for m, _ in hits), f"quantized, but skipped by {', '.join(entries)}")


@rule(
    Code.NOTHING_QUANTIZED,
    "nothing quantized under a bitsandbytes config",
    why="config.json says bitsandbytes, but the skip list names every module, so that no parameter is quantized: "
    "`AssertionError: vLLM currently does not support BNB quantization for ...`. Was the quantized model merged or "
    "dequantized?",
    fix="quantization_config is removed from config.json, and the checkpoint loads as what it is, an unquantized one.",
)
def check_nothing_quantized(case: Case) -> Iterator[Hit]:
    if not any(p.quantized for p in case.params) and not any(m.quantized for m in case.inspection.linears):
        yield Hit(Severity.FAILS, (), "config.json says bitsandbytes, but no weight and no parameter is quantized")


@rule(
    Code.SKIP_ENTRY,
    "skip entry that vLLM does not understand",
    severity=Severity.NOTE,
    why="An entry of llm_int8_skip_modules names modules as transformers does (`model.vision_tower`). vLLM compares "
    "with its own names (`vision_tower`, `language_model.model...qkv_proj`) and never translates.",
    fix="The same modules are named in vLLM's spelling as well. The entry itself stays, transformers needs it.",
)
def check_skip_entry(case: Case) -> Iterator[Hit]:
    if case.expectation is None:
        return
    unquantized = [m for p in case.params if p.quantized for m in p.members if not m.quantized]
    architecture = case.inspection.model.family.architecture
    theirs = {module for m in unquantized if (module := find_module(m.name, architecture))}
    entries = case.inspection.checkpoint.skip_modules
    of_theirs, of_vllm = read_skip_list(entries, transformers_skips), read_skip_list(entries, case.expectation.skips)
    known = {entry for p in case.params for entry in of_vllm.find(p.module)}
    only_theirs = {entry for module in theirs for entry in of_theirs.find(module)} - known
    if unknown := tuple(e for e in entries if e in only_theirs):
        yield Hit(Severity.NOTE, unknown, "skip entry only in transformers' spelling; vLLM does not match it")


@rule(
    Code.TRANSFORMERS_REQUANTIZES,
    "unquantized weight that transformers quantizes again",
    severity=Severity.NOTE,
    why="No entry of the skip list names this module as transformers names it, so transformers quantizes the "
    "unquantized weight when it loads the checkpoint. vLLM is not affected.",
    fix="A repair writes the skip entries in both spellings.",
    release_independent=True,
)
def check_transformers_requantizes(case: Case) -> Iterator[Hit]:
    entries = read_skip_list(case.inspection.checkpoint.skip_modules, transformers_skips)
    hits = [
        m
        for m, module in transformers_linears(case.inspection.linears, case.inspection.model)
        if not m.quantized and m.role.kind != "lm_head" and not entries.find(module)
    ]
    if hits:
        yield Hit(Severity.NOTE, names_of(hits), "transformers would quantize this weight again; no entry names it")


def write_skip_list(request: Request, so_far: Changes) -> Changes:
    """Names every weight that ends up unquantized in both spellings, and none that ends up quantized.

    Where nothing ends up quantized, quantization_config goes: vLLM refuses one without a quantized module.

    Entries keep their places, except those that name a quantized module; what is missing is added at the end, vLLM's
    spelling before transformers'.
    """
    entries, model = request.inspection.checkpoint.skip_modules, request.inspection.model
    after = [(m, m.name in so_far.quantize or so_far.keeps_quantized(m)) for m in request.linears(so_far)]
    for insert in so_far.insert:
        added = LinearWeight(insert.donor, classify_tensor(insert.name), insert.name)
        after.append((added, not insert.dequantize and insert.donor.quantized))
    if so_far.experts == {} and not any(quantized for _, quantized in after):
        edit = ConfigEdit(("quantization_config",), None, Code.NOTHING_QUANTIZED, remove=True)
        return Changes(config=(edit,))
    spellings: list[tuple[Mapping[str, bool], Matches]] = []  # each reader's modules: are they quantized?
    alike = group_alike(request.expectations, [linear.name for linear, _ in after])
    for expectation in dict.fromkeys(alike.values()):
        names: dict[str, bool] = {}
        for linear, quantized in after:
            slot = find_slot(linear.name, expectation)
            if slot is not None and slot.quantized and not slot.experts:
                names[slot.module] = quantized
        spellings.append((names, expectation.skips))
    quantized_after = {m.name: quantized for m, quantized in after}
    theirs = transformers_linears((m for m, _ in after), model)
    names = {module: quantized_after[m.name] for m, module in theirs}
    spellings.append((names, transformers_skips))

    kept = [
        NamedModules((m for m, quantized in modules.items() if quantized), matches) for modules, matches in spellings
    ]

    def matches_quantized(entry: str) -> bool:
        return any(modules.any_named_by(entry) for modules in kept)

    out = [e for e in entries if not matches_quantized(e)]
    for modules, matches in spellings:
        named = SkipList(out, matches)
        missing = [m for m, quantized in modules.items() if not quantized and not named.find(m)]
        # Without a list transformers leaves lm_head unquantized; with one it has to be named.
        missing = [m for m in missing if m != "lm_head" or out]
        out += shortest_prefixes(missing, matches, matches_quantized)
    if out and not entries and "lm_head" not in out:
        out.append("lm_head")
    skip = tuple(dict.fromkeys(out))
    if skip == entries:
        return Changes()
    edit = ConfigEdit(("quantization_config", "llm_int8_skip_modules"), list(skip), Code.SKIP_ENTRY)
    return Changes(config=(edit,))


def shortest_prefixes(modules: Iterable[str], matches: Matches, matches_quantized: Callable[[str], bool]) -> list[str]:
    """The shortest dotted prefixes that name all of some modules and no quantized one, in numeric order.

    `matches_quantized` says whether an entry names a quantized module to any reader of the list.

    >>> def names(entry, module):
    ...     return entry in module.split(".") or f"{module}.".startswith(f"{entry}.")
    >>> shortest_prefixes(["tower.a.b", "tower.c", "x.layers.1.mlp"], names, lambda e: names(e, "x.o"))
    ['tower', 'x.layers']
    """
    refused: set[str] = set()
    chosen: list[str] = []
    for module in sorted(modules):
        if any(matches(entry, module) for entry in chosen[-1:]):
            continue
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            entry = ".".join(parts[:n])
            if entry in refused:
                continue
            if not matches_quantized(entry):
                chosen.append(entry)
                break
            refused.add(entry)
    return sorted(chosen, key=_numeric_key)


def _numeric_key(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in name.split(".")]
