"""A checkpoint as a map: layers down, modules across, and what is in each cell. `scan_table` and `html` draw it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.quant_state import split_state_tensor
from ..models.family import FULL, Model
from ..models.roles import canonical
from ..rules.rule import Code
from ..rules.scan import Finding


class State(Enum):
    """What is in a cell: the mark that shows it without colour, and what it means. A later one hides an earlier one."""

    ABSENT = ("=", "not in the file, and not needed")
    UNQUANTIZED = (".", "full precision")
    QUANTIZED = ("Q", "quantized")
    REPAIRED = ("R", "changed by an earlier repair")
    FIXABLE = ("!", "in conflict; a repair fixes it")
    CONFLICT = ("X", "in conflict; no repair fixes it")

    @property
    def mark(self) -> str:
        return self.value[0]

    @property
    def meaning(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Cell:
    """Tensors that share a cell. `note` says what they are, or why there are none."""

    state: State
    note: str
    codes: tuple[Code, ...] = ()


@dataclass(frozen=True)
class Row:
    """A layer, or a module outside of all layers."""

    label: str
    kind: str  # "full", "sliding" or nothing; with "shared" where K and V come from another layer
    cells: Mapping[str, Cell]  # by column


@dataclass(frozen=True)
class Section:
    """A stack of layers, or everything around them (one column, "")."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class LayerMap:
    """The whole map, and how many cells are in each state."""

    sections: tuple[Section, ...]

    def counts(self) -> dict[State, int]:
        found = Counter(c.state for s in self.sections for row in s.rows for c in row.cells.values())
        return {state: found[state] for state in State if found[state]}


TOWERS = {"language_model": "language model", "vision_tower": "vision tower", "audio_tower": "audio tower"}
AROUND = "around the layers"
_NUMBER = r"(?:0|[1-9][0-9]{0,5})"
_IN_LAYER = re.compile(rf"(?P<stack>(?:[a-z]\w*\.)+)(?P<layer>{_NUMBER})\.(?P<rest>.+)")
_NOT_LINEAR = re.compile(r"norm|conv1d|\.bias$|scalar|scale$|_m(?:in|ax)$", re.IGNORECASE)
_COLUMNS: tuple[tuple[str, str], ...] = (  # column, and the rest of the name after the layer's number; in display order
    ("q", r"self_attn\.q_proj"),
    ("k", r"self_attn\.k_proj"),
    ("v", r"self_attn\.v_proj"),
    ("o", r"self_attn\.o_proj"),
    ("rel k", r"self_attn\.relative_k_proj"),
    ("post", r"self_attn\.post"),
    ("gate", r"mlp\.gate_proj"),
    ("up", r"mlp\.up_proj"),
    ("down", r"mlp\.down_proj"),
    ("ff1 in", r"feed_forward1\.ffw_layer_1"),
    ("ff1 out", r"feed_forward1\.ffw_layer_2"),
    ("conv in", r"lconv1d\.linear_start"),
    ("conv out", r"lconv1d\.linear_end"),
    ("ff2 in", r"feed_forward2\.ffw_layer_1"),
    ("ff2 out", r"feed_forward2\.ffw_layer_2"),
    ("router", r"router\.proj"),
    ("experts", r"(?:moe\.)?experts\..*"),
    ("input gate", r"per_layer_input_gate"),
    ("input proj", r"per_layer_projection"),
)
REST = "norms"  # norms, scalars and bounds: everything that is not a projection
_ORDER = (*(column for column, _ in _COLUMNS), REST)
_PATTERNS = tuple((column, re.compile(rf"{pattern}(?:\.linear)?(?:\.weight)?")) for column, pattern in _COLUMNS)

_Place = tuple[str, str, str]  # section, row, column


@dataclass
class _Tensors:
    """What is collected for a cell while the map is built."""

    forms: Counter[str] = field(default_factory=Counter)
    states: set[State] = field(default_factory=set)
    codes: set[Code] = field(default_factory=set)


