"""Repairs from end to end, on tiny real checkpoints: what the output holds, and what a failure leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bnbfix
from bnbfix.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.engines.targets import resolve_target
from bnbfix.errors import InputError, OutputError, UsageError, VerifyError
from bnbfix.kernels import native
from bnbfix.kernels import reference as decode
from bnbfix.kernels.device import resolve_device
from bnbfix.planner.plan_repair import plan_checkpoint
from bnbfix.writer import staging as destination
from bnbfix.writer import syscalls, write
from bnbfix.writer.record import record_checksum, repaired_tensors
from bnbfix.writer.write import WriteOptions, write_plan
from tests.fuzz.memory import MemorySource
from tests.support.build import Make, set_chunk_bytes

torch.set_num_threads(1)  # more would only wait for each other over tensors of this size

CASES = [  # family, quant, shards, target: every kind of edit is among them
    ("dense31b", "partial", 2, "portable"),
    ("dense31b", "skip", 3, "0.22.1"),
    ("dense31b", "skip", 1, "0.32.0"),
    ("dense31b", "storage-bf16", 2, "portable"),
    ("e4b-noshared", "all", 2, "0.22.1"),
    ("text", "fp4", 2, "portable"),
    ("text", "single", 1, "portable"),
    ("unified12b", "all", 3, "0.32.0"),
]
IDS = ["-".join(map(str, case)) for case in CASES]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def repaired(
    request: pytest.FixtureRequest, pristine: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bnbfix.RepairResult]:
    """A pristine source and the result of its repair; tests must not change either."""
    family, quant, shards, target = request.param
    source = pristine(family, quant, shards=shards)
    out = tmp_path_factory.mktemp("repaired") / "out"
    return source, bnbfix.repair(source, out, vllm=target, device="cpu")


def fix(source: Path, out: Path, **options: Any) -> bnbfix.RepairResult:
    return bnbfix.repair(source, out, **{"vllm": "portable", "device": "cpu"} | options)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its path, and every folder as None would not do: with a slash and no bytes."""
    return {
        str(p.relative_to(folder)) + ("/" if p.is_dir() else ""): b"" if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
    }


def stats(folder: Path) -> dict[str, tuple[int, int, int, int]]:
    seen = ((p, p.stat()) for p in [folder, *folder.rglob("*")])
    return {str(p): (s.st_mtime_ns, s.st_size, s.st_mode, s.st_ino) for p, s in seen}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    out: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found = load_file(shard)
        assert not set(found) & set(out), "a tensor is in two shards"
        out |= found
    return out


