"""Verification: a clean repair passes, and each way of spoiling one is named with its file and tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bnbfix
from bnbfix.errors import HeaderError, InputError, NotApplicable, UsageError
from bnbfix.planner.plan import Plan
from bnbfix.verifier import verify as verifier  # noqa: F401 - `set_chunk_bytes` needs it imported
from bnbfix.writer.record import CHECKSUM, record_checksum, was_edited
from tests.support.build import Make, Raw, set_chunk_bytes, tensors_of
from tests.support.command_line import Cli

# With this target the output has a dequantized tensor, inserted copies, a rewritten shard and a copied one.
TARGET = "0.22.1"
HASH = "differs from the hash in the record"
K, V = (f"model.layers.5.self_attn.{part}_proj.weight" for part in "kv")  # K serves as V there
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
FLAGS = {"vllm": TARGET, "device": "cpu"}


@pytest.fixture(scope="module")
def repaired(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """A source with one partially quantized group, its repair, and the plan of it; tests must not change them."""
    source = pristine("text", "partial", shards=2)
    out = tmp_path_factory.mktemp("repaired") / "out"
    return source, out, bnbfix.repair(source, out, **FLAGS).plan


@pytest.fixture(scope="module")
def half_copied(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """One whose first shard is copied unchanged."""
    source = pristine("text", "single", shards=2)
    out = tmp_path_factory.mktemp("half") / "out"
    return source, out, bnbfix.repair(source, out, **FLAGS).plan


Spoil = tuple[Path, Path, Plan]


@pytest.fixture
def spoilt(repaired: Spoil, tmp_path: Path) -> Spoil:
    """The same with an output of the test's own, which it may spoil."""
    source, out, plan = repaired
    return source, Path(shutil.copytree(out, tmp_path / "out")), plan


def flip(file: Path, at: int) -> None:
    """Flips one bit of a byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 0x01
    file.write_bytes(data)


def record(out: Path, change: Callable[[dict[str, Any]], object], *, checksum: bool = True) -> None:
    """Changes the record of an output; without `checksum` its own checksum stays what it was."""
    path = out / "bnbfix.json"
    doc = json.loads(path.read_text())
    change(doc)
    if checksum:
        doc[CHECKSUM] = record_checksum(doc)
    path.write_text(json.dumps(doc))


def forge(out: Path, name: str) -> None:
    """Makes the record's hash of a file true again."""
    digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
    record(out, lambda doc: doc["sha256"].update({name: digest}))


def where(out: Path, tensor: str) -> tuple[str, int, int]:
    """(shard, first byte in its file, number of bytes) of a tensor of an output."""
    for shard in sorted(out.glob("*.safetensors")):
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if found := json.loads(data[8 : 8 + length]).get(tensor):
            begin, end = found["data_offsets"]
            return shard.name, 8 + length + begin, end - begin
    raise LookupError(tensor)


def of_kind(plan: Plan, kind: str) -> str:
    """A tensor of the output that was kept, dequantized or inserted."""
    edits = {e.name: e.action for e in plan.edits}
    if kind == "kept":
        return "model.embed_tokens.weight"
    found = {"dequantized": "dequantize", "inserted": "insert"}[kind]
    return min(name for name, action in edits.items() if action == found)


def problems(out: Path, source: Path | None) -> list[tuple[str, str | None, str]]:
    return [(p.file, p.tensor, p.message) for p in bnbfix.verify(out, source).problems]


def places(out: Path, source: Path | None) -> list[tuple[str, str | None]]:
    return [(file, tensor) for file, tensor, _ in problems(out, source)]


def test_a_clean_repair_passes_without_its_source(repaired: Spoil) -> None:
    _, out, _ = repaired
    result = bnbfix.verify(out)
    assert result.ok and result.problems == ()
    assert (result.out, result.target, result.kept, result.decoded) == (out, TARGET, 0, 0)
    assert result.files == len(list(out.iterdir())) - 1  # the record itself is not hashed
    assert repr(result) == (
        f"VerifyResult(out={str(out)!r}, target='0.22.1', problems=0, files={result.files}, kept=0, decoded=0)"
    )


