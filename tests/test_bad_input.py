"""Input that is missing, broken or lying: one clear error, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from build import SHARD, json_of, read_tensors, tensors_of, write_tensors
from conftest import Make

from bnbfix.cli import main
from bnbfix.safetensors_header import MAX_USEFUL_HEADER

Q = "model.language_model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
Break = Callable[[Path], object]


def header_of(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def put_header(folder: Path, header: bytes, data: bytes | None = None) -> None:
    path = folder / SHARD
    data = header_of(path)[1] if data is None else data
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def change_header(change: Callable[[dict[str, dict[str, object]]], object]) -> Break:
    def act(folder: Path) -> None:
        header, _ = header_of(folder / SHARD)
        change(header)
        put_header(folder, json.dumps(header).encode())

    return act


def change_state(**values: object) -> Break:
    def act(folder: Path) -> None:
        with tensors_of(folder) as t:
            doc = json.loads(t[STATE].data) | values
            data = json.dumps(doc).encode()
            t[STATE] = t[STATE].__class__("U8", (len(data),), data)

    return act


def drop(*names: str) -> Break:
    def act(folder: Path) -> None:
        with tensors_of(folder) as t:
            for name in names:
                del t[name]

    return act


def shorten(name: str, by: int) -> Break:
    def act(folder: Path) -> None:
        with tensors_of(folder) as t:
            old = t[name]
            data = old.data[:-by]
            t[name] = old.__class__(old.dtype, (len(data) * old.shape[0] // len(old.data), *old.shape[1:]), data)

    return act


def config(**values: object) -> Break:
    def act(folder: Path) -> None:
        with json_of(folder) as doc:
            for key, value in values.items():
                if key == "drop":
                    doc.pop(str(value))
                else:
                    doc[key] = value

    return act


def layers(value: object) -> Break:
    def act(folder: Path) -> None:
        with json_of(folder) as doc:
            doc["text_config"]["num_hidden_layers"] = value

    return act


def index(change: Callable[[dict[str, object]], object]) -> Break:
    def act(folder: Path) -> None:
        doc = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(read_tensors(folder / SHARD), SHARD)}
        changed = change(doc)
        (folder / "model.safetensors.index.json").write_text(json.dumps(doc if changed is None else changed))

    return act


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def truncate(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-100])


def leftover(folder: Path) -> None:
    with (folder / SHARD).open("ab") as f:
        f.write(b"12345")


def long_header(length: int, size: int) -> Break:
    def act(folder: Path) -> None:
        with (folder / SHARD).open("wb") as f:
            f.write(length.to_bytes(8, "little") + b"{")
            f.truncate(size)  # sparse: no disk is used

    return act


def fifo(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def broken_link(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder / "gone")


def overlap(header: dict[str, dict[str, object]]) -> None:
    name = next(n for n in header if n.endswith("q_proj.weight"))
    begin, end = header[name]["data_offsets"]  # type: ignore[misc]
    header[name]["data_offsets"] = [begin - 2, end - 2]


def hole(header: dict[str, dict[str, object]]) -> None:
    header.pop(next(n for n in header if n.endswith("q_proj.weight")))


def lie_about_shape(header: dict[str, dict[str, object]]) -> None:
    header["model.language_model.norm.weight"]["shape"] = [127]


def twice(folder: Path) -> None:
    header, data = header_of(folder / SHARD)
    raw = json.dumps(header)
    name = "model.language_model.norm.weight"
    entry = json.dumps(header[name])
    put_header(folder, (raw[:-1] + f', "{name}": {entry}' + "}").encode(), data)


INDEX = "model.safetensors.index.json"
# What is broken: how, and words that the one error line must hold (the file, the tensor, what is wrong).
CASES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "config missing": (lambda f: (f / "config.json").unlink(), ("config.json", "missing")),
    "config not JSON": (text("config.json", "{"), ("config.json", "JSON")),
    "config a list": (text("config.json", "[]"), ("config.json", "object")),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), ("config.json",)),
    "text_config missing": (config(drop="text_config"), ("config.json", "text_config")),
    "text_config a list": (config(text_config=[]), ("config.json", "text_config")),
    "layers a word": (layers("six"), ("config.json", "num_hidden_layers")),
    "layers huge": (layers(10**18), ("config.json", "num_hidden_layers")),
    "skip list a string": (
        config(quantization_config={"quant_method": "bitsandbytes", "llm_int8_skip_modules": "lm_head"}),
        ("config.json", "llm_int8_skip_modules"),
    ),
    "index not JSON": (text(INDEX, "nonsense"), (INDEX, "JSON")),
    "index without weight_map": (index(lambda d: d.pop("weight_map") and None), (INDEX, "weight_map")),
    "index a list": (index(lambda d: []), (INDEX, "object")),
    "index names a tensor nobody has": (
        index(lambda d: d["weight_map"].update({"ghost.weight": SHARD})),  # type: ignore[attr-defined]
        (INDEX, "ghost.weight"),
    ),
    "shard missing": (index(lambda d: d["weight_map"].update({Q: "model-2.safetensors"})), ("model-2.safetensors",)),  # type: ignore[attr-defined]
    "weight_map climbs out": (index(lambda d: d["weight_map"].update({Q: "../x.safetensors"})), (INDEX, "../x")),  # type: ignore[attr-defined]
    "weight_map absolute": (index(lambda d: d["weight_map"].update({Q: "/etc/passwd"})), (INDEX, "/etc/passwd")),  # type: ignore[attr-defined]
    "weight_map in a folder": (index(lambda d: d["weight_map"].update({Q: "sub/x"})), (INDEX, "sub/x")),  # type: ignore[attr-defined]
    "shard truncated": (truncate, (SHARD, "truncated")),
    "bytes left over": (leftover, (SHARD, "left over")),
    "shard empty": (lambda f: (f / SHARD).write_bytes(b""), (SHARD, "too short")),
    "header beyond the file": (long_header(10_000_000, 1000), (SHARD, "truncated")),
    "header too long": (long_header(MAX_USEFUL_HEADER + 1, MAX_USEFUL_HEADER + 100), (SHARD, "too long")),
    "header of 2**63": (long_header(2**63, 1000), (SHARD, "too long")),
    "header not JSON": (lambda f: put_header(f, b"{nonsense  "), (SHARD, "JSON")),
    "header not UTF-8": (lambda f: put_header(f, b'{"\xff\xfe": 1}'), (SHARD, "UTF-8")),
    "header deep": (lambda f: put_header(f, b'{"a":' * 100_000), (SHARD, "JSON")),
    "overlap": (change_header(overlap), (SHARD, "overlaps", "q_proj")),
    "hole": (change_header(hole), (SHARD, "hole")),
    "duplicate name": (twice, (SHARD, "twice", "model.language_model.norm.weight")),
    "shape against bytes": (change_header(lie_about_shape), (SHARD, "model.language_model.norm.weight", "bytes")),
    "a FIFO": (fifo, (SHARD, "regular file")),
    "a broken link": (broken_link, (SHARD, "link")),
    "absmax missing": (drop(f"{Q}.absmax"), (SHARD, Q, "absmax is missing")),
    "quant_map missing": (drop(f"{Q}.quant_map"), (SHARD, Q, "quant_map is missing")),
    "nested_absmax missing": (drop(f"{Q}.nested_absmax"), (SHARD, Q, "nested_absmax is missing")),
    "nested_quant_map missing": (drop(f"{Q}.nested_quant_map"), (SHARD, Q, "nested_quant_map is missing")),
    "quant state missing": (drop(STATE), (SHARD, Q, "no quant state")),
    "absmax too short": (shorten(f"{Q}.absmax", 1), (SHARD, Q, "absmax")),
    "weight too short": (shorten(Q, 1), (SHARD, Q, "bytes")),
    "lie about shape": (change_state(shape=[128, 127]), (SHARD, Q, "shape")),
    "lie about size": (change_state(shape=[10**9, 10**9]), (SHARD, Q, "shape")),
    "lie about blocksize": (change_state(blocksize=128), (SHARD, Q, "absmax")),
    "blocksize zero": (change_state(blocksize=0), (SHARD, Q, "blocksize")),
    "lie about type": (change_state(quant_type="fp4"), (SHARD, Q, "quant_type")),
    "lie about dtype": (change_state(dtype="int8"), (SHARD, Q, "dtype")),
    "offset NaN": (change_state(nested_offset=float("nan")), (SHARD, Q, "nested_offset")),
    "offset infinite": (change_state(nested_offset=float("inf")), (SHARD, Q, "nested_offset")),
}

Run = namedtuple("Run", "code out err")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def call(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["bnbfix", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            main()
        done = capsys.readouterr()
        return Run(e.value.code, done.out, done.err)

    return call


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.stat().st_size < 20_000_000
    }


def refused(done: Run, words: tuple[str, ...]) -> None:
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert (done.code, len(errors)) == (2, 1), done
    assert "Traceback" not in done.err + done.out
    assert not [w for w in words if w not in errors[0]], errors[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["scan", "repair"])
def test_broken_input_is_refused_and_nothing_is_written(
    command: str, case: str, checkpoint: Make, tmp_path: Path, run: Callable[..., Run]
) -> None:
    source, (break_it, words) = checkpoint("dense31b", "all"), CASES[case]
    break_it(source)
    before, there = contents(source), set(tmp_path.iterdir())
    extra = ("--out", tmp_path / "out", "--vllm", "0.22.1") if command == "repair" else ("--vllm", "0.22.1")
    refused(run(command, source, *extra), words)
    assert contents(source) == before
    assert set(tmp_path.iterdir()) == there


def test_a_scan_lists_every_damaged_weight(checkpoint: Make, run: Callable[..., Run]) -> None:
    source = checkpoint("dense31b", "all")
    drop(f"{Q}.absmax", f"{Q.replace('.0.', '.1.')}.absmax")(source)
    done = run("scan", source, "--format", "json")
    damaged = [f for f in json.loads(done.out)["findings"] if f["code"] == "BNB201"]
    assert [f["tensors"] for f in damaged] == [[Q], [Q.replace(".0.", ".1.")]]


@pytest.mark.parametrize(
    ("where", "words"),
    [("inside", "outside"), ("same", "outside"), ("above", "outside"), ("full", "not empty"), ("file", "not a folder")],
)
def test_an_output_that_touches_something_is_refused(
    where: str, words: str, checkpoint: Make, tmp_path: Path, run: Callable[..., Run]
) -> None:
    source = checkpoint("dense31b", "skip")
    out = {
        "inside": source / "out", "same": source, "above": tmp_path, "full": tmp_path / "full", "file": tmp_path / "f",
    }[where]  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "f").write_text("mine")
    before = contents(tmp_path)
    refused(run("repair", source, "--out", out, "--vllm", "0.22.1"), (words,))
    assert contents(tmp_path) == before


def test_too_little_disk_is_said_before_anything_is_written(
    checkpoint: Make, tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("dense31b", "skip")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(run("repair", source, "--out", tmp_path / "out", "--vllm", "0.22.1"), ("not enough disk", "1,000 are free"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["nowhere", "a-file"])
def test_no_folder_no_scan(path: str, tmp_path: Path, run: Callable[..., Run]) -> None:
    (tmp_path / "a-file").write_text("x")
    refused(run("scan", tmp_path / path), (path,))


NOT_OURS: dict[str, tuple[Break, str]] = {
    "llama": (config(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    "gptq": (config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "adapter"),
    "no weights": (lambda f: (f / SHARD).unlink(), "no safetensors"),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_what_is_not_a_bitsandbytes_gemma4_is_named_with_exit_3(
    case: str, checkpoint: Make, run: Callable[..., Run]
) -> None:
    source, (change, words) = checkpoint("dense31b", "skip"), NOT_OURS[case]
    change(source)
    done = run("scan", source)
    assert (done.code, done.out, done.err.count("\n")) == (3, "", 1)
    assert words in done.err


def test_an_unquantized_gemma4_is_named_with_exit_3(pristine: Make, run: Callable[..., Run]) -> None:
    done = run("scan", pristine("dense31b", "bf16"))
    assert done.code == 3 and "unquantized Gemma4ForConditionalGeneration" in done.err


def test_a_snapshot_of_the_hub_cache_is_a_folder_like_others(pristine: Make, tmp_path: Path) -> None:
    """Its files are symlinks to blobs outside the folder. Run as a user does, in a process of its own."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in pristine("dense31b", "skip").iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    command = [sys.executable, "-m", "bnbfix"]
    scan = subprocess.run([*command, "scan", str(snapshot), "--vllm", "0.32.0"], capture_output=True, text=True)
    assert (scan.returncode, scan.stderr) == (1, "")
    out = tmp_path / "out"
    fix = subprocess.run(
        [*command, "repair", str(snapshot), "--vllm", "0.32.0", "--out", str(out)], capture_output=True, text=True
    )
    assert fix.returncode == 0, fix.stderr
    assert not any(p.is_symlink() for p in out.iterdir())
    assert subprocess.run([*command, "scan", str(out), "--vllm", "0.32.0"], capture_output=True).returncode == 0


def test_write_tensors_makes_files_that_are_accepted(checkpoint: Make, run: Callable[..., Run]) -> None:
    """The tests' own writer: what it writes unchanged must pass, or every refusal above would mean nothing."""
    source = checkpoint("dense31b", "all")
    write_tensors(source / SHARD, read_tensors(source / SHARD))
    assert run("scan", source, "--vllm", "0.27.1").code == 0