def build_layer_map(
    checkpoint: Checkpoint, model: Model, findings: Iterable[Finding], repaired: Iterable[str] = frozenset()
) -> LayerMap:
    """The map of a checkpoint. `findings` make conflicts; `repaired` are tensors that an earlier repair changed."""
    found: dict[_Place, _Tensors] = {}
    done = {canonical(name) for name in repaired}
    for name, weight in checkpoint.weights.items():
        cell = found.setdefault(_place(name), _Tensors())
        cell.forms[weight.form] += 1
        cell.states.add(State.QUANTIZED if weight.quantized else State.UNQUANTIZED)
        if canonical(name) in done:
            cell.states.add(State.REPAIRED)
    for f in findings:
        for name in f.tensors if f.counts else ():
            split = split_state_tensor(name)
            cell = found.setdefault(_place(split[0] if split else name), _Tensors())
            cell.states.add(State.CONFLICT if f.reason else State.FIXABLE)
            cell.codes.add(f.code)
    return LayerMap(tuple(_sections({place: _cell(t) for place, t in found.items()}, model)))


def _place(name: str) -> _Place:
    name = canonical(name)
    if m := _IN_LAYER.fullmatch(name):
        column = next((c for c, pattern in _PATTERNS if pattern.fullmatch(m["rest"])), None) or _column(m["rest"])
        return _title(m["stack"]), m["layer"], column
    module = name.removesuffix(".weight").removesuffix(".linear").removeprefix("model.")
    return AROUND, re.sub(r"(?<=\.)\d+(?=\.)", "N", module), ""


def _title(stack: str) -> str:
    """`model.vision_tower.encoder.layers.` -> `vision tower`"""
    modules = [m for m in stack.split(".") if m not in ("", "model", "encoder", "transformer", "layers", "blocks")]
    return " ".join(modules).replace("_", " ") if modules else TOWERS["language_model"]


def _column(rest: str) -> str:
    """The column of a module that has no short name: its own last name."""
    module = rest.removesuffix(".weight")
    return REST if module == rest or _NOT_LINEAR.search(rest) else module.rpartition(".")[2]


def _cell(t: _Tensors) -> Cell:
    forms = ", ".join(f"{n} {form}" if sum(t.forms.values()) > 1 else form for form, n in t.forms.most_common())
    state = max(t.states, key=list(State).index)
    return Cell(state, forms or "not in the file", tuple(sorted(t.codes, key=lambda c: c.value)))


def _sections(cells: Mapping[_Place, Cell], model: Model) -> Iterator[Section]:
    titles = dict.fromkeys((*TOWERS.values(), *(section for section, _, _ in cells if section != AROUND), AROUND))
    for title in titles:
        rows: dict[str, dict[str, Cell]] = {}
        for (section, row, column), cell in cells.items():
            if section == title:
                rows.setdefault(row, {})[column] = cell
        if not rows:
            continue
        if title == AROUND:
            yield Section(title, ("",), tuple(Row(name, "", rows[name]) for name in rows))
            continue
        there = dict.fromkeys(c for row in rows.values() for c in row)
        columns = tuple(c for c in dict.fromkeys((*_ORDER[:-1], *there, REST)) if c in there)
        layers = sorted(rows, key=int)
        if title == TOWERS["language_model"]:
            yield Section(title, columns, tuple(_layer(int(n), rows[n], columns, model) for n in layers))
        else:
            yield Section(title, columns, tuple(Row(n, "", rows[n]) for n in layers))


def _layer(n: int, cells: dict[str, Cell], columns: tuple[str, ...], model: Model) -> Row:
    """A layer of the language model, whose kind explains why K or V may be missing."""
    if n >= len(model.layer_types):  # config.json knows no such layer
        return Row(str(n), "", cells)
    kind = "full" if model.layer_types[n] == FULL else "sliding"
    absent: dict[str, str] = {}
    if model.k_serves_as_v(n):
        absent = {"v": "K serves as V"}
    elif model.kv_shared(n):
        donors = model.kv_donors(n)
        absent = dict.fromkeys(("k", "v"), f"K and V are layer {donors[0]}'s" if donors else "K and V are shared")
        kind += ", shared"
    given = {c: Cell(State.ABSENT, why) for c, why in absent.items() if c in columns and c not in cells}
    return Row(str(n), kind, cells | given)
