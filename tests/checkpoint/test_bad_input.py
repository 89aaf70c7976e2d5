"""Broken, inconsistent and hostile folders on the command line: one error line, the right exit code, no output."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import bnbfix
from bnbfix.checkpoint.checkpoint import open_checkpoint
from bnbfix.checkpoint.source import LocalSource
from bnbfix.errors import QuantStateError
from bnbfix.writer import tensor_data
from tests.support import surgery
from tests.support.build import Make
from tests.support.command_line import Cli, Run, process

SHARD = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
W = "model.language_model.layers.0.mlp.down_proj.weight"  # 128 x 256, doubly quantized
NORM = "model.language_model.norm.weight"
STATE = W + ".quant_state.bitsandbytes__nf4"
COMMANDS = ["scan", "repair"]
Damage = Callable[[Path], object]
Usage = namedtuple("Usage", "total used free")


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time of change and content of everything below a folder, links and pipes as such."""
    out = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content = ""
        if stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(info.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        out[str(path.relative_to(folder))] = (info.st_mode, info.st_mtime_ns, content)
    return out


def arguments(command: str, source: Path, out: Path) -> list[object]:
    return [command, source, *(["--out", out, "--device", "cpu"] if command == "repair" else [])]


def refuses(run: Cli, command: str, source: Path, tmp_path: Path, code: int = 2) -> Run:
    """Runs a command that has to end with an error, an exit code, and without a trace on the disk."""
    before = snapshot(tmp_path)
    done = run(*arguments(command, source, tmp_path / "out"))
    assert done.code == code, done
    assert done.error
    assert snapshot(tmp_path) == before, "the output, a staging folder or the source"
    return done


@dataclass(frozen=True)
class Case:
    """One way to break a checkpoint, and what the error line must say of it."""

    name: str
    damage: Damage
    words: tuple[str, ...]


def cases(*items: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Parametrizes a test with cases: (name, damage, words...)."""
    return pytest.mark.parametrize(
        "case", [Case(n, d, tuple(words)) for n, d, *words in items], ids=lambda case: case.name
    )


def of(file: str, function: Callable[..., object], *arguments: Any, **options: Any) -> Damage:
    """The damage that a function does to a file of the checkpoint."""
    return lambda source: function(source / file, *arguments, **options)


def text(file: str, content: str | bytes) -> Damage:
    return of(file, lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()))


def config(*keys: str, to: Any) -> Damage:
    """The damage of setting one key of config.json; `...` takes it out."""

    def change(doc: Any) -> None:
        for key in keys[:-1]:
            doc = doc[key]
        doc[keys[-1]] = to
        if to is ...:
            del doc[keys[-1]]

    return of("config.json", surgery.edit_json, change)


def layers(to: Any) -> Damage:
    return config("text_config", "num_hidden_layers", to=to)


def index(**keys: Any) -> Damage:
    """The damage of setting keys of the index."""
    return of(INDEX, surgery.edit_json, lambda doc: doc.update(keys))


def mapped(name: str, shard: Any) -> Damage:
    """The damage of one wrong entry in the weight_map."""
    return of(INDEX, surgery.edit_json, lambda doc: doc["weight_map"].update({name: shard}))


def header(change: Callable[[surgery.Header], object]) -> Damage:
    return of(SHARD, surgery.edit_header, change)


# Config and index


@cases(
    ("missing", of("config.json", Path.unlink), "is missing"),
    ("a folder", lambda s: ((s / "config.json").unlink(), (s / "config.json").mkdir()), "is missing"),
    ("empty", text("config.json", ""), "is not valid JSON ("),
    ("cut off", text("config.json", '{"architectures": ['), "is not valid JSON ("),
    ("Python, not JSON", text("config.json", "{'a': None}"), "is not valid JSON ("),
    ("not UTF-8", text("config.json", b'{"a": "\xff"}'), "is not valid JSON ("),
    ("UTF-16", text("config.json", "{}".encode("utf-16")), "is not valid JSON ("),
    ("deep", text("config.json", '{"a":' * 100_000), "is not valid JSON ("),
    ("huge number", text("config.json", '{"a":' + "1" * 5000 + "}"), "is not valid JSON ("),
    ("a list", text("config.json", "[]"), "is not a JSON object"),
    ("null", text("config.json", "null"), "is not a JSON object"),
    ("65 MB", of("config.json", lambda path: os.truncate(path, 65_000_000)), "exceed the limit of 4,000,000"),
    ("without text_config", config("text_config", to=...), "text_config is missing"),
    ("text_config is a list", config("text_config", to=[]), "text_config is missing"),
    ("layers are a string", layers("6"), "num_hidden_layers is '6', not a count"),
    ("layers are a float", layers(6.0), "num_hidden_layers is 6.0, not a count"),
    ("layers are true", layers(True), "num_hidden_layers is True, not a count"),
    ("no layers", layers(...), "num_hidden_layers is None, not a count"),
    ("negative layers", layers(-6), "num_hidden_layers is -6, not a count"),
    ("10^18 layers", layers(10**18), "num_hidden_layers is 1000000000000000000, not a count"),
    ("fewer layers", layers(5), "layer_types must name"),
    ("unknown layer type", config("text_config", "layer_types", to=["x"] * 6), "layer_types must name"),
    ("layer types are lists", config("text_config", "layer_types", to=[[]] * 6), "layer_types must name"),
    ("too many shared layers", config("text_config", "num_kv_shared_layers", to=7), "num_kv_shared_layers is 7, of 6"),
    ("quantization is a list", config("quantization_config", to=["x"]), "quantization_config is not an object"),
    ("skip list is a string", config("quantization_config", "llm_int8_skip_modules", to="x"), "is not a list of names"),
    ("skip list of numbers", config("quantization_config", "llm_int8_skip_modules", to=[1]), "is not a list of names"),
    (
        "skip list of patterns",
        config("quantization_config", "llm_int8_skip_modules", to=[".*a.*b"] * 21),
        "has 21 patterns with repetitions, above the limit of 20",
    ),
    ("half a surrogate pair", config("quantization_config", "llm_int8_skip_modules", to=["\ud800"]), "not valid JSON"),
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_config(run: Cli, checkpoint: Make, tmp_path: Path, command: str, case: Case) -> None:
    source = checkpoint("dense31b", "skip")
    case.damage(source)
    done = refuses(run, command, source, tmp_path)
    assert done.out == ""
    assert done.error.startswith("error: config.json: ")
    assert all(word in done.error for word in case.words), done.error


@cases(
    ("not JSON", text(INDEX, "{"), "is not valid JSON ("),
    ("a list", text(INDEX, "[]"), "is not a JSON object"),
    ("an empty object", text(INDEX, "{}"), "weight_map must map tensor names to file names"),
    ("no weight_map", text(INDEX, '{"metadata": {}}'), "weight_map must map tensor names to file names"),
    ("weight_map is a list", index(weight_map=[FIRST]), "weight_map must map"),
    ("weight_map is a string", index(weight_map=FIRST), "weight_map must map"),
    ("weight_map is empty", index(weight_map={}), "weight_map must map"),
    ("weight_map to a number", mapped(W, 1), "weight_map must map"),
    ("weight_map to a list", mapped(W, [FIRST]), "weight_map must map"),
    ("half a surrogate pair", index(metadata={"x": "\udfff"}), "is not valid JSON ("),
    ("a tensor that is nowhere", mapped("model.extra.weight", FIRST), "'model.extra.weight'", FIRST, "no shard has it"),
    ("two of them", lambda s: (mapped("x", FIRST)(s), mapped("y", SECOND)(s)), "'x'", FIRST, "(2 such tensors)"),
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_index(run: Cli, checkpoint: Make, tmp_path: Path, command: str, case: Case) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    case.damage(source)
    done = refuses(run, command, source, tmp_path)
    assert done.out == ""
    assert done.error.startswith(f"error: {INDEX}: ")
    assert all(word in done.error for word in case.words), done.error


LEAVING = [
    "../x.safetensors",
    "/etc/passwd",
    "sub/x",
    "sub/model.safetensors",
    "./" + FIRST,
    "..",
    ".",
    "",
    "sub\\x",
    "a\0b",
    "../source-dense31b-skip/" + FIRST,
]


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_weight_map_that_leaves_the_folder(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str, name: str
) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    (source / "sub").mkdir()
    for there in (tmp_path / "x.safetensors", source / "sub" / "x", source / "sub" / "model.safetensors"):
        shutil.copy(source / FIRST, there)
    mapped(W, name)(source)
    done = refuses(run, command, source, tmp_path)
    assert done.out == ""
    assert done.error == f"error: {INDEX}: weight_map names {name!r}, which is not a file next to it"


# Shards


def missing_shard(source: Path) -> None:
    (source / SECOND).unlink()


def folder_for_a_shard(source: Path) -> None:
    (source / SECOND).unlink()
    (source / SECOND).mkdir()


@pytest.mark.parametrize("damage", [missing_shard, folder_for_a_shard])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_that_is_not_there(run: Cli, checkpoint: Make, tmp_path: Path, command: str, damage: Damage) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    damage(source)
    done = refuses(run, command, source, tmp_path)
    assert done.out == ""
    assert f"shard {SECOND} is missing; the index names it" in done.error


def sparse(length: int, size: int) -> Damage:
    """A file that says its header has `length` bytes, and has `size` bytes that take no room on the disk."""

    def write(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":')
        os.truncate(path, size)

    return of(SHARD, write)


def twice(path: Path) -> None:
    head, data = surgery.read_file(path)
    entry = json.dumps({NORM: head[NORM]})
    surgery.write_file(path, json.dumps(head)[:-1] + "," + entry[1:], data)


def set_entry(**keys: Any) -> Damage:
    return header(lambda head: head[NORM].update(keys))


def shift(by: int) -> Damage:
    """Move the offsets of one tensor, so that it overlaps a neighbour and leaves a hole on the other side."""

    def change(head: surgery.Header) -> None:
        begin, end = head[NORM]["data_offsets"]
        head[NORM]["data_offsets"] = [begin + by, end + by]

    return header(change)


def hole(path: Path) -> None:
    head, data = surgery.read_file(path)
    last = max(head, key=lambda n: head[n]["data_offsets"][1] if n != surgery.METADATA else -1)
    head[last]["data_offsets"] = [offset + 4 for offset in head[last]["data_offsets"]]
    surgery.write_file(path, head, data + bytes(4))


SHARD_CASES = (
    ("empty", text(SHARD, b""), "too short for a safetensors file"),
    ("7 bytes", text(SHARD, b"\x02\0\0\0\0\0\0"), "too short for a safetensors file"),
    ("cut by a byte", of(SHARD, lambda p: os.truncate(p, p.stat().st_size - 1)), "truncated: the tensors need"),
    ("half of it", of(SHARD, lambda p: os.truncate(p, p.stat().st_size // 2)), "truncated: the tensors need"),
    ("cut inside the header", of(SHARD, lambda p: os.truncate(p, 100)), "truncated: the header needs"),
    ("a byte too many", of(SHARD, lambda p: os.truncate(p, p.stat().st_size + 1)), "1 bytes left over"),
    (
        "a Git LFS pointer",
        text(SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer, not the file itself",
    ),
    ("a page of HTML", text(SHARD, "<!DOCTYPE html><html>Not found</html>"), "exceeds the limit"),
    ("a pickle in a zip", text(SHARD, b"PK\x03\x04" + bytes(100)), "the file has 104"),
    ("30 MB of header", sparse(30_000_000, 31_000_000), "header of 30,000,000 bytes exceeds the limit"),
    ("2^63 bytes of header", sparse(2**63, 100), "header of 9,223,372,036,854,775,808 bytes exceeds the limit"),
    ("header beyond the end", sparse(1000, 1007), "truncated: the header needs 1,008 bytes, the file has 1,007"),
    ("header not JSON", text(SHARD, surgery.pack("{,}")), "header is not valid JSON ("),
    ("header a list", text(SHARD, surgery.pack("[]")), "header is not a JSON object"),
    ("header not UTF-8", text(SHARD, surgery.pack(b'{"\xff":1}')), "header is not UTF-8 (byte 2)"),
    ("header too deep", text(SHARD, surgery.pack('{"a":' * 100_000)), "header is not valid JSON ("),
    ("metadata of numbers", header(lambda h: h.update({surgery.METADATA: {"a": 1}})), "__metadata__ must map strings"),
    ("a name twice", of(SHARD, twice), f"'{NORM}' is in the header twice"),
    ("overlap", shift(-2), "overlaps the tensor before it"),
    ("shifted up", shift(2), "leaves a hole before it"),
    ("hole", of(SHARD, hole), "leaves a hole before it"),
    ("wrong dtype", set_entry(dtype="F32"), f"tensor '{NORM}': F32 [128] takes 512 bytes, its data_offsets hold 256"),
    ("wrong shape", set_entry(shape=[64]), f"tensor '{NORM}': BF16 [64] takes 128 bytes, its data_offsets hold 256"),
    ("shape overflows", set_entry(shape=[2**62] * 300), f"tensor '{NORM}': BF16", "is more than 64 bits can count"),
    ("shape negative", set_entry(shape=[-128]), f"tensor '{NORM}' has a shape that is not a list of sizes"),
    ("unknown dtype", set_entry(dtype="BF15"), f"tensor '{NORM}' has an unknown dtype ('BF15')"),
    ("offsets the wrong way", set_entry(data_offsets=[256, 0]), f"tensor '{NORM}' has data_offsets that are not"),
    ("key too many", set_entry(device="cuda"), f"tensor '{NORM}' needs exactly dtype, shape and data_offsets"),
    ("entry is null", header(lambda h: h.update({NORM: None})), f"tensor '{NORM}' needs exactly dtype, shape"),
)


@cases(*SHARD_CASES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_shard(run: Cli, checkpoint: Make, tmp_path: Path, command: str, case: Case) -> None:
    source = checkpoint("dense31b", "skip")
    case.damage(source)
    done = refuses(run, command, source, tmp_path)
    assert done.out == ""
    assert done.error.startswith(f"error: {SHARD}: ")
    assert all(word in done.error for word in case.words), done.error


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shard_that_is_broken_is_the_one_that_is_named(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str
) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    os.truncate(source / SECOND, (source / SECOND).stat().st_size - 1)
    assert refuses(run, command, source, tmp_path).error.startswith(f"error: {SECOND}: truncated: ")


# Quant states


def state(**keys: Any) -> Damage:
    return of(SHARD, surgery.edit_state, W, **keys)


def drop(*suffixes: str) -> Damage:
    def change(path: Path) -> None:
        for suffix in suffixes:
            surgery.drop_tensor(path, W + suffix)

    return of(SHARD, change)


def resized(suffix: str, by: int) -> Damage:
    """A quant-state tensor of so many bytes more or fewer, in a file that is valid otherwise."""

    def change(path: Path) -> None:
        old = surgery.tensor_bytes(path, W + suffix)
        width = 4 if surgery.read_file(path)[0][W + suffix]["dtype"] == "F32" else 1
        new = (old + bytes(max(by, 0)))[: len(old) + by]
        surgery.replace_tensor(path, W + suffix, new, shape=[len(new) // width])

    return of(SHARD, change)


def raw_state(content: bytes) -> Damage:
    return of(SHARD, surgery.replace_tensor, STATE, content, shape=[len(content)])


def as_float16(source: Path) -> None:
    content = surgery.tensor_bytes(source / SHARD, W + ".nested_absmax")
    shape = [len(content) // 2]
    surgery.replace_tensor(source / SHARD, W + ".nested_absmax", content, dtype="F16", shape=shape)


def second_state(source: Path) -> None:
    head, data = surgery.read_file(source / SHARD)
    raw = surgery.tensor_bytes(source / SHARD, STATE).replace(b"nf4", b"fp4")
    entry = {"dtype": "U8", "shape": [len(raw)], "data_offsets": [len(data), len(data) + len(raw)]}
    surgery.write_file(source / SHARD, head | {STATE.replace("nf4", "fp4"): entry}, data + raw)


STATE_CASES = (
    ("no absmax", drop(".absmax"), "its quant-state tensor absmax is missing"),
    ("no quant_map", drop(".quant_map"), "its quant-state tensor quant_map is missing"),
    ("no nested_absmax", drop(".nested_absmax"), "its quant-state tensor nested_absmax is missing"),
    ("no nested_quant_map", drop(".nested_quant_map"), "its quant-state tensor nested_quant_map is missing"),
    ("no quant state", drop(".quant_state.bitsandbytes__nf4"), "holds quantized bytes, but has no quant state"),
    (
        "no quant-state tensor at all",
        drop(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"),
        "holds quantized bytes, but has no quant state",
    ),
    ("absmax too short", resized(".absmax", -1), "absmax is U8 [511]; the quant state asks for U8 [512]"),
    ("absmax too long", resized(".absmax", 1), "absmax is U8 [513]; the quant state asks for U8 [512]"),
    ("quant_map too short", resized(".quant_map", -4), "quant_map is F32 [15]; the quant state asks for F32 [16]"),
    ("nested_absmax too short", resized(".nested_absmax", -4), "nested_absmax is F32 [1]; the quant state asks for"),
    ("nested_quant_map too short", resized(".nested_quant_map", -4), "nested_quant_map is F32 [255]; the quant state"),
    ("nested_absmax in F16", as_float16, "nested_absmax is F16 [4]; the quant state asks for F32 [2]"),
    ("wrong shape", state(shape=[128, 512]), "quant state says shape [128, 512], which quantizes to 32,768 bytes"),
    ("shape of nothing", state(shape=[]), "shape [] is not a list of sizes"),
    ("shape huge", state(shape=[2**39] * 200), "is more than 64 bits can count"),
    ("shape long", state(shape=[1] * 1000), "which quantizes to 1 bytes; the weight has 16,384"),
    ("wrong blocksize", state(blocksize=128), "absmax is U8 [512]; the quant state asks for U8 [256]"),
    ("blocksize of no kernel", state(blocksize=48), "blocksize 48 is not one of"),
    ("blocksize 0", state(blocksize=0), "blocksize 0 is not one of"),
    ("wrong quant_type", state(quant_type="fp4"), "quant_type 'fp4' in a tensor named .quant_state.bitsandbytes__nf4"),
    ("wrong name", of(SHARD, surgery.rename, STATE, STATE.replace("nf4", "fp4")), "quant_type 'nf4' in a tensor named"),
    ("quant_type unknown", state(quant_type="nf3"), "quant_type 'nf3' in a tensor named"),
    ("wrong dtype", state(dtype="int8"), "dtype 'int8' is not one of bfloat16, float16, float32"),
    ("dtype a list", state(dtype=["bfloat16"]), "dtype ['bfloat16'] is not one of"),
    ("key missing", state(blocksize=None), "needs the keys blocksize, dtype, quant_type, shape"),
    ("key too many", state(**{"x.blocksize": 128}), "unknown key 'x.blocksize'"),
    ("nested key missing", state(nested_blocksize=None), "nested_blocksize None is not one of"),
    ("wrong nested blocksize", state(nested_blocksize=512), "nested_absmax is F32 [2]; the quant state asks"),
    ("wrong nested dtype", state(nested_dtype="float16"), "nested_dtype 'float16' is not float32"),
    ("nested offset NaN", state(nested_offset=float("nan")), "nested_offset nan is not a finite number"),
    ("nested offset infinite", state(nested_offset=float("inf")), "nested_offset inf is not a finite number"),
    ("nested offset 10^400", state(nested_offset=10**400), "is not a finite number"),
    (
        "double quantization hidden",
        state(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        "absmax is U8 [512]; the quant state asks for F32 [512]",
    ),
    ("not JSON", raw_state(b"nf4"), "not JSON ("),
    ("not UTF-8", raw_state(b"\xff\xfe"), "not JSON ("),
    ("empty", raw_state(b""), "damaged quant state: empty"),
    ("too deep", raw_state(b"[" * 4000), "not JSON ("),
    ("5 KB of state", raw_state(b" " * 5000), "its quant state has 5,000 bytes"),
    ("a second state", second_state, "it has both an nf4 and an fp4 quant state"),
)


@cases(*STATE_CASES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_invalid_quant_state_is_reported(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str, case: Case
) -> None:
    source = checkpoint("dense31b", "skip")
    case.damage(source)
    with safe_open(source / SHARD, "pt") as f:  # the file itself is fine
        assert W in f.keys()  # noqa: SIM118 - it is not a mapping
    done = refuses(run, command, source, tmp_path)
    assert done.error.startswith(f"error: {SHARD}: {W}: ")
    assert all(word in done.error for word in case.words), done.error
    if command == "scan":  # which shows the whole picture all the same
        assert "BNB201" in done.out
        in_json = run("scan", source, "--format", "json", "--exit-zero")
        found = [f for f in json.loads(in_json.out)["findings"] if f["code"] == "BNB201"]
        assert in_json.code == 2 and [f["tensors"] for f in found] == [[W]] and found[0]["fix"] is None
    else:
        assert done.out == ""


def test_every_fault_of_a_quant_state_has_a_message_of_its_own_and_reaches_no_kernel(
    pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("dequantize", "dequantize_int8", "quantize"):
        monkeypatch.setattr(tensor_data, name, lambda *a, name=name, **k: calls.append(name))
    messages: dict[str, list[str]] = {}
    for name, damage, *_ in STATE_CASES:
        source = Path(shutil.copytree(pristine("dense31b", "skip"), tmp_path / "source"))
        damage(source)
        (error,) = open_checkpoint(LocalSource.open(source)).damaged
        messages.setdefault(str(error).removeprefix(f"{error.where}: "), []).append(name)
        with pytest.raises(QuantStateError):
            bnbfix.repair(source, tmp_path / "out", vllm="portable", device="cpu")
        shutil.rmtree(source)
    for message, names in messages.items():
        print(f"{', '.join(names)}: {message}")
    # Each its own; without its quant state every weight is reported alike, whatever else is missing.
    assert [names for names in messages.values() if len(names) > 1] == [
        ["no quant state", "no quant-state tensor at all"]
    ]
    assert len(messages) == len(STATE_CASES) - 1
    assert calls == []


@pytest.mark.parametrize("shape", [[256, 128], [32768], [1, 128, 256], [64, 512]])
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"partial_groups": "quantize"}], ids=str)
def test_a_shape_that_the_model_cannot_have_is_refused_though_as_many_numbers_are_quantized(
    run: Cli, checkpoint: Make, tmp_path: Path, shape: list[int], options: dict[str, Any]
) -> None:
    source = checkpoint("dense31b", "skip")
    state(shape=shape)(source)
    assert not open_checkpoint(LocalSource.open(source)).damaged, "the sizes fit"
    (found,) = [f for f in bnbfix.scan(source, "portable").findings if f.code.value == "BNB201"]
    words = f"{SHARD}: {W}: quant state says shape {shape}; hidden_size asks for 128 rows"
    assert (found.tensors, found.message, found.fix) == ((W,), words, None)
    with pytest.raises(QuantStateError, match="hidden_size asks for 128 rows"):
        bnbfix.repair(source, tmp_path / "out", vllm="portable", device="cpu", **options)
    for command in COMMANDS:
        done = refuses(run, command, source, tmp_path)  # exit code 2
        assert done.error == f"error: {words}"


@pytest.mark.parametrize(
    "options",
    [["--dry-run"], ["--bf16"], ["--partial-groups", "quantize"], ["--vllm", "0.32.0"], ["--format", "json"]],
    ids=" ".join,
)
def test_no_option_lets_an_invalid_quant_state_pass(
    run: Cli, checkpoint: Make, tmp_path: Path, options: list[str]
) -> None:
    source = checkpoint("dense31b", "skip")
    resized(".absmax", -1)(source)
    before = snapshot(tmp_path)
    done = run("repair", source, "--out", tmp_path / "out", "--device", "cpu", *options)
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(f"error: {SHARD}: {W}: absmax is U8 [511]")
    assert snapshot(tmp_path) == before


def test_a_scan_shows_every_weight_that_is_damaged(run: Cli, checkpoint: Make) -> None:
    source = checkpoint("dense31b", "skip")
    other = W.replace("down_proj", "up_proj")
    surgery.edit_state(source / SHARD, W, blocksize=128)
    surgery.edit_state(source / SHARD, other, nested_offset=float("inf"))
    done = run("scan", source, "--format", "json")
    assert done.code == 2 and done.error
    found = [f for f in json.loads(done.out)["findings"] if f["code"] == "BNB201"]
    assert sorted(name for f in found for name in f["tensors"]) == sorted([W, other])


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_name_of_a_damaged_weight_breaks_no_line_and_no_terminal(run: Cli, checkpoint: Make, form: str) -> None:
    source = checkpoint("dense31b", "skip")
    evil = "x\nerror: y\x1b[2J\x9b2J.weight"
    for name in surgery.names(source / SHARD):
        if name.startswith(W):
            surgery.rename(source / SHARD, name, evil + name.removeprefix(W))
    surgery.drop_tensor(source / SHARD, f"{evil}.absmax")
    done = run("scan", source, "--verbose", "--format", form)
    assert done.code == 2
    assert done.error == f"error: {SHARD}: x\\nerror: y\\x1b[2J\\x9b2J.weight: its quant-state tensor absmax is missing"
    assert not [c for c in done.out + done.err if not c.isprintable() and c != "\n"]
    assert not [line for line in done.out.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("command", COMMANDS)
def test_state_tensors_in_another_shard_are_found_and_checked_all_the_same(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str
) -> None:
    source = checkpoint("dense31b", "skip", shards=2)
    head, data = surgery.read_file(source / FIRST)
    name = W + ".absmax"
    begin, end = head[name]["data_offsets"]
    surgery.write_file(source / "extra.safetensors", {name: head[name] | {"data_offsets": [0, 512]}}, data[begin:end])
    surgery.drop_tensor(source / FIRST, name)
    mapped(name, "extra.safetensors")(source)
    assert run("scan", source, "--exit-zero").code == 0
    surgery.replace_tensor(source / "extra.safetensors", name, bytes(511), shape=[511])
    done = refuses(run, command, source, tmp_path)
    assert done.error.startswith(f"error: {FIRST}: {W}: absmax is U8 [511]")


# LLM.int8


@pytest.mark.parametrize("command", COMMANDS)
def test_int8_scales_that_are_too_short(run: Cli, checkpoint: Make, tmp_path: Path, command: str) -> None:
    source = checkpoint("dense31b", "int8")
    surgery.replace_tensor(source / SHARD, W.removesuffix("weight") + "SCB", bytes(127 * 4), shape=[127])
    done = refuses(run, command, source, tmp_path)
    assert done.error.startswith(f"error: {SHARD}: {W}: SCB is F32 [127] next to a weight of I8 [128, 256]")


@pytest.mark.parametrize("command", COMMANDS)
def test_int8_scales_that_are_missing(run: Cli, checkpoint: Make, tmp_path: Path, command: str) -> None:
    source = checkpoint("dense31b", "int8")
    surgery.drop_tensor(source / SHARD, W.removesuffix("weight") + "SCB")
    done = refuses(run, command, source, tmp_path)
    assert done.error.startswith(f"error: {SHARD}: {W}: holds quantized bytes, but has no quant state")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("number", "name"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (255, "255")])
def test_an_int8_weight_in_tiles_is_not_taken_for_rows(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str, number: int, name: str
) -> None:
    source = checkpoint("dense31b", "int8")
    surgery.replace_tensor(source / SHARD, W + "_format", bytes([number]), shape=[])
    done = refuses(run, command, source, tmp_path)
    words = f"its weight_format is {name}, and bitsandbytes reads only row"
    assert done.error.startswith(f"error: {SHARD}: {W}: {words}")


@pytest.mark.parametrize("shape", [[0], [2]])
def test_a_weight_format_of_other_than_one_byte(run: Cli, checkpoint: Make, tmp_path: Path, shape: list[int]) -> None:
    source = checkpoint("dense31b", "int8")
    surgery.replace_tensor(source / SHARD, W + "_format", bytes(shape[0]), shape=shape)
    done = refuses(run, "scan", source, tmp_path)
    assert done.error.startswith(f"error: {SHARD}: {W}: weight_format is U8 {shape}, not one U8")


# Files that are not regular files


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_is_refused_and_not_waited_for(checkpoint: Make, tmp_path: Path, command: str) -> None:
    source = checkpoint("dense31b", "skip")
    (source / SHARD).unlink()
    os.mkfifo(source / SHARD)
    done = refuses(process, command, source, tmp_path)
    assert done.error == f"error: {SHARD}: is not a regular file"
    assert done.out == ""


def link(file: str, target: str) -> Damage:
    def change(source: Path) -> None:
        (source / file).unlink(missing_ok=True)
        (source / file).symlink_to(target)

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (link(SHARD, "../blobs/gone"), f"{SHARD}: cannot be opened (No such file or directory); a broken link?"),
        (link("config.json", "gone"), "config.json: cannot be opened (No such file or directory); a broken link?"),
        (link(SHARD, SHARD), f"{SHARD}: cannot be opened (Too many levels of symbolic links); a broken link?"),
        (link(SHARD, "/dev/zero"), f"{SHARD}: is not a regular file"),
    ],
    ids=["broken", "broken config", "circle", "to a device"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_links_to_anything_but_a_file_are_refused(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str, damage: Damage, words: str
) -> None:
    source = checkpoint("dense31b", "skip")
    damage(source)
    done = refuses(run, command, source, tmp_path)
    assert done.out == ""
    assert done.error == f"error: {words}"


def test_folders_nested_without_end_are_refused_by_a_repair(run: Cli, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    source.joinpath(*["d"] * 52).mkdir(parents=True)
    done = run(*arguments("repair", source, tmp_path / "out"))
    assert (done.code, done.out) == (2, "")
    assert done.error.endswith("is more than 50 folders deep")
    assert not (tmp_path / "out").exists()
    assert run(*arguments("scan", source, tmp_path / "out")).code == 1


def test_a_folder_to_verify_that_is_nested_without_end_is_refused(
    run: Cli, pristine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnbfix.repair(pristine("dense31b", "skip"), tmp_path / "out", "0.32.0")
    monkeypatch.chdir(tmp_path / "out")
    for _ in range(1200):  # one level after another: no path may be that long
        os.mkdir("d")
        os.chdir("d")
    done = run("verify", tmp_path / "out")
    for _ in range(1200):  # what removes temporary folders would not come that deep either
        os.chdir("..")
        os.rmdir("d")
    assert (done.code, done.out) == (2, "")
    assert done.error.endswith("is more than 50 folders deep")


def hub_cache(model: Path, cache: Path) -> Path:
    """The folder of a revision as huggingface_hub's cache has it: links into a heap of files named by their hash."""
    snapshot, blobs = cache / "models--u--m" / "snapshots" / ("a" * 40), cache / "models--u--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_a_folder_of_the_hub_cache_is_scanned_and_repaired_like_any_other(
    run: Cli, pristine: Make, tmp_path: Path
) -> None:
    source = pristine("text", "skip", shards=2)
    linked = hub_cache(source, tmp_path / "hub")
    before = snapshot(tmp_path)
    scans = [run("scan", folder, "--format", "json") for folder in (source, linked)]
    assert [s.code for s in scans] == [1, 1] and [s.err for s in scans] == ["", ""]
    documents = [json.loads(s.out) | {"model": None} for s in scans]
    assert documents[0] == documents[1] and documents[0]["findings"]
    outs = [tmp_path / "from-folder", tmp_path / "from-linked"]
    for folder, out in zip((source, linked), outs, strict=True):
        assert run("repair", folder, "--out", out, "--device", "cpu").code == 0
    contents = [{p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and not p.is_symlink()} for out in outs]
    assert contents[0] == contents[1] and {p.name for p in source.iterdir()} < set(contents[0])
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("from-")} == before
    assert run("scan", outs[1]).code == 0