def raw(t: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def edits(result: bnbfix.RepairResult, action: str) -> dict[str, bnbfix.Edit]:
    return {e.name: e for e in result.plan.edits if e.action == action}


@cache
def opened(source: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A pristine source, read once."""
    return open_checkpoint(LocalSource.open(source)), tensors(source)


def decoded(source: Path, name: str) -> bytes:
    """A quantized weight's values by the independent decode, straight from the files of a pristine source."""
    checkpoint, found = opened(source)
    weight = checkpoint.weights[name]
    assert weight.state is not None
    parts = {s: raw(found[n])[2] for s, n in weight.state_tensor_names().items()}
    quantized = raw(found[name])[2]
    scales = decode.absmax_values(
        weight.state, parts[".absmax"], parts.get(".nested_absmax"), parts.get(".nested_quant_map")
    )
    return decode.decode_chunk(weight.state, quantized, scales)


Repaired = tuple[Path, bnbfix.RepairResult]


def test_every_tensor_is_kept_or_dequantized_or_copied_from_its_donor(repaired: Repaired) -> None:
    source, result = repaired
    assert result.out is not None and result.written
    before, after = tensors(source), tensors(result.out)
    dequantized, inserted = edits(result, "dequantize"), edits(result, "insert")
    retyped, dropped = edits(result, "retype"), edits(result, "drop")
    state_tensors = {n for n in before for name in dequantized if n.startswith(name + ".")}
    new = set(after) - set(before)
    assert set(before) - set(after) == state_tensors | set(dropped)
    for name in set(before) & set(after):
        if name in dequantized:
            assert after[name].is_floating_point() and before[name].shape[-1] == 1 < after[name].shape[-1]
            assert raw(after[name])[2] == decoded(source, name), name
        elif name in retyped:
            assert raw(after[name])[2] == raw(before[name])[2]
            assert (after[name].dtype, after[name].shape[1:]) == (torch.uint8, (1,))
        else:
            assert raw(after[name]) == raw(before[name]), name
    expected_new = set()
    for name, edit in inserted.items():
        how, donor = edit.detail.split(" of ")
        if how == "values":
            assert raw(after[name])[2] == decoded(source, donor), name
            expected_new.add(name)
            continue
        for old in (n for n in before if n == donor or n.startswith(donor + ".")):
            assert raw(after[name + old.removeprefix(donor)]) == raw(before[old]), name
            expected_new.add(name + old.removeprefix(donor))
    assert new == expected_new


def test_the_cases_above_hold_every_kind_of_edit(pristine: Make) -> None:
    plans = [bnbfix.plan_repair(pristine(f, q, shards=n), t) for f, q, n, t in CASES]
    assert {e.action for p in plans for e in p.edits} == {"dequantize", "insert", "retype", "config"}
    assert {s.copied for p in plans for s in p.shards} == {True, False}


def test_a_source_without_files_on_this_machine_is_copied_from_what_it_reads(pristine: Make, tmp_path: Path) -> None:
    source = pristine("text", "single", shards=2)
    memory = MemorySource({p.name: p.read_bytes() for p in source.iterdir()})
    plan = plan_checkpoint(memory, resolve_target("0.22.1"))
    assert {s.copied for s in plan.shards} == {True, False}
    assert write_plan(plan, tmp_path / "out", WriteOptions("cpu", hardlink=True)).written
    assert fix(source, tmp_path / "right", vllm="0.22.1").written
    names = {p.name for p in (tmp_path / "right").iterdir()}
    assert names == {p.name for p in (tmp_path / "out").iterdir()}
    for name in names - {"bnbfix.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "right" / name).read_bytes(), name
    assert "linked" not in json.loads((tmp_path / "out" / "bnbfix.json").read_text())


def test_an_explicit_v_proj_is_dropped_where_the_target_refuses_it(pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip", shards=2)
    fix(source, tmp_path / "old", vllm="0.22.1")
    result = fix(tmp_path / "old", tmp_path / "new", vllm="0.32.0")
    assert {e.code.value for e in edits(result, "drop").values()} == {"BNB105"}
    before, after = tensors(source), tensors(tmp_path / "new")
    assert {n: raw(t) for n, t in after.items()} == {n: raw(t) for n, t in before.items()}


def test_dequantized_values_are_those_of_bitsandbytes(pristine: Make, tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    source = pristine("dense31b", "partial", shards=2)
    result = fix(source, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    for name in edits(result, "dequantize"):
        state_tensors = {n.removeprefix(name + "."): t for n, t in before.items() if n.startswith(name + ".")}
        state = bnb.QuantState.from_dict(state_tensors, device=torch.device("cpu"))
        assert state.shape[-1] % state.blocksize == 0  # else bitsandbytes' CPU kernel is wrong
        assert torch.equal(after[name], bnb.dequantize_4bit(before[name], state)), name


def test_the_safetensors_library_opens_every_shard_and_metadata_survives(repaired: Repaired) -> None:
    source, result = repaired
    assert result.out is not None
    shards = sorted(p.name for p in result.out.glob("*.safetensors"))
    assert shards == sorted(p.name for p in source.glob("*.safetensors"))
    for shard in shards:
        with safe_open(source / shard, "pt") as old, safe_open(result.out / shard, "pt") as new:
            assert new.metadata() == old.metadata() == {"format": "pt"}
            assert len(new.keys()) > 0
            for name in new.keys():  # noqa: SIM118 - safe_open is not a mapping
                new.get_tensor(name)


def test_tensors_start_at_multiples_of_their_element_size(repaired: Repaired) -> None:
    _, result = repaired
    assert result.out is not None
    for shard in result.out.glob("*.safetensors"):
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        bits = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
        assert all((8 + length + t["data_offsets"][0]) % bits[t["dtype"]] == 0 for t in header.values())


def test_untouched_shards_and_other_files_are_the_same_bytes(repaired: Repaired) -> None:
    source, result = repaired
    assert result.out is not None
    same = {s.name for s in result.plan.shards if s.copied} | set(result.plan.copied)
    changed = {s.name for s in result.plan.shards if not s.copied} | set(result.plan.texts)
    assert same | changed == set(tree(source))
    assert same >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in same:
        assert (result.out / name).read_bytes() == (source / name).read_bytes(), name
    for name in changed:
        assert (result.out / name).read_bytes() != (source / name).read_bytes(), name
    assert set(tree(result.out)) == same | changed | {"bnbfix.json"}


def test_nested_folders_links_and_empty_files_are_copied(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    (source / "assets" / "deep").mkdir(parents=True)
    (source / "assets" / "deep" / "blob.dat").write_bytes(bytes(range(256)) * 40)
    (source / "empty.txt").touch()
    (source / "assets" / "chat.jinja").write_text("from another folder")
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").symlink_to("assets/chat.jinja")
    (source / ".cache").mkdir()
    (source / ".cache" / "download.lock").touch()
    fix(source, tmp_path / "out")
    out = tree(tmp_path / "out")
    assert out["assets/deep/blob.dat"] == bytes(range(256)) * 40
    assert out["empty.txt"] == b""
    assert out["chat_template.jinja"] == b"from another folder"
    assert not (tmp_path / "out" / "chat_template.jinja").is_symlink()
    assert not any(name.startswith(".cache") for name in out)


def test_a_file_name_that_is_not_utf8_is_copied_and_recorded(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "single", shards=2)
    name = os.fsdecode(b"caf\xe9 \xff.txt")
    try:
        (source / name).write_text("kept")
    except OSError:
        pytest.skip("this file system takes no such name")
    result = fix(source, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "kept"
    doc = json.loads((tmp_path / "out" / "bnbfix.json").read_text("utf-8"))
    assert doc["sha256"][name] == result.files[name] == hashlib.sha256(b"kept").hexdigest()
    assert bnbfix.verify(tmp_path / "out", source).ok


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) in order; lists are leaves, as an edit sets them whole."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


@pytest.mark.parametrize("per_layer_config", [False, True])
def test_config_differs_only_by_the_planned_keys_and_keeps_its_order(
    pristine: Make, tmp_path: Path, per_layer_config: bool
) -> None:
    source = pristine("dense31b", "storage-bf16", shards=2, per_layer_config=per_layer_config)
    result = fix(source, tmp_path / "out")
    planned = edits(result, "config")
    old, new = (list(leaves(json.loads((f / "config.json").read_text()))) for f in (source, tmp_path / "out"))

    def untouched(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return [(p, v) for p, v in pairs if not any(p == name or p.startswith(name + ".") for name in planned)]

    assert len(planned) == (6 if per_layer_config else 2)
    assert untouched(old) == untouched(new)
    for name, edit in planned.items():
        value = dict(new).get(name)
        assert json.dumps(value, ensure_ascii=False) == edit.detail if edit.detail != "removed" else value is None
        assert dict(old).get(name) != value or edit.detail == "removed"


def test_config_keeps_its_formatting(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    doc = json.loads((source / "config.json").read_text())
    doc["text_config"] = {"zz_first": 1e-06, "note": "ü"} | doc["text_config"]
    text = json.dumps(doc, indent=5, ensure_ascii=False).replace("1e-06", "1.0E-6") + "\n\n"
    (source / "config.json").write_text(text, encoding="utf-8")
    fix(source, tmp_path / "out")
    new = (tmp_path / "out" / "config.json").read_text("utf-8")
    marker = '"llm_int8_skip_modules": '
    before, rest = text.split(marker)
    after = rest[rest.index("]") + 1 :]
    assert new != text
    assert new.startswith(before + marker) and new.endswith(after)
    assert "1.0E-6" in before + after and "ü" in before + after


def test_the_index_names_every_tensor_and_the_size_of_all(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "partial", shards=3)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_parameters"] = 12345
    index["extra"] = ["kept"]
    path.write_text(json.dumps(index))
    fix(source, tmp_path / "out")
    new = json.loads((tmp_path / "out" / path.name).read_text())
    shards = {p.name: load_file(p) for p in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert len(shards) == 3
    assert new["weight_map"] == {name: shard for shard, found in shards.items() for name in found}
    assert new["metadata"] == {
        "total_parameters": 12345,
        "total_size": sum(t.nbytes for found in shards.values() for t in found.values()),
    }
    assert new["extra"] == ["kept"]


def test_the_source_is_not_touched(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "partial", shards=2)
    content, before = tree(source), stats(source)
    fix(source, tmp_path / "out")
    assert tree(source) == content
    assert stats(source) == before


def test_a_source_without_write_permission_is_enough(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    for p in source.iterdir():
        p.chmod(0o444)
    source.chmod(0o555)
    try:
        fix(source, tmp_path / "out")
    finally:
        source.chmod(0o755)
    assert (tmp_path / "out" / "config.json").stat().st_mode & stat.S_IWUSR


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(pristine: Make, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        fix(pristine("dense31b", "skip"), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*")}
    assert modes == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_the_record_has_the_target_every_edit_and_true_hashes(repaired: Repaired) -> None:
    _, result = repaired
    assert result.out is not None
    files = {n: hashlib.sha256(data).hexdigest() for n, data in tree(result.out).items() if n != "bnbfix.json"}
    doc = json.loads((result.out / "bnbfix.json").read_text())
    assert doc.pop("record_sha256") == record_checksum(doc)
    assert doc == {
        "schema": 1,
        "bnbfix": bnbfix.__version__,
        "target": result.plan.target.name,
        "options": {"bf16": False, "max_shard_size": 5_000_000_000, "partial_groups": "dequantize"},
        "releases": [r.name for r in result.plan.target.ranges],
        "edits": [
            {"action": e.action, "name": e.name, "code": e.code.value, "detail": e.detail} for e in result.plan.edits
        ],
        "sha256": files,
    }
    assert list(doc["sha256"]) == sorted(files)
    assert result.files == files


def test_the_result_says_where_and_what(repaired: Repaired) -> None:
    source, result = repaired
    assert result.written and result.out is not None and result.out.is_absolute()
    assert result.plan.checkpoint.source.name == str(source)
    assert bnbfix.scan(result.out, result.plan.target.name).ok
    assert not bnbfix.scan(source, result.plan.target.name).ok
    assert repr(result) == f"RepairResult(out={str(result.out)!r}, files={len(result.files)}, linked=0, kept=0)"
    document = result.to_dict()
    assert document | result.plan.to_dict() == document
    assert {k: document[k] for k in ("out", "sha256", "linked", "resumed")} == {
        "out": str(result.out),
        "sha256": result.files,
        "linked": [],
        "resumed": [],
    }
    assert json.loads(json.dumps(document)) == document


def test_the_record_says_which_tensors_were_repaired(repaired: Repaired) -> None:
    source, result = repaired
    assert result.out is not None
    changed = {e.name for e in result.plan.edits if e.action not in ("drop", "config")}
    assert repaired_tensors(LocalSource.open(result.out)) == changed
    assert repaired_tensors(LocalSource.open(source)) == frozenset()


def test_progress_adds_up_to_the_bytes_of_the_output(pristine: Make, tmp_path: Path) -> None:
    steps: list[int] = []
    result = fix(pristine("dense31b", "partial", shards=2), tmp_path / "out", progress=steps.append)
    written = sum(len(data) for data in tree(tmp_path / "out").values())
    assert sum(steps) == written
    assert written == result.plan.bytes_written + (tmp_path / "out" / "bnbfix.json").stat().st_size
    assert min(steps) > 0 and len(steps) > 10


@pytest.mark.parametrize("chunk", [16 << 10, 48 << 10])
def test_the_output_is_the_same_each_time_and_for_every_chunk_size(
    pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    source = pristine("dense31b", "partial", shards=2)
    plan = fix(source, tmp_path / "one").plan
    set_chunk_bytes(chunk, monkeypatch)
    steps: list[int] = []
    fix(source, tmp_path / "two", progress=steps.append)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    texts = {len(s.header) for s in plan.shards} | {len(t.encode()) for t in plan.texts.values()}
    texts.add((tmp_path / "two" / "bnbfix.json").stat().st_size)
    assert max(n for n in steps if n not in texts) <= chunk


def test_the_name_of_the_folders_does_not_reach_the_output(pristine: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pristine("dense31b", "partial", shards=2), tmp_path / "elsewhere"))
    fix(pristine("dense31b", "partial", shards=2), tmp_path / "one")
    fix(source, tmp_path / "deeper" / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "deeper" / "two")


def test_short_reads_and_writes_of_the_system_change_nothing(
    pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pristine("dense31b", "partial", shards=2)
    fix(source, tmp_path / "one")
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    pread, pwrite, short = os.pread, os.pwrite, 0

    def short_read(fd: int, n: int, offset: int) -> bytes:
        return pread(fd, -(-n // 2), offset)

    def short_write(fd: int, data: memoryview, offset: int) -> int:
        nonlocal short
        short += len(data) > 1000
        return pwrite(fd, data[:1000], offset)

    with monkeypatch.context() as m:
        m.setattr(os, "pread", short_read)
        m.setattr(os, "pwrite", short_write)
        fix(source, tmp_path / "two")
    assert short > 100
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_second_repair_has_nothing_to_do_and_writes_nothing(repaired: Repaired, tmp_path: Path) -> None:
    _, result = repaired
    assert result.out is not None
    before, neighbours = stats(result.out), sorted(tmp_path.iterdir())
    again = bnbfix.repair(result.out, tmp_path / "again", vllm=result.plan.target.name, device="cpu")
    assert (again.written, again.out, again.files, again.plan.edits) == (False, None, {}, ())
    assert again.plan.nothing_to_do and again.plan.bytes_written == 0
    assert sorted(tmp_path.iterdir()) == neighbours
    assert stats(result.out) == before


def test_nothing_to_do_leaves_an_old_output_unchanged_even_with_overwrite(pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert not fix(pristine("e4b", "all"), tmp_path / "out", vllm="0.32.0", overwrite=True).written
    assert tree(tmp_path / "out") == {"mine.txt": b"mine"}


# Which device, and whether torch is asked at all


@pytest.mark.parametrize(
    ("family", "quant", "target", "asked"),
    [
        ("text", "single", "0.22.1", False),  # copies of copies, all of it
        ("dense31b", "partial", "portable", True),  # one weight of many is dequantized
        ("moe26b", "skip", "0.32.0", True),  # nothing is dequantized, but experts are quantized
    ],
)
def test_torch_is_asked_for_a_device_where_the_plan_needs_one(
    pristine: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, quant: str, target: str, asked: bool
) -> None:
    plan = bnbfix.plan_repair(pristine(family, quant, shards=2), target)
    with caplog.at_level("INFO", "bnbfix.writer"):
        write.write_plan(plan, tmp_path / "out")
    # Once by each of the workers that needs one.
    said = {f"kernels run on {resolve_device('auto')}"} if asked else set()
    assert {m for m in caplog.messages if "kernels" in m} == said


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("family", "quant", "target"),
    [
        ("dense31b", "all", "0.22.1"),
        ("dense31b", "fp4", "0.22.1"),
        ("dense31b", "partial", "0.22.1"),
        ("moe26b", "skip", "0.32.0"),  # experts are quantized
    ],
)
def test_a_repair_on_cuda_is_byte_for_byte_that_of_the_cpu(
    pristine: Make, tmp_path: Path, family: str, quant: str, target: str, bf16: bool
) -> None:
    source = pristine(family, quant, shards=2)
    for device in ("cpu", "cuda"):
        fix(source, tmp_path / device, vllm=target, device=device, bf16=bf16)
    assert tree(tmp_path / "cuda") == tree(tmp_path / "cpu")


def test_a_device_that_is_not_there_is_an_error_even_where_none_is_needed(pristine: Make, tmp_path: Path) -> None:
    with pytest.raises(bnbfix.UsageError, match="device cuda:70: torch sees"):
        fix(pristine("text", "single", shards=2), tmp_path / "out", vllm="0.22.1", device="cuda:70")
    assert tree(tmp_path) == {}


# Everything in full precision


@pytest.mark.parametrize(("family", "quant"), [("text", "fp4"), ("text", "single"), ("unified12b", "all")])
def test_bf16_dequantizes_every_quantized_weight_and_keeps_the_rest(
    pristine: Make, tmp_path: Path, family: str, quant: str
) -> None:
    source, limit = pristine(family, quant, shards=2), 300_000
    result = fix(source, tmp_path / "out", vllm="0.27.1", bf16=True, max_shard_size=limit)
    checkpoint, before = opened(source)
    after = tensors(tmp_path / "out")
    quantized = {name for name, w in checkpoint.weights.items() if w.quantized}
    assert quantized and set(after) == set(checkpoint.weights)
    for name, t in after.items():
        assert t.is_floating_point()
        assert raw(t)[2] == (decoded(source, name) if name in quantized else raw(before[name])[2]), name
        assert tuple(t.shape) == checkpoint.weights[name].shape
    assert set(edits(result, "dequantize")) == quantized and all(e.code is None for e in result.plan.edits)
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert old.pop("quantization_config") and old == new
    shards = {p.name: load_file(p) for p in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert len(shards) > 2
    assert all(len(found) == 1 or sum(t.nbytes for t in found.values()) <= limit for found in shards.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, found in shards.items() for name in found}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())


# Experts, the one thing that is quantized


@pytest.mark.parametrize(
    ("quant", "target", "prefix"), [("skip", "0.25.1", "moe.experts"), ("single", "0.32.0", "experts")]
)
def test_experts_are_split_and_quantized_as_bitsandbytes_does(
    pristine: Make, tmp_path: Path, quant: str, target: str, prefix: str
) -> None:
    import bitsandbytes.functional as bnb

    source = pristine("moe26b", quant, shards=2)
    result = fix(source, tmp_path / "out", vllm=target)
    before, after = tensors(source), tensors(tmp_path / "out")
    made = set()
    for name in edits(result, "quantize"):
        stem, projection = name.rsplit(".experts.", 1)
        for expert, matrix in enumerate(before[name]):
            halves = matrix.chunk(2) if projection == "gate_up_proj" else (matrix,)
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for part, values in zip(parts, halves, strict=True):
                target_name = f"{stem}.{prefix}.{expert}.{part}.weight"
                state_tensors = {n.removeprefix(target_name): t for n, t in after.items() if n.startswith(target_name)}
                made |= {target_name + suffix for suffix in state_tensors}
                quantized, state = bnb.quantize_4bit(
                    values.contiguous(), compress_statistics=quant == "skip", quant_type="nf4"
                )
                assert raw(state_tensors.pop("")) == raw(quantized), target_name
                said = json.loads(bytes(state_tensors.pop(".quant_state.bitsandbytes__nf4").tolist()))
                true = state.as_dict(packed=True)
                assert said == json.loads(bytes(true.pop("quant_state.bitsandbytes__nf4").tolist()))
                assert {k: raw(t) for k, t in state_tensors.items()} == {f".{k}": raw(t) for k, t in true.items()}
    assert len(edits(result, "quantize")) == 12
    assert set(after) == set(before) - set(edits(result, "quantize")) | made
    assert all(raw(after[name]) == raw(before[name]) for name in set(after) - made)
    assert bnbfix.scan(tmp_path / "out", target).ok


def test_experts_under_another_prefix_are_renamed_and_keep_their_bytes(pristine: Make, tmp_path: Path) -> None:
    fix(pristine("moe26b", "skip", shards=2), tmp_path / "old", vllm="0.25.1")
    result = fix(tmp_path / "old", tmp_path / "new", vllm="0.32.0")
    before, after = tensors(tmp_path / "old"), tensors(tmp_path / "new")
    assert {n.replace(".moe.experts.", ".experts."): raw(t) for n, t in before.items()} == {
        n: raw(t) for n, t in after.items()
    }
    assert len(edits(result, "rename")) == 6 * 4 * 3
    assert not edits(result, "quantize") and not any(".moe." in n for n in after)


@pytest.mark.parametrize("target", ["portable", "0.22.1"])
def test_experts_that_no_edit_can_repair_are_refused(pristine: Make, tmp_path: Path, target: str) -> None:
    with pytest.raises(bnbfix.Unrepairable, match="BNB401"):
        fix(pristine("moe26b", "skip", shards=2), tmp_path / "out", vllm=target)
    assert tree(tmp_path) == {}


# Destinations


def test_an_empty_folder_is_a_fine_destination(pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert fix(pristine("dense31b", "skip"), tmp_path / "out").written
    assert (tmp_path / "out" / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parents_of_the_destination_are_made(pristine: Make, tmp_path: Path) -> None:
    assert fix(pristine("dense31b", "skip"), tmp_path / "a" / "b" / "out").written
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_link_to_an_empty_folder_is_followed(pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    fix(pristine("dense31b", "skip"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "bnbfix.json").exists()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_relative_destination_is_in_the_working_folder(
    pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fix(pristine("dense31b", "skip"), Path("out"))
    assert result.out == tmp_path / "out" and (tmp_path / "out" / "bnbfix.json").exists()


def test_a_destination_that_is_not_empty_is_refused_and_unchanged(pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty") as caught:
        fix(pristine("dense31b", "skip"), tmp_path / "out")
    assert caught.value.hint is not None and "--overwrite" in caught.value.hint
    assert tree(tmp_path) == {"out/": b"", "out/mine.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_destination_is_refused(pristine: Make, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a folder"):
        fix(pristine("dense31b", "skip"), tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("place", [".", "inner", "inner/deeper", "..", "link"])
def test_source_and_destination_may_not_hold_each_other(checkpoint: Make, tmp_path: Path, place: str) -> None:
    source = checkpoint("dense31b", "skip")
    if place == "link":
        (tmp_path / "link").symlink_to(source)
    out = tmp_path / "link" / "out" if place == "link" else source / place
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="must be outside"):
        fix(source, out, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("leftover", [".out.bnbfix-partial", ".out.bnbfix-old"])
@pytest.mark.parametrize("inside", ["", "model"])
def test_a_source_in_a_place_that_a_repair_clears_away_is_refused(
    pristine: Make, tmp_path: Path, leftover: str, inside: str
) -> None:
    source = Path(shutil.copytree(pristine("text", "single", shards=2), tmp_path / leftover / inside))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=f"is in {leftover}, which a repair to .*out deletes"):
        fix(source, tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before
    assert fix(source, tmp_path / "another").written


def test_a_source_where_a_repair_through_a_link_clears_away_is_refused(pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    source = Path(shutil.copytree(pristine("text", "single", shards=2), tmp_path / "disk" / ".real.bnbfix-partial"))
    before = tree(source)
    with pytest.raises(UsageError, match=r"is in \.real\.bnbfix-partial"):
        fix(source, tmp_path / "link")
    assert tree(source) == before


def test_overwrite_replaces_all_that_was_there(pristine: Make, tmp_path: Path) -> None:
    source = pristine("dense31b", "skip", shards=2)
    fix(source, tmp_path / "clean")
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "old.txt").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert fix(source, tmp_path / "out", overwrite=True).written
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


def test_what_an_interrupted_run_left_is_cleared_away(pristine: Make, tmp_path: Path) -> None:
    staging = tmp_path / ".out.bnbfix-partial"
    (staging / "sub").mkdir(parents=True)
    (staging / "model.safetensors").write_text("half")
    fix(pristine("dense31b", "skip"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "sub/" not in tree(tmp_path / "out")


# Failures


class Fault:
    """Calls through `times` times, then fails with `error`, once."""

    def __init__(self, function: Callable[..., Any], times: int, error: BaseException | None) -> None:
        self.function, self.left, self.error, self.calls = function, times, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.left + 1 and self.error is not None:
            raise self.error
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any) -> Any:  # so that it works as a method of Path too
        return self if instance is None else lambda *args: self(instance, *args)


TARGETS = {"write": (os, "pwrite"), "fsync": (os, "fsync"), "rename": (os, "rename"), "read": (os, "pread")}
STAGING = ".out.bnbfix-partial"


@pytest.fixture
def simple_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are read and written, and folders renamed, one call after another: the calls that tests make fail."""
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(syscalls, "exchange", lambda one, other: False)


def count_calls(kind: str, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    owner, name = TARGETS[kind]
    counter = Fault(getattr(owner, name), 0, None)
    with monkeypatch.context() as m:
        m.setattr(owner, name, counter)
        run()
    assert counter.calls > 0
    return counter.calls


def fail_at(
    kind: str, call: int, error: BaseException, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> BaseException:
    """What `run` raises when one call fails."""
    owner, name = TARGETS[kind]
    fault = Fault(getattr(owner, name), call, error)
    with monkeypatch.context() as m:
        m.setattr(owner, name, fault)
        with pytest.raises(BaseException) as caught:
            run()
    assert fault.calls > call
    return caught.value


def some_of(n: int) -> list[int]:
    """The first, the last, and some in between."""
    return sorted({0, 1, n // 3, n // 2, 2 * n // 3, n - 2, n - 1} & set(range(n)))


@pytest.fixture
def small(pristine: Make) -> Path:
    return pristine("text", "single", shards=2)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("write", errno.EIO, OutputError),
        ("write", errno.ENOSPC, OutputError),
        ("fsync", errno.EIO, OutputError),
        ("rename", errno.EXDEV, OutputError),
        ("read", errno.EIO, InputError),
    ],
    ids=["write-EIO", "write-ENOSPC", "fsync-EIO", "rename-EXDEV", "read-EIO"],
)
def test_a_failure_of_the_system_leaves_everything_as_it_was(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    simple_calls: None,
    kind: str,
    code: int,
    expected: type[bnbfix.BnbfixError],
    overwrite: bool,
) -> None:
    def old_output() -> None:
        (tmp_path / "out" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "sub" / "old.txt").write_text("old")

    def run() -> None:
        fix(small, tmp_path / "out", overwrite=overwrite)

    if overwrite:
        old_output()
    calls = count_calls(kind, run, monkeypatch)
    shutil.rmtree(tmp_path / "out")
    if overwrite:
        old_output()
    before = tree(tmp_path)
    for call in some_of(calls):
        error = fail_at(kind, call, OSError(code, os.strerror(code)), run, monkeypatch)
        # A hash reads back what was written: that is the output's failure.
        assert type(error) is expected or (kind == "read" and type(error) is OutputError), (call, error)
        assert os.strerror(code) in str(error) and error.exit_code == 2
        assert tree(tmp_path) == before, f"after call {call} of {calls}"
    run()
    assert (tmp_path / "out" / "bnbfix.json").exists()


@pytest.mark.parametrize("kind", ["write", "fsync", "rename"])
def test_an_interrupt_leaves_everything_as_it_was(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simple_calls: None, kind: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")

    def run() -> None:
        fix(small, tmp_path / "out", overwrite=True)

    calls = count_calls(kind, run, monkeypatch)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    for call in some_of(calls):
        error = fail_at(kind, call, KeyboardInterrupt(), run, monkeypatch)
        assert type(error) is KeyboardInterrupt
        left = {name: data for name, data in tree(tmp_path).items() if not name.startswith(STAGING)}
        assert left == {"out/": b"", "out/old.txt": b"old"}, f"after call {call} of {calls}"
        shutil.rmtree(tmp_path / STAGING, ignore_errors=True)
    fail_at(kind, calls - 1, KeyboardInterrupt(), run, monkeypatch)
    run()
    fix(small, tmp_path / "clean")
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "two renames"])
def test_an_interrupt_while_the_old_output_is_removed_comes_too_late(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(syscalls, "exchange", syscalls.exchange if at_once else lambda one, other: False)
    fix(small, tmp_path / "clean")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    rmtree, hit = shutil.rmtree, []

    def interrupted(path: Path) -> None:
        if path.name in (STAGING, ".out.bnbfix-old"):
            hit.append(path)
            raise KeyboardInterrupt
        rmtree(path)

    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", interrupted)
        assert fix(small, tmp_path / "out", overwrite=True).written
    assert len(hit) == 1 and tree(tmp_path / "out") == tree(tmp_path / "clean")
    assert fix(small, tmp_path / "out", overwrite=True).written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"], "the next run clears what was left"


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_progress_that_fails_leaves_nothing(small: Path, tmp_path: Path, error: type[Exception]) -> None:
    left = 20

    def failing(n: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error("no more")

    with pytest.raises(error, match=r"^no more$"):
        fix(small, tmp_path / "out", progress=failing)
    assert tree(tmp_path) == {}


def test_a_source_that_shrinks_while_it_is_read_is_an_input_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bnbfix.plan_repair(small, "portable")
    pread = os.pread

    def gone(fd: int, n: int, offset: int) -> bytes:
        return b"" if offset > 5000 else pread(fd, n, offset)

    with monkeypatch.context() as m:
        m.setattr(os, "pread", gone)
        with pytest.raises(InputError, match=r"ended at byte [\d,]+ while it was being read"):
            write.write_plan(plan, tmp_path / "out")
    assert tree(tmp_path) == {}


def test_a_shard_that_vanishes_after_planning_is_an_input_error(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("text", "single", shards=2)
    plan = bnbfix.plan_repair(source, "portable")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: cannot be opened"):
        write.write_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_noticed_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bnbfix.plan_repair(small, "portable")
    usage = shutil.disk_usage(tmp_path)
    needed = plan.bytes_written + destination.SLACK_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=f"not enough disk: {needed:,} bytes are needed, {needed - 1:,} are free"):
        write.write_plan(plan, tmp_path / "a" / "out")
    assert tree(tmp_path) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert write.write_plan(plan, tmp_path / "a" / "out").written


def test_a_parent_that_cannot_be_made_is_an_output_error(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        fix(small, tmp_path / "file" / "out")
    assert tree(tmp_path) == {"file": b"in the way"}


def test_an_output_that_would_not_scan_clean_is_never_published(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty = bnbfix.scan(small, "portable")
    monkeypatch.setattr(write, "scan_checkpoint", lambda checkpoint, target: dirty)
    with pytest.raises(VerifyError, match=r"the output would not be clean: BNB\d{3}"):
        fix(small, tmp_path / "out")
    assert tree(tmp_path) == {}


def test_an_error_of_the_kernels_leaves_nothing_and_is_not_swallowed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(native, "load_library", lambda: None)
    monkeypatch.setattr(torch, "frombuffer", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        fix(small, tmp_path / "out")
    assert tree(tmp_path) == {}


def test_every_file_and_folder_is_synced_before_the_rename(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("text", "single", shards=2)
    (source / "sub").mkdir()
    (source / "sub" / "a.txt").write_text("a")
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_sync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def note_rename(old: Path, new: Path) -> None:
        synced.append("renamed")
        rename(old, new)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", note_sync)
        m.setattr(os, "rename", note_rename)
        fix(source, tmp_path / "out")
    at = synced.index("renamed")
    staging = str(tmp_path / ".out.bnbfix-partial")
    expected = {staging, *(f"{staging}/{name.rstrip('/')}" for name in tree(tmp_path / "out"))}
    assert set(synced[:at]) == expected
    assert synced[at + 1 :] == [str(tmp_path)]


def test_an_explicit_v_goes_in_full_precision_too(pristine: Make, tmp_path: Path) -> None:
    fix(pristine("text", "single"), tmp_path / "v", vllm="0.22.1")
    for target, kept in (("0.27.1", True), ("0.32.0", False)):
        result = fix(tmp_path / "v", tmp_path / target, vllm=target, bf16=True)
        found = {n for n in tensors(tmp_path / target) if n.endswith("v_proj.weight")}
        v = {f"model.layers.{n}.self_attn.v_proj.weight" for n in (2, 5)}  # where K serves as V
        assert (found & v == v) == kept and len(found - v) == 4
        assert (v <= set(edits(result, "drop"))) != kept
        assert bnbfix.verify(tmp_path / target, tmp_path / "v").ok


def test_a_plan_that_leaves_something_quantized_is_never_published_as_full_precision(
    small: Path, tmp_path: Path
) -> None:
    plan = bnbfix.plan_repair(small, "0.22.1")
    config = {k: v for k, v in plan.checkpoint.config.items() if k != "quantization_config"}
    texts = {**plan.texts, "config.json": json.dumps(config)}
    inconsistent = dataclasses.replace(plan, texts=texts, copied=tuple(f for f in plan.copied if f not in texts))
    with pytest.raises(VerifyError, match="the output would not be in full precision"):
        write.write_plan(inconsistent, tmp_path / "out")
    assert tree(tmp_path) == {}


def test_a_file_system_that_shares_bytes_is_used_and_the_output_is_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []

    def clone(target: int, request: int, source: int) -> int:
        assert request == syscalls.FICLONE
        data = os.pread(source, os.fstat(source).st_size, 0)
        shared.append(os.pwrite(target, data, 0))
        return 0

    fix(small, tmp_path / "copied", vllm="0.22.1")
    monkeypatch.setattr(fcntl, "ioctl", clone)
    result = fix(small, tmp_path / "out", vllm="0.22.1")
    assert tree(tmp_path / "out") == tree(tmp_path / "copied")
    whole = [s.size for s in result.plan.shards if s.copied]
    whole += [(small / name).stat().st_size for name in result.plan.copied]
    assert sorted(shared) == sorted(whole) and len(whole) > 4


def test_the_log_says_how_each_file_came_about(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with caplog.at_level("DEBUG", "bnbfix.writer"):
        result = fix(small, tmp_path / "a", vllm="0.22.1")
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        fix(small, tmp_path / "b", vllm="0.22.1")
        fix(small, tmp_path / "c", vllm="0.22.1", hardlink=True)
    (copied,) = (s for s in result.plan.shards if s.copied)
    ways = [m.rpartition(", ")[2] for m in caplog.messages if m.startswith(f"{copied.name}: {copied.size:,} bytes")]
    assert ways == (["kernel copy", "read and written"] if sys.platform == "linux" else ["read and written"] * 2)
    assert f"{copied.name}: hard link" in caplog.messages
    assert f"published {tmp_path / 'a'}" in caplog.messages