def test_a_clean_repair_passes_with_its_source_and_everything_was_compared(repaired: Spoil) -> None:
    source, out, plan = repaired
    result = bnbfix.verify(out, source)
    assert result.ok and result.problems == ()
    assert result.decoded == sum(e.action == "dequantize" for e in plan.edits) > 0
    assert result.kept + result.decoded == sum(len(s.tensors) for s in plan.shards)
    assert any(e.action == "insert" for e in plan.edits)


@pytest.mark.parametrize(
    ("family", "quant", "target"),
    [
        ("dense31b", "partial", "portable"),
        ("e4b-noshared", "all", "portable"),
        ("text", "fp4", "portable"),
        ("dense31b", "storage-bf16", "portable"),
        ("dense31b", "int8", "0.32.0"),
        ("unified12b", "all", "0.33.0"),
    ],
)
def test_every_kind_of_repair_passes(pristine: Make, tmp_path: Path, family: str, quant: str, target: str) -> None:
    source = pristine(family, quant, shards=2)
    bnbfix.repair(source, tmp_path / "out", vllm=target, device="cpu")
    assert problems(tmp_path / "out", source) == []


@pytest.mark.parametrize("chunk", [4 << 10, 8 << 10])
def test_the_chunk_size_does_not_matter(repaired: Spoil, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    source, out, plan = repaired
    set_chunk_bytes(chunk, monkeypatch)
    assert problems(out, source) == []
    assert where(out, of_kind(plan, "dequantized"))[2] > chunk


def test_progress_adds_up_to_the_bytes_compared(repaired: Spoil) -> None:
    source, out, plan = repaired
    hashing: list[int] = []
    both: list[int] = []
    bnbfix.verify(out, progress=hashing.append)
    bnbfix.verify(out, source, progress=both.append)
    hashed = sum(p.stat().st_size for p in out.iterdir()) - (out / "bnbfix.json").stat().st_size
    assert sum(hashing) == hashed
    assert sum(both) == hashed + sum(t.info.nbytes for s in plan.shards for t in s.tensors)


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("kept", "differs from {tensor} of the source at byte {byte}"),
        ("dequantized", "is not what its quantized weight decodes to"),
        ("inserted", "differs from {donor} of the source at byte {byte}"),
    ],
)
def test_a_flipped_byte_in_a_tensor_is_found(spoilt: Spoil, kind: str, position: str, words: str) -> None:
    source, out, plan = spoilt
    tensor = of_kind(plan, kind)
    shard, start, size = where(out, tensor)
    byte = {"first": 0, "middle": size // 2, "last": size - 1}[position]
    flip(out / shard, start + byte)
    message = words.format(tensor=tensor, donor=tensor.replace("v_proj", "k_proj"), byte=f"{byte:,}")
    assert problems(out, None) == [(shard, None, HASH)]
    found = problems(out, source)
    assert [p[:2] for p in found] == [(shard, None), (shard, tensor)]
    assert found[0][2] == HASH and found[1][2].startswith(message)
    document = bnbfix.verify(out, source).to_dict()
    assert document["schema"] == 1 and document["ok"] is False
    assert [tuple(p.values()) for p in document["problems"]] == found
    forge(out, shard)
    assert problems(out, None) == []
    assert problems(out, source) == found[1:]


def test_a_flipped_byte_late_in_a_tensor_is_placed_by_its_chunk(spoilt: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, plan = spoilt
    set_chunk_bytes(16 << 10, monkeypatch)
    tensor = of_kind(plan, "dequantized")
    shard, start, size = where(out, tensor)
    byte = start + size - 100
    flip(out / shard, byte)
    file, name, message = problems(out, source)[1]
    assert (file, name) == (shard, tensor)
    found = re.fullmatch(r"is not what its quantized weight decodes to, before byte ([\d,]+) of the file", message)
    assert found is not None
    assert byte < int(found[1].replace(",", "")) <= start + size < byte + (16 << 10)


def test_tensors_that_changed_places_are_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
    (shard, a, size), (same, b, _) = where(out, first), where(out, second)
    assert shard == same
    data = bytearray((out / shard).read_bytes())
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    (out / shard).write_bytes(data)
    forge(out, shard)
    assert set(places(out, source)) == {(shard, first), (shard, second)}


def test_only_the_spoilt_tensors_are_named(spoilt: Spoil) -> None:
    source, out, plan = spoilt
    wanted = [of_kind(plan, kind) for kind in ("kept", "dequantized", "inserted")]
    for tensor in wanted:
        shard, start, _ = where(out, tensor)
        flip(out / shard, start)
        forge(out, shard)
    assert sorted(t or "" for _, t in places(out, source)) == sorted(wanted)


def test_a_changed_config_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace("30.0", "31.0", 1))
    assert problems(out, None) == [("config.json", None, HASH)]
    message = ("config.json", None, "differs from what the plan writes")
    assert problems(out, source) == [("config.json", None, HASH), message]
    forge(out, "config.json")
    assert problems(out, source) == [message]


def test_a_config_whose_skip_list_is_lost_no_longer_scans_clean(spoilt: Spoil) -> None:
    _, out, _ = spoilt
    doc = json.loads((out / "config.json").read_text())
    doc["quantization_config"]["llm_int8_skip_modules"] = []
    (out / "config.json").write_text(json.dumps(doc))
    forge(out, "config.json")
    found = problems(out, None)
    assert found and all(message.startswith("BNB102: ") for _, _, message in found)
    assert found[0][:2] == (str(out), "model.layers.1.self_attn.k_proj.weight")


def test_a_changed_index_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    name = "model.safetensors.index.json"
    doc = json.loads((out / name).read_text())
    doc["metadata"]["total_size"] += 1
    (out / name).write_text(json.dumps(doc))
    forge(out, name)
    assert problems(out, source) == [(name, None, "differs from what the plan writes")]


def test_a_changed_copied_file_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    flip(out / "tokenizer.json", 100)
    message = ("tokenizer.json", None, "differs from the source at byte 100")
    assert problems(out, None) == [("tokenizer.json", None, HASH)]
    assert problems(out, source) == [("tokenizer.json", None, HASH), message]
    forge(out, "tokenizer.json")
    assert problems(out, None) == []
    assert problems(out, source) == [message]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_copied_file_of_another_length_is_found(spoilt: Spoil, change: int) -> None:
    source, out, _ = spoilt
    data = (out / "chat_template.jinja").read_bytes()
    (out / "chat_template.jinja").write_bytes(data[:-1] if change < 0 else data + b"\n")
    forge(out, "chat_template.jinja")
    message = f"has {len(data) + change} bytes, the source {len(data)}"
    assert problems(out, None) == []
    assert problems(out, source) == [("chat_template.jinja", None, message)]


def test_a_missing_file_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    (out / "tokenizer.json").unlink()
    for other in (None, source):
        assert problems(out, other) == [("tokenizer.json", None, "is missing")]


def test_a_missing_file_that_the_record_does_not_know_is_found_by_the_plan(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    (out / "tokenizer.json").unlink()
    record(out, lambda doc: doc["sha256"].pop("tokenizer.json"))
    assert problems(out, None) == []
    assert problems(out, source) == [("tokenizer.json", None, "is missing")]


def test_a_missing_shard_is_found_once_and_keeps_the_folder_from_being_scanned(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    (out / SECOND).unlink()
    for other in (None, source):
        found = problems(out, other)
        assert [p[:2] for p in found] == [(SECOND, None), (str(out), None)]
        assert found[0][2] == "is missing"
        assert f"cannot be scanned: {out}: shard {SECOND} is missing" in found[1][2]


def test_an_extra_file_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    (out / "sub").mkdir()
    (out / "sub" / "extra.bin").write_bytes(b"x")
    for other in (None, source):
        assert problems(out, other) == [("sub/extra.bin", None, "is not in the record")]
    forge(out, "sub/extra.bin")
    assert problems(out, None) == []
    assert problems(out, source) == [("sub/extra.bin", None, "is not in the plan")]


def test_an_extra_shard_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    shutil.copy(out / FIRST, out / "model-00003-of-00003.safetensors")
    assert places(out, source) == [("model-00003-of-00003.safetensors", None)]


def test_a_changed_header_is_found(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    data = (out / FIRST).read_bytes()
    assert data.count(b'"format":"pt"') == 1
    (out / FIRST).write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"'))
    message = (FIRST, None, "its header differs from what the plan writes")
    assert problems(out, None) == [(FIRST, None, HASH)]
    assert problems(out, source) == [(FIRST, None, HASH), message]
    forge(out, FIRST)
    assert problems(out, source) == [message]


def test_a_changed_header_of_a_copied_shard_is_found(half_copied: Spoil, tmp_path: Path) -> None:
    source, clean, plan = half_copied
    assert [(s.name, s.copied) for s in plan.shards] == [(FIRST, True), (SECOND, False)]
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    data = (out / FIRST).read_bytes()
    at = data.index(b'"format":"pt"')
    (out / FIRST).write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"'))
    forge(out, FIRST)
    byte = at + len(b'"format":"')
    assert problems(out, source) == [(FIRST, None, f"its header differs from the source at byte {byte:,}")]


def test_a_flipped_byte_in_a_copied_shard_is_found(half_copied: Spoil, tmp_path: Path) -> None:
    source, clean, _ = half_copied
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    tensor = "model.layers.0.mlp.down_proj.weight.absmax"
    shard, start, size = where(out, tensor)
    flip(out / shard, start + size - 1)
    forge(out, shard)
    assert places(out, source) == [(FIRST, tensor)]


@pytest.mark.parametrize("change", [-1, 8])
def test_a_shard_of_another_length_is_found(spoilt: Spoil, change: int) -> None:
    source, out, _ = spoilt
    data = (out / FIRST).read_bytes()
    (out / FIRST).write_bytes(data[:change] if change < 0 else data + bytes(change))
    found = problems(out, source)
    assert [p[:2] for p in found] == [(FIRST, None)] * 3
    assert found[0][2] == HASH
    assert found[1][2] == f"has {len(data) + change:,} bytes, the plan {len(data):,}"
    assert found[2][2].startswith(f"cannot be scanned: {FIRST}: ")


def test_a_broken_header_is_reported_by_the_hash_and_by_the_scan(spoilt: Spoil) -> None:
    _, out, _ = spoilt
    flip(out / FIRST, 8)  # the header's opening brace
    found = problems(out, None)
    assert [p[:2] for p in found] == [(FIRST, None), (FIRST, None)]
    assert found[0][2] == HASH and found[1][2].startswith(f"cannot be scanned: {FIRST}: header is not")


# Everything in full precision


@pytest.fixture(scope="module")
def dequantized(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """An LLM.int8 checkpoint and the same in bf16; tests must not change them."""
    source = pristine("text", "int8", shards=2)
    out = tmp_path_factory.mktemp("dequantized") / "out"
    return source, out, bnbfix.repair(source, out, **FLAGS, bf16=True, max_shard_size=400_000).plan


def test_full_precision_passes(dequantized: Spoil) -> None:
    source, out, plan = dequantized
    result = bnbfix.verify(out, source)
    assert result.ok and len(plan.shards) > 2
    assert result.decoded == sum(e.action == "dequantize" for e in plan.edits) > 30
    assert result.kept + result.decoded == sum(len(s.tensors) for s in plan.shards)


@pytest.mark.parametrize("chunk", [4 << 10, 12 << 10])
def test_full_precision_passes_for_every_chunk_size(
    dequantized: Spoil, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    source, out, plan = dequantized
    set_chunk_bytes(chunk, monkeypatch)
    assert where(out, of_kind(plan, "dequantized"))[2] > 2 * chunk
    assert problems(out, source) == []


@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_byte_in_what_was_llm_int8_is_found(dequantized: Spoil, tmp_path: Path, position: int) -> None:
    source, clean, plan = dequantized
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    tensor = of_kind(plan, "dequantized")
    shard, start, size = where(out, tensor)
    flip(out / shard, start + position % size)
    forge(out, shard)
    assert problems(out, None) == []
    ((file, name, message),) = problems(out, source)
    assert (file, name) == (shard, tensor)
    assert message.startswith("is not what its quantized weight decodes to")


def test_an_empty_llm_int8_weight_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "int8")
    with tensors_of(source) as found:
        name = "model.layers.0.mlp.up_proj.weight"
        found[name] = Raw("I8", (found[name].shape[0], 0), b"")
    with pytest.raises(bnbfix.QuantStateError, match="is empty"):
        bnbfix.repair(source, tmp_path / "out", **FLAGS, bf16=True)


# Experts, which are quantized


@pytest.fixture(scope="module")
def quantized(pristine: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """A mixture of experts and its repair; tests must not change them."""
    source = pristine("moe26b", "skip", shards=2)
    out = tmp_path_factory.mktemp("quantized") / "out"
    return source, out, bnbfix.repair(source, out, vllm="0.32.0", device="cpu").plan


EXPERT = "model.language_model.layers.3.experts.2.up_proj.weight"


def test_quantized_experts_pass(quantized: Spoil) -> None:
    source, out, _ = quantized
    result = bnbfix.verify(out, source)
    assert result.ok and result.decoded == 6 * 4 * 3


@pytest.mark.parametrize(
    ("suffix", "at", "message"),
    [
        ("", 700, "is not a 4-bit rounding of what it was made from"),
        (".absmax", 5, "is not a 4-bit rounding of what it was made from"),
        (".nested_absmax", 2, "is not a 4-bit rounding of what it was made from"),
        (".quant_map", 9, "its quant_map is not NF4's"),
        (".quant_state.bitsandbytes__nf4", 3, "its quant state is not the one that the plan writes"),
        (".quant_state.bitsandbytes__nf4", -1, "its quant state is not the one that the plan writes"),
    ],
)
def test_a_spoilt_expert_is_found(quantized: Spoil, tmp_path: Path, suffix: str, at: int, message: str) -> None:
    source, clean, _ = quantized
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    shard, start, size = where(out, EXPERT + suffix)
    data = bytearray((out / shard).read_bytes())
    data[start + at % size] ^= 0x80 if at >= 0 else 0x2A  # the last byte of the state is a space
    (out / shard).write_bytes(data)
    forge(out, shard)
    found = [p for p in problems(out, source) if p[0] == shard]
    assert [p[:2] for p in found] == [(shard, EXPERT)]
    assert found[0][2].startswith(message)


@pytest.mark.parametrize("state", [b"[]", b"{}", b'{"nested_offset": "x"}', b'{"nested_offset": NaN}', b"[[[["])
def test_an_expert_with_an_invalid_quant_state_is_found(quantized: Spoil, tmp_path: Path, state: bytes) -> None:
    source, clean, _ = quantized
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    shard, start, size = where(out, EXPERT + ".quant_state.bitsandbytes__nf4")
    data = bytearray((out / shard).read_bytes())
    data[start : start + size] = state.ljust(size)
    (out / shard).write_bytes(data)
    found = problems(out, source)
    assert (shard, EXPERT, "its quant state is not the one that the plan writes") in found


# Records and sources that do not fit


@pytest.mark.parametrize("with_source", [False, True])
def test_a_missing_record_is_an_input_error(spoilt: Spoil, with_source: bool) -> None:
    source, out, _ = spoilt
    (out / "bnbfix.json").unlink()
    with pytest.raises(InputError, match=r"bnbfix\.json: is missing; was this folder written by `bnbfix repair`\?"):
        bnbfix.verify(out, source if with_source else None)


BROKEN = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "null": b"null",
    "no schema": b'{"target": "portable", "sha256": {}, "options": {}}',
    "no hashes": b'{"schema": 1, "target": "portable"}',
    "hashes in a list": b'{"schema": 1, "target": "portable", "sha256": []}',
    "a hash that is a number": b'{"schema": 1, "target": "portable", "sha256": {"a": 1}}',
    "no target": b'{"schema": 1, "sha256": {}}',
    "a target that is a number": b'{"schema": 1, "target": 1, "sha256": {}}',
    "deep": b"[" * 100_000,
}
OPTIONS = [
    None,
    [],
    "bf16",
    {"nonsense": 1},
    {"bf16": 1},
    {"bf16": None},
    {"partial": "drop"},
    {"partial": []},
    *({"bf16": True, "max_shard_size": size} for size in (0, -1, 1.5, True, "5GB", None, [1])),
]


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_is_an_input_error(spoilt: Spoil, content: bytes) -> None:
    source, out, _ = spoilt
    (out / "bnbfix.json").write_bytes(content)
    with pytest.raises(InputError, match=r"bnbfix\.json: is not a record of a repair"):
        bnbfix.verify(out, source)


def test_a_record_without_end_is_not_read(spoilt: Spoil) -> None:
    _, out, _ = spoilt
    os.truncate(out / "bnbfix.json", 1 << 40)
    with pytest.raises(InputError, match=r"bnbfix\.json: 1,099,511,627,776 bytes are too many for such a file"):
        bnbfix.verify(out)


@pytest.mark.parametrize("schema", [0, 2, 99])
def test_a_record_of_an_unknown_schema_is_refused(spoilt: Spoil, schema: int) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: doc.update(schema=schema))
    for other in (None, source):
        with pytest.raises(InputError, match=rf"^bnbfix\.json: has schema {schema}, which this bnbfix does not know$"):
            bnbfix.verify(out, other)


@pytest.mark.parametrize("schema", ["1", None, True, 1.0, [1]])
def test_a_record_whose_schema_is_not_a_number_is_an_input_error(spoilt: Spoil, schema: Any) -> None:
    _, out, _ = spoilt
    record(out, lambda doc: doc.update(schema=schema))
    with pytest.raises(InputError, match=r"bnbfix\.json: is not a record of a repair \(schema is not a number"):
        bnbfix.verify(out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_record_with_options_that_no_repair_has_is_an_input_error(spoilt: Spoil, options: Any) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: doc.update(options=options))
    for other in (None, source):
        with pytest.raises(InputError, match=r"bnbfix\.json: is not a record of a repair"):
            bnbfix.verify(out, other)


@pytest.mark.parametrize("linked", ["model.safetensors", {"a": 1}, [1], None])
def test_a_record_whose_links_are_not_names_is_an_input_error(spoilt: Spoil, linked: Any) -> None:
    _, out, _ = spoilt
    record(out, lambda doc: doc.update(linked=linked))
    with pytest.raises(InputError, match=r"bnbfix\.json: is not a record of a repair \(linked is not a list of files"):
        bnbfix.verify(out)


def test_a_record_without_options_is_an_input_error(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: doc.pop("options"))
    with pytest.raises(InputError, match=r"bnbfix\.json: is not a record of a repair \('options'\)"):
        bnbfix.verify(out, source)


@pytest.mark.parametrize(
    "change",
    [
        lambda doc: doc.update(edits=[]),
        lambda doc: doc["edits"].pop(),
        lambda doc: doc["edits"][0].update(detail="nothing"),
        lambda doc: doc["options"].update(partial_groups="quantize"),
        lambda doc: doc.update(releases=[]),
        lambda doc: doc.update(bnbfix="9.9.9"),
        lambda doc: doc.update(linked=[FIRST]),
        lambda doc: (doc["sha256"].pop(FIRST), doc.update(linked=[FIRST])),
        lambda doc: doc.update(more="than was written"),
        lambda doc: doc.pop(CHECKSUM),
        lambda doc: doc.update({CHECKSUM: "0" * 64}),
        lambda doc: doc.update({CHECKSUM: None}),
    ],
    ids=lambda change: None,
)
def test_an_edit_of_only_the_record_is_noticed(spoilt: Spoil, change: Callable[[dict[str, Any]], object]) -> None:
    _, out, _ = spoilt
    record(out, change, checksum=False)
    assert ("bnbfix.json", None, "was edited") in problems(out, None)


def test_a_record_too_deep_to_be_written_is_not_what_a_repair_wrote() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    doc = {"schema": 1}
    assert not was_edited(doc | {CHECKSUM: record_checksum(doc)})
    assert was_edited({"deep": deep, CHECKSUM: record_checksum(doc)})


def test_a_record_laid_out_otherwise_is_the_same(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: None, checksum=False)
    assert problems(out, source) == []


def test_edits_that_the_plan_does_not_have_are_noticed_with_the_source(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: doc.update(edits=[]))
    assert problems(out, source) == [("bnbfix.json", None, "its edits are not those of the plan")]


@pytest.mark.parametrize("edits", [None, {}, "", [None], [[]], ["x"]])
def test_a_record_whose_edits_are_none_is_an_input_error(spoilt: Spoil, edits: Any) -> None:
    _, out, _ = spoilt
    record(out, lambda doc: doc.update(edits=edits))
    with pytest.raises(InputError, match=r"bnbfix\.json: is not a record of a repair \(edits is not a list of edits"):
        bnbfix.verify(out)


def test_a_record_that_claims_full_precision_does_not_pass(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: doc["options"].update(bf16=True))
    found = problems(out, None)
    assert found and {message for _, _, message in found} == {"is quantized"}
    assert (SECOND, K, "is quantized") in found
    assert set(found) < set(problems(out, source))


def test_a_record_for_an_unknown_release_is_refused(spoilt: Spoil) -> None:
    _, out, _ = spoilt
    record(out, lambda doc: doc.update(target="0.1.0"))
    with pytest.raises(UsageError, match=r"0\.1\.0"):
        bnbfix.verify(out)


def test_a_record_with_another_target_does_not_pass(spoilt: Spoil) -> None:
    source, out, _ = spoilt
    record(out, lambda doc: doc.update(target="0.32.0"))
    assert places(out, source) != []


def test_a_record_that_names_files_elsewhere_reads_nothing_there(spoilt: Spoil) -> None:
    _, out, _ = spoilt
    record(out, lambda doc: doc["sha256"].update({"../secret": "0" * 64, "/etc/passwd": "0" * 64}))
    (out.parent / "secret").write_text("x")
    found = {(file, message) for file, _, message in problems(out, None)}
    assert found == {("../secret", "is missing"), ("/etc/passwd", "is missing")}


def test_the_wrong_source_does_not_pass(half_copied: Spoil, pristine: Make) -> None:
    _, out, plan = half_copied
    found = places(out, pristine("text", "single", shards=2, seed=1))
    differing = {t for _, t in found}
    assert {file for file, _ in found} == {FIRST, SECOND}  # config, index and the other files are the same
    assert None not in differing  # and so are the headers
    assert of_kind(plan, "inserted") in differing and "model.embed_tokens.weight" in differing


def test_the_output_as_its_own_source_does_not_pass(repaired: Spoil) -> None:
    _, out, _ = repaired
    words = "the source needs no repair for this target; was it made from it?"
    assert problems(out, out) == [("bnbfix.json", None, words)]


def test_missing_folders_and_folders_without_a_checkpoint_raise(
    repaired: Spoil, pristine: Make, tmp_path: Path
) -> None:
    source, out, _ = repaired
    with pytest.raises(UsageError, match="no such folder"):
        bnbfix.verify(tmp_path / "nowhere", source)
    with pytest.raises(UsageError, match="no such folder"):
        bnbfix.verify(out, tmp_path / "nowhere")
    with pytest.raises(NotApplicable, match="unquantized"):
        bnbfix.verify(out, pristine("text", "bf16"))


def test_a_broken_source_raises(repaired: Spoil, checkpoint: Make) -> None:
    _, out, _ = repaired
    source = checkpoint("text", "partial", shards=2)
    (source / FIRST).write_bytes((source / FIRST).read_bytes()[:-5])
    with pytest.raises(HeaderError, match="truncated"):
        bnbfix.verify(out, source)


def test_verifying_writes_nothing(repaired: Spoil) -> None:
    source, out, _ = repaired
    before = {p: p.stat().st_mtime_ns for folder in (source, out) for p in [folder, *folder.iterdir()]}
    bnbfix.verify(out, source)
    assert before == {p: p.stat().st_mtime_ns for folder in (source, out) for p in [folder, *folder.iterdir()]}


# The command line


def test_a_difference_ends_with_exit_code_1(run: Cli, spoilt: Spoil) -> None:
    source, out, plan = spoilt
    tensor = of_kind(plan, "dequantized")
    shard, start, _ = where(out, tensor)
    clean = run("verify", out, "--source", source)
    assert (clean.code, clean.err) == (0, "")
    assert "independent decode; scan for vLLM 0.22.1: clean." in clean.words
    flip(out / shard, start)
    forge(out, shard)
    found = run("verify", out, "--source", source)
    assert (found.code, found.err) == (1, "")
    assert f"{shard}: {tensor}: is not what its quantized weight decodes to" in found.words
    assert "1 difference; do not use this output." in found.words
    found = run("verify", out, "--source", source, "--format", "json")
    assert found.code == 1 and found.json["ok"] is False
    (problem,) = found.json["problems"]
    assert (problem["file"], problem["tensor"]) == (shard, tensor)
    assert problem["message"].startswith("is not what its quantized weight decodes to")


def test_a_missing_record_ends_with_exit_code_2(run: Cli, spoilt: Spoil) -> None:
    _, out, _ = spoilt
    (out / "bnbfix.json").unlink()
    found = run("verify", out)
    assert (found.code, found.out) == (2, "")
    assert "was this folder written by `bnbfix repair`?" in found.err