# Destinations


@pytest.mark.parametrize("place", ["source", "source/out", "source/deep/out", ".", "link"])
def test_a_destination_inside_the_source_or_around_it(run: Cli, checkpoint: Make, tmp_path: Path, place: str) -> None:
    checkpoint("dense31b", "skip").rename(tmp_path / "source")
    (tmp_path / "link").symlink_to("source/new")
    out = tmp_path / place
    before = snapshot(tmp_path)
    done = run("repair", tmp_path / "source", "--out", out, "--overwrite")
    assert (done.code, done.out) == (2, "")
    assert done.error == f"error: {out}: the output must be outside the source, and the source outside the output"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("inside", ["file", ".hidden", "folder/"])
def test_a_destination_that_is_not_empty(run: Cli, pristine: Make, tmp_path: Path, inside: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / inside).mkdir() if inside.endswith("/") else (out / inside).write_text("mine")
    before = snapshot(tmp_path)
    done = run("repair", pristine("dense31b", "skip"), "--out", out)
    assert (done.code, done.out) == (2, "")
    assert done.error == f"error: {out}: exists and is not empty"
    assert "--overwrite" in done.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_destination_that_is_not_a_folder(run: Cli, pristine: Make, tmp_path: Path, overwrite: list[str]) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    done = run("repair", pristine("dense31b", "skip"), "--out", out, *overwrite)
    assert (done.code, done.out) == (2, "")
    assert done.error == f"error: {out}: exists and is not a folder"
    assert out.read_text() == "mine"


