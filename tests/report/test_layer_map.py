"""The map of a checkpoint, and the page and the terminal that show it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bnbfix
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.targets import resolve_target
from bnbfix.models.detect import read_model
from bnbfix.report import html as report_html
from bnbfix.report.layer_map import Cell, LayerMap, Row, Section, State, build_layer_map
from bnbfix.report.outcome import ScanOutcome
from bnbfix.report.scan_table import layer_map_lines
from bnbfix.report.terminal import TableOptions
from bnbfix.rules.rule import Code
from bnbfix.rules.scan import scan_checkpoint
from bnbfix.writer.record import repaired_tensors
from tests.support.build import Make, copy_weight, opened, tensors_of
from tests.support.outcomes import EVIL, evil, outcomes

L = "model.language_model.layers."


def layer_map_of(source: Path, target: str = "portable") -> LayerMap:
    checkpoint = opened(source)
    findings = scan_checkpoint(checkpoint, resolve_target(target)).findings
    return build_layer_map(
        checkpoint, read_model(checkpoint.config), findings, repaired_tensors(LocalSource.open(source))
    )


def section(layer_map: LayerMap, title: str) -> Section:
    return next(s for s in layer_map.sections if s.title == title)


def marks(section: Section) -> list[str]:
    """A line for each layer, as a map would show it."""
    return ["".join(r.cells[c].state.mark if c in r.cells else " " for c in section.columns) for r in section.rows]


# The map


def test_the_map_of_31b_has_layers_down_and_modules_across(pristine: Make) -> None:
    layer_map = layer_map_of(pristine("dense31b", "partial", shards=2))
    language = section(layer_map, "language model")
    assert language.columns == ("q", "k", "v", "o", "gate", "up", "down", "norms")
    assert [(r.label, r.kind) for r in language.rows] == [
        ("0", "sliding"),
        ("1", "sliding"),
        ("2", "full"),
        ("3", "sliding"),
        ("4", "sliding"),
        ("5", "full"),
    ]
    assert marks(language) == ["QQQQQQQ.", "!!!QQQQ.", "Q!=QQQQ.", "QQQQ!!Q.", "QQQQQQQ.", "Q!=QQQQ."]
    assert language.rows[1].cells["q"] == Cell(State.FIXABLE, "BF16", (Code.PARTIALLY_QUANTIZED,))
    assert language.rows[2].cells["v"] == Cell(State.ABSENT, "K serves as V")
    assert language.rows[0].cells["norms"].note == "7 BF16"
    assert marks(section(layer_map, "vision tower")) == ["!!!!!!!."] * 2
    around = {r.label: r.cells[""].state for r in section(layer_map, "around the layers").rows}
    assert around["embed_vision.embedding_projection"] is State.FIXABLE
    assert around["language_model.embed_tokens"] is State.UNQUANTIZED
    assert sum(layer_map.counts().values()) == sum(len(r.cells) for s in layer_map.sections for r in s.rows)


def test_the_map_depends_on_the_target(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    old, new = (section(layer_map_of(source, t), "language model") for t in ("0.22.1", "0.32.0"))
    assert (marks(old)[2], marks(new)[2]) == ("Q!=QQQQ.", "QQ=QQQQ.")


def test_the_map_has_audio_inputs_and_shared_layers(pristine: Make) -> None:
    layer_map = layer_map_of(pristine("e4b-noshared", "all"), "0.32.0")
    language, audio = section(layer_map, "language model"), section(layer_map, "audio tower")
    assert language.columns[-3:] == ("input gate", "input proj", "norms")
    assert [r.kind for r in language.rows][-2:] == ["sliding, shared", "full, shared"]
    assert language.rows[4].cells["k"] == Cell(State.ABSENT, "K and V are layer 2's")
    assert marks(language)[4:] == ["Q==QQQQQQ."] * 2
    assert audio.columns == (
        "q",
        "k",
        "v",
        "rel k",
        "post",
        "ff1 in",
        "ff1 out",
        "conv in",
        "conv out",
        "ff2 in",
        "ff2 out",
        "norms",
    )
    assert [s.title for s in layer_map.sections] == [
        "language model",
        "vision tower",
        "audio tower",
        "around the layers",
    ]


def test_what_is_missing_is_a_conflict_of_its_cell(pristine: Make) -> None:
    language = section(layer_map_of(pristine("e4b-noshared", "all"), "0.22.1"), "language model")
    assert language.rows[4].cells["k"] == Cell(State.FIXABLE, "not in the file", (Code.SHARED_WITHOUT_KV,))


def test_the_map_of_a_mixture_has_router_and_experts(pristine: Make) -> None:
    language = section(layer_map_of(pristine("moe26b", "all"), "0.32.0"), "language model")
    assert language.columns == ("q", "k", "v", "o", "gate", "up", "down", "router", "experts", "norms")
    assert set(marks(language)) == {"QQQQQQQ!!.", "QQ=QQQQ!!."}
    assert language.rows[0].cells["experts"] == Cell(State.FIXABLE, "2 BF16", (Code.FUSED_EXPERTS,))


def test_a_conflict_that_no_repair_fixes_has_its_own_mark(pristine: Make) -> None:
    language = section(layer_map_of(pristine("moe26b", "int8"), "0.22.1"), "language model")
    assert set(marks(language)[0][:7]) == {"X"}


def test_the_map_of_a_repaired_checkpoint_shows_what_was_repaired(pristine: Make, tmp_path: Path) -> None:
    bnbfix.repair(pristine("dense31b", "partial", shards=2), tmp_path / "out", "0.22.1", device="cpu")
    language = section(layer_map_of(tmp_path / "out", "0.22.1"), "language model")
    assert marks(language) == ["QQQQQQQ.", ".RRQQQQ.", "QQRQQQQ.", "QQQQ.RQ.", "QQQQQQQ.", "QQRQQQQ."]
    assert language.rows[1].cells["k"].note == "BF16"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"edits": 3}', '{"edits": [{"name": []}]}', '{"edits": [[]]}', "1"])
def test_an_invalid_record_is_ignored(checkpoint: Make, text: str) -> None:
    source = checkpoint("dense31b", "skip")
    (source / "bnbfix.json").write_text(text)
    assert repaired_tensors(LocalSource.open(source)) == frozenset()


@pytest.mark.parametrize(
    ("family", "quant"), [("text", "all"), ("unified12b", "all"), ("dense31b", "bf16"), ("e2b", "skip")]
)
def test_every_weight_is_in_the_map_of_any_family(pristine: Make, family: str, quant: str) -> None:
    checkpoint = opened(pristine(family, quant))
    layer_map = build_layer_map(checkpoint, read_model(checkpoint.config), ())
    notes = [
        c.note for s in layer_map.sections for r in s.rows for c in r.cells.values() if c.state is not State.ABSENT
    ]
    counted = [sum(int(p.split()[0]) for p in n.split(", ")) if " " in n else 1 for n in notes]
    assert sum(counted) == len(checkpoint.weights)


# The map in a terminal


def text_map(layer_map: LayerMap, width: int = 80) -> list[str]:
    return ["".join(span.text for span in line).rstrip() for line in layer_map_lines(layer_map, TableOptions(width))]


def tall(layers: int) -> LayerMap:
    kinds = ["full" if i % 6 == 5 else "sliding" for i in range(layers)]
    rows = tuple(Row(str(i), kind, {"q": Cell(State.QUANTIZED, "nf4")}) for i, kind in enumerate(kinds))
    return LayerMap((Section("language model", ("q", "norms"), rows),))


def test_60_layers_fit_a_terminal_of_80_columns() -> None:
    lines = text_map(tall(60))
    assert max(map(len, lines)) <= 80 and all(line.isascii() for line in lines)
    assert lines[0] == "language model, layers 0 to 59"
    assert lines[1].split() == ["0", "10", "20", "30", "40", "50"]
    assert lines[2].index("|") == lines[3].index("Q") + 5 and lines[2].count("|") == 10
    assert lines[3].split() == ["q", "Q" * 60] and lines[1].index("0") == lines[3].index("Q")


@pytest.mark.parametrize(("width", "blocks"), [(80, 2), (40, 4), (200, 1)])
def test_more_layers_go_below_one_another(width: int, blocks: int) -> None:
    lines = text_map(tall(120), width)
    assert max(map(len, lines)) <= width
    assert "".join(line.split()[1] for line in lines if line.startswith("  q")) == "Q" * 120
    assert sum(line.startswith("language model, layers") for line in lines) == blocks


# The page


class Page(HTMLParser):
    """What of a page matters here: its tags and their attributes, its text, and whether tags nest."""

    VOID = frozenset({"meta", "wbr", "br"})
    OPEN_ENDED = frozenset({"th", "td", "tr", "li"})  # HTML lets these go unclosed

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.stack[-1] != tag:
            assert self.stack.pop() in self.OPEN_ENDED
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


def page(*found: ScanOutcome) -> Page:
    text = "".join(report_html.render(found))
    assert text.isascii() and text.startswith("<!DOCTYPE html>")
    return Page(text)


def test_the_page_shows_the_matrix_the_map_and_the_findings(pristine: Make) -> None:
    found = outcomes(pristine("dense31b", "partial", shards=2), with_map=True)
    p = page(*found)
    for words in (
        "0.19.0-0.22.1",
        "Fails in 5 of 10 release ranges (0.19.0-0.27.1).",
        "language model, 6 layers",
        "K serves as V, but",
    ):
        assert words in p.text
    assert found[0].layer_map is not None
    cells = [a for tag, a in p.tags if tag in ("abbr", "a") and "cell" in (a.get("class") or "")]
    assert len(cells) == sum(found[0].layer_map.counts().values()) and all(a["title"] for a in cells)
    titles = {a["title"] for a in cells}
    assert "layer 2, v: not in the file; K serves as V" in titles
    assert "layer 1, q: in conflict; a repair fixes it (BNB103); BF16" in titles


def test_the_page_asks_nothing_from_anywhere(pristine: Make) -> None:
    p = page(*outcomes(pristine("dense31b", "partial", shards=2), "/nowhere", pristine("e4b", "all"), with_map=True))
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "footer", "section", "article", "header"}
    allowed |= {"h1", "h2", "h3", "p", "span", "b", "small", "code", "abbr", "a", "ul", "li", "wbr", "div", "details"}
    allowed |= {"pre", "summary", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in p.tags} <= allowed
    names = {name for _, attributes in p.tags for name in attributes}
    allowed = {"charset", "lang", "http-equiv", "content", "name", "class", "id", "title", "href", "scope", "open"}
    assert names <= allowed | {"aria-hidden"}
    policy = next(a["content"] for a in p.all("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "url(" not in report_html.style() and "@import" not in report_html.style()


def test_links_inside_the_page_lead_somewhere(pristine: Make) -> None:
    p = page(*outcomes(pristine("moe26b", "all"), pristine("dense31b", "partial"), target="0.32.0", with_map=True))
    ids = [a["id"] for _, a in p.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] or "" for a in p.all("a")]
    assert all(h.startswith("https://github.com/vllm-project/vllm/issues/") for h in links if h[0] != "#")
    assert {h[1:] for h in links if h[0] == "#"} <= set(ids)


def test_tables_say_what_their_heads_are(pristine: Make) -> None:
    p = page(*outcomes(pristine("dense31b", "partial"), with_map=True))
    assert all(a.get("scope") in ("row", "col") for a in p.all("th"))
    assert sum(1 for _ in p.all("caption")) == 3


def test_hostile_names_are_text_in_the_page(pristine: Make) -> None:
    found = evil(outcomes(pristine("dense31b", "partial", shards=2), with_map=True)[0])
    around = Row(EVIL, EVIL, {"": Cell(State.UNQUANTIZED, EVIL)})
    found = replace(found, layer_map=LayerMap((Section("around the layers", ("",), (around,)),)))
    p = page(found)
    assert "script" not in {tag for tag, _ in p.tags}
    assert p.text.count("<script>alert(1)</script>") > 5
    assert all(c.isprintable() for c in p.text.replace("\n", ""))
    values = [v for _, attributes in p.tags for v in attributes.values() if v]
    assert all(c.isprintable() for v in values for c in v)


def test_every_kind_of_cell_and_verdict_has_a_style() -> None:
    css = report_html.style()
    assert all(re.search(rf"^\.{s.name.lower()} {{", css, re.M) for s in State)
    assert all(re.search(rf"\.{v}\b", css) for v in report_html.SIGNS)
    assert "prefers-color-scheme: dark" in css and "@media print" in css


def test_a_layer_that_the_config_does_not_know_is_on_the_map_without_a_kind(checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    with tensors_of(source) as tensors:
        copy_weight(tensors, f"{L}5.mlp.up_proj.weight", f"{L}17.mlp.up_proj.weight")
    last = section(layer_map_of(source, "0.32.0"), "language model").rows[-1]
    assert (last.label, last.kind, set(last.cells)) == ("17", "", {"up"})


def test_a_page_of_what_has_no_findings_says_none(pristine: Make) -> None:
    (bad,) = outcomes(pristine("dense31b", "partial", shards=2), target="0.32.0")
    assert bad.result is not None and bad.result.findings
    clean = replace(bad, result=replace(bad.result, findings=()))
    pages = ["".join(report_html.render([o])) for o in (clean, bad)]
    findings = [re.search(r"<h2>Findings, for vLLM 0\.32\.0</h2>\s*<p>None\.</p>\s*</section>", page) for page in pages]
    assert [m is not None for m in findings] == [True, False]


def test_a_page_without_a_map_has_the_rest(pristine: Make) -> None:
    source = pristine("dense31b", "partial", shards=2)
    whole, without = ("".join(report_html.render(outcomes(source, with_map=drawn))) for drawn in (True, False))
    drawn = re.compile(r'<section class="map">.*?</section>\s*', re.DOTALL)
    assert len(drawn.findall(whole)) == 1 and drawn.findall(without) == []
    assert drawn.sub("", whole).split("<article")[1] == without.split("<article")[1]