def test_a_destination_that_is_a_link_to_itself(run: Cli, pristine: Make, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    before = snapshot(tmp_path)
    for out in (tmp_path / "loop", tmp_path / "loop" / "out"):
        done = run("repair", pristine("dense31b", "skip"), "--out", out)
        assert (done.code, done.out) == (2, "") and done.error.startswith(f"error: {tmp_path}/loop: ")
    done = run("scan", pristine("dense31b", "skip"), "--format", "json", "--output", tmp_path / "loop")
    assert done.code == 2 and done.error == f"error: {tmp_path}/loop: is a link to itself"
    assert snapshot(tmp_path) == before


def test_a_broken_source_leaves_an_old_destination_unchanged_even_with_overwrite(
    run: Cli, checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("dense31b", "skip")
    state(blocksize=128)(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    before = snapshot(tmp_path)
    assert run("repair", source, "--out", tmp_path / "out", "--overwrite").code == 2
    assert snapshot(tmp_path) == before


def test_too_little_room_on_the_disk(
    run: Cli, checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("dense31b", "skip")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 12345, 12345))
    done = refuses(run, "repair", source, tmp_path)
    assert done.out == ""
    assert done.error.startswith(f"error: {tmp_path / 'out'}: not enough disk: ")
    assert done.error.endswith(" bytes are needed, 12,345 are free")


def test_a_scan_needs_no_room_on_the_disk(run: Cli, pristine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    done = run("scan", pristine("dense31b", "skip"))
    assert (done.code, done.err) == (1, "")


# Paths that are not a checkpoint


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_does_not_exist(run: Cli, tmp_path: Path, command: str) -> None:
    done = refuses(run, command, tmp_path / "nowhere", tmp_path)
    assert (done.out, done.error) == ("", f"error: {tmp_path / 'nowhere'}: no such folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_of_a_file(run: Cli, checkpoint: Make, tmp_path: Path, command: str) -> None:
    shard = checkpoint("dense31b", "skip") / SHARD
    done = refuses(run, command, shard, tmp_path)
    assert (done.out, done.error) == ("", f"error: {shard}: is a file; name the folder it is in")


def gptq(source: Path) -> None:
    config("quantization_config", to={"quant_method": "gptq", "bits": 4, "group_size": 128})(source)


def mamba(source: Path) -> None:
    config("architectures", to=["MambaForCausalLM"])(source)
    config("model_type", to="mamba")(source)


def no_weights(source: Path) -> None:
    (source / SHARD).unlink()


def adapter(source: Path) -> None:
    (source / "config.json").unlink()
    (source / SHARD).rename(source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("quant", "damage", "words"),
    [
        ("bf16", lambda source: None, "is an unquantized Gemma4ForConditionalGeneration; there is nothing to check"),
        ("bf16", gptq, "is a Gemma4ForConditionalGeneration quantized with gptq, not bitsandbytes"),
        ("bf16", mamba, "is an unquantized MambaForCausalLM; there is nothing to check"),
        ("skip", mamba, "is a MambaForCausalLM, which bnbfix does not know"),
        ("skip", adapter, "is a PEFT adapter, not a model; merge it first"),
        ("skip", no_weights, "has no safetensors files"),
    ],
    ids=["bf16", "gptq", "mamba", "mamba in bnb", "adapter", "no weights"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_here_to_check(
    run: Cli, checkpoint: Make, tmp_path: Path, command: str, quant: str, damage: Damage, words: str
) -> None:
    source = checkpoint("dense31b", quant)
    damage(source)
    done = refuses(run, command, source, tmp_path, code=3)
    assert done.out == ""
    assert done.error.endswith(words)
    assert run("scan", source, "--exit-zero").code == 3


# In a process of its own, as users run it


def test_a_process_ends_with_the_same_line_and_code(run: Cli, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("dense31b", "skip")
    state(nested_offset=float("nan"))(source)
    done = refuses(process, "repair", source, tmp_path)
    assert done.error == refuses(run, "repair", source, tmp_path).error
    done = process("scan", source)
    assert done.code == 2 and "BNB201" in done.out and W in done.error
