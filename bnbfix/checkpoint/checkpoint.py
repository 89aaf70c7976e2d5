"""A checkpoint as data: config, index, shard headers and quant states, read through a source of byte ranges.

Opening reads headers and the JSON of each quant state, never the weights.
"""

from __future__ import annotations

import json
import ntpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import InputError, NotApplicable, QuantStateError
from . import quant_state as qs
from . import safetensors as st
from .source import LocalSource, Source, read_file
from .stacked_experts import CHECKED, absmax_name, derive_state, is_stack

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # what an unsharded model is called
# What bounds time and memory, an order of magnitude above the largest real ones: 26B with per-expert tensors.
MAX_CONFIG, MAX_JSON = 4_000_000, 64_000_000  # bytes of config.json, of the index
MAX_HEADERS = 100_000_000  # bytes of all headers together
MAX_TENSORS = 500_000
MAX_SKIP = 100_000  # entries of llm_int8_skip_modules; a model of hundreds of layers has hundreds
MAX_SHARDS = 10_000  # a file's name may say anything
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HEADER_GUESS = 128 << 10  # bytes read of a shard before its header's length is known; most headers are shorter
COMPARED_CHUNK = 4 << 20  # bytes of each of two tensors that are compared at a time; of remote ones, once


class Tensor(NamedTuple):
    """A tensor, the shard that has it, and where its bytes start in that file."""

    shard: str
    info: st.TensorInfo
    offset: int

    def read(self, source: Source) -> bytes:
        """Return the tensor's bytes."""
        return source.read(self.shard, [(self.offset, self.info.nbytes)])[0]


class Weight(NamedTuple):
    """A tensor that is not a quant-state tensor, with its quant-state tensors by suffix.

    `state` is its quant state when it is quantized to 4 bits.
    """

    name: str
    tensor: Tensor
    state_tensors: Mapping[str, Tensor]
    state: qs.QuantState | None

    @property
    def int8(self) -> bool:
        """True for an LLM.int8 weight."""
        return self.state is None and ".SCB" in self.state_tensors

    @property
    def quantized(self) -> bool:
        """True if it holds quantized bytes (4 bit, or LLM.int8)."""
        return self.state is not None or self.int8

    @property
    def form(self) -> str:
        """nf4, fp4, int8, or the dtype of an unquantized tensor."""
        return self.state.quant_type if self.state else "int8" if self.int8 else self.tensor.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements, before quantization."""
        return self.state.shape if self.state else self.tensor.info.shape

    def state_tensor_names(self) -> dict[str, str]:
        """Tensor name of each quant-state tensor, by suffix."""
        return {suffix: t.info.name for suffix, t in self.state_tensors.items()}


@dataclass(frozen=True)
class Checkpoint:
    """All that can be known without reading weights."""

    source: Source
    config: Mapping[str, Any]
    config_text: str
    index: Mapping[str, Any] | None
    shards: Mapping[str, st.Header]
    weights: Mapping[str, Weight]
    orphans: Mapping[str, Tensor]  # quant-state tensors that no quantized weight claims
    duplicates: Mapping[str, tuple[str, ...]]  # tensors that several shards have
    damaged: tuple[QuantStateError, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)  # new names of weights, by those in the file
    memory: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)  # what was derived

    @property
    def quantization(self) -> Mapping[str, Any]:
        """quantization_config, or where there is none that of text_config, as vLLM reads it; empty without either."""
        text = self.config.get("text_config")
        value = self.config.get("quantization_config")
        value = value or (text.get("quantization_config") if isinstance(text, dict) else None) or {}
        if not isinstance(value, dict):
            raise InputError("quantization_config is not an object", where=CONFIG)
        return value

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """llm_int8_skip_modules, which names the skip modules of 4-bit checkpoints too."""
        value = self.quantization.get("llm_int8_skip_modules") or []
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise InputError("llm_int8_skip_modules is not a list of names", where=CONFIG)
        if len(value) > MAX_SKIP:
            raise InputError(
                f"llm_int8_skip_modules: {len(value):,} entries exceed the limit of {MAX_SKIP:,}", where=CONFIG
            )
        return tuple(value)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name; of one that several shards have, the one that `open_checkpoint` chose."""
        out = dict(self.orphans)
        for w in self.weights.values():
            out[w.name] = w.tensor
            out |= {name: w.state_tensors[suffix] for suffix, name in w.state_tensor_names().items()}
        return out


def rename_weights(checkpoint: Checkpoint, renames: Mapping[str, str]) -> Checkpoint:
    """The checkpoint as if its weights, with their quant-state tensors, had other names; no byte moves."""
    names = dict(renames)
    for old, new in renames.items():
        suffixes = checkpoint.weights[old].state_tensor_names()
        names |= {name: qs.state_tensor_name(new, suffix) for suffix, name in suffixes.items()}

    def rename(tensor: Tensor) -> Tensor:
        return tensor._replace(info=tensor.info._replace(name=names.get(tensor.info.name, tensor.info.name)))

    shards = {}
    for shard, header in checkpoint.shards.items():
        tensors = (info._replace(name=names.get(name, name)) for name, info in header.tensors.items())
        shards[shard] = header._replace(tensors={info.name: info for info in tensors})
    weights = {}
    for old, w in checkpoint.weights.items():
        states = {suffix: rename(t) for suffix, t in w.state_tensors.items()}
        new = names.get(old, old)
        weights[new] = Weight(new, rename(w.tensor), states, w.state)
    duplicates = {names.get(name, name): shards for name, shards in checkpoint.duplicates.items()}
    return replace(checkpoint, shards=shards, weights=weights, duplicates=duplicates, renamed=renames)


def open_checkpoint(source: Source) -> Checkpoint:
    """Read config, index, headers and quant states.

    An invalid quant state does not raise: it is kept in `damaged`, and its weight counts as unquantized.

    Raises:
        InputError: A file is missing or broken.
        NotApplicable: There are no safetensors files, or it is an adapter.
    """
    if CONFIG not in source.files:
        if "adapter_config.json" in source.files:
            raise NotApplicable("is a PEFT adapter, not a model; merge it first", where=source.name)
        models = source.find_models() if isinstance(source, LocalSource) else []
        hint = f"Is it one of these? {', '.join(models[:3])}" if models else f"Is {source.name} a model folder?"
        raise InputError("is missing", where=CONFIG, hint=hint)
    config_text, config = _read_json(source, CONFIG)
    index = _read_json(source, INDEX)[1] if INDEX in source.files else None
    names = _shard_names(source, index)
    shards = _headers(source, names)
    tensors, duplicates = _choose_tensors(shards, weight_map(index) if index else {})
    weights, orphans, damaged = _group_weights(source, tensors, config)
    return Checkpoint(source, config, config_text, index, shards, weights, orphans, duplicates, damaged)


def reopen_checkpoint(checkpoint: Checkpoint, source: Source) -> Checkpoint:
    """`open_checkpoint` of a source with the same shards, of which only the config and the index are read.

    Raises InputError as that does.
    """
    if any(is_stack(w.tensor.info) for w in checkpoint.weights.values()):
        return open_checkpoint(source)  # what such a weight is depends on the config
    config_text, config = _read_json(source, CONFIG)
    index = _read_json(source, INDEX)[1] if INDEX in source.files else None
    return replace(checkpoint, source=source, config=config, config_text=config_text, index=index)


def compare_bytes(source: Source, one: Tensor, other: Tensor) -> bool | None:
    """Return True if two tensors of one size have the same bytes, False if not.

    None when the source is remote, they are larger than COMPARED_CHUNK, and their first bytes are the same.
    """
    size = one.info.nbytes if source.origin is None else min(one.info.nbytes, COMPARED_CHUNK)
    for at in range(0, size, COMPARED_CHUNK):
        length = min(COMPARED_CHUNK, size - at)
        first, second = (source.read(t.shard, [(t.offset + at, length)]) for t in (one, other))
        if first != second:
            return False
    return True if size == one.info.nbytes else None


def weight_map(index: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the shard of every tensor as the index has it; raises InputError for a map of anything else."""
    value = index.get("weight_map")
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) for v in value.values()):
        raise InputError("weight_map must map tensor names to file names", where=INDEX)
    return value


def _read_json(source: Source, name: str) -> tuple[str, dict[str, Any]]:
    size, limit = source.files[name], MAX_CONFIG if name == CONFIG else MAX_JSON
    if size > limit:
        raise InputError(f"its {size:,} bytes exceed the limit of {limit:,}", where=name)
    try:
        raw = read_file(source, name)
        check_not_pointer(raw, name)
        text = raw.decode("utf-8")
        doc = json.loads(text)
        if "\\ud" in text.lower():  # it may spell half a surrogate pair, which no file can be written with
            json.dumps(doc, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise InputError(f"is not valid JSON ({e})", where=name) from e
    if not isinstance(doc, dict):
        raise InputError("is not a JSON object", where=name)
    return text, doc


def _shard_names(source: Source, index: Mapping[str, Any] | None) -> list[str]:
    """The files that vLLM reads: those the index names, or without one every *.safetensors next to the config."""
    if index is None:
        names = [f for f in source.files if f.endswith(".safetensors") and "/" not in f]
        if not names:
            raise NotApplicable("has no safetensors files", where=source.name)
        _check_numbers(names, source.name)
        return names
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if name != ntpath.basename(name) or name in ("", ".", "..") or "\0" in name:  # drives and \\hosts are not names
            raise InputError(f"weight_map names {name!r}, which is not a file next to it", where=INDEX)
        if name not in source.files:
            hint = "Download or copy the checkpoint again."
            if SINGLE in source.files:
                hint = f"If {SINGLE} is the whole model, delete {INDEX}, which is of an older one. Otherwise: {hint}"
            raise InputError(f"shard {name} is missing; the index names it", where=source.name, hint=hint)
    return names


def _check_numbers(names: Sequence[str], where: str) -> None:
    """Raise InputError when files that number themselves as `model-00001-of-00002.safetensors` are not all there."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if m := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name):
            sets.setdefault((m[1], int(m[3])), set()).add(int(m[2]))
    for (stem, count), numbers in sets.items():
        if len(numbers) < count <= MAX_SHARDS:
            missing = next(n for n in range(1, count + 1) if n not in numbers)
            raise InputError(
                f"shard {stem}-{missing:05}-of-{count:05}.safetensors is missing; the others say so by their names",
                where=where,
                hint="Download or copy the checkpoint again.",
            )


def check_not_pointer(start: bytes, where: str) -> None:
    """Raise InputError when a file begins like a Git LFS pointer, which is there in place of the file itself."""
    if start.startswith(LFS_POINTER):
        hint = "Run `git lfs pull` in the clone, or download the repo with `hf download`."
        raise InputError("is a Git LFS pointer, not the file itself", where=where, hint=hint, command="git lfs pull")


def _headers(source: Source, names: Sequence[str]) -> dict[str, st.Header]:
    """The header of every shard, in two rounds of reads at most."""
    sizes = {name: source.files[name] for name in names}
    found = source.read_many({n: [(0, min(HEADER_GUESS, sizes[n]))] for n in names})
    begun = {name: part for name, (part,) in found.items()}
    for name, part in begun.items():
        check_not_pointer(part, name)
    ends = {n: st.LENGTH_BYTES + st.header_length(begun[n][: st.LENGTH_BYTES], sizes[n], n) for n in names}
    if (total := sum(ends.values())) > MAX_HEADERS:
        raise InputError(f"its {total:,} bytes of headers exceed the limit of {MAX_HEADERS:,}", where=source.name)
    rest = {n: [(len(begun[n]), ends[n] - len(begun[n]))] for n in names if ends[n] > len(begun[n])}
    for name, (part,) in source.read_many(rest).items():
        begun[name] += part
    out = {n: st.parse_header(begun[n][st.LENGTH_BYTES : ends[n]], sizes[n], n) for n in names}
    if (count := sum(len(h.tensors) for h in out.values())) > MAX_TENSORS:
        raise InputError(f"its {count:,} tensors exceed the limit of {MAX_TENSORS:,}", where=source.name)
    return out


def _choose_tensors(
    shards: Mapping[str, st.Header], named: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Return every tensor by name, and the shards of those that several shards have."""
    found: dict[str, list[Tensor]] = {}
    for shard, header in shards.items():
        for info in header.tensors.values():
            found.setdefault(info.name, []).append(Tensor(shard, info, header.data_start + info.begin))
    missing = sorted(set(named) - set(found))
    if missing:
        raise InputError(
            f"the index names tensor {missing[0]!r} in {named[missing[0]]}, no shard has it"
            + (f" ({len(missing)} such tensors)" if len(missing) > 1 else ""),
            where=INDEX,
        )
    # Of a tensor in several shards, take the one the index names: it is what its author meant.
    chosen = {n: next((t for t in ts if t.shard == named.get(n)), ts[-1]) for n, ts in found.items()}
    return chosen, {n: tuple(t.shard for t in ts) for n, ts in found.items() if len(ts) > 1}


def _group_weights(
    source: Source, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Weight], dict[str, Tensor], tuple[QuantStateError, ...]]:
    """Return weights by name, quant-state tensors that no quantized weight claims, and what is wrong with others."""
    state_tensors: dict[str, dict[str, Tensor]] = {}
    bases: dict[str, Tensor] = {}
    for name, found in tensors.items():
        if (split := qs.split_state_tensor(name)) is not None:
            state_tensors.setdefault(split[0], {})[split[1]] = found
        else:
            bases[name] = found
    raw = _read_states(source, state_tensors)
    weights: dict[str, Weight] = {}
    orphans: dict[str, Tensor] = {}
    damaged: list[QuantStateError] = []
    stacks = {n: t for n, t in bases.items() if is_stack(t.info) and n not in state_tensors}
    scales = {name: bases.pop(absmax_name(name), None) for name in stacks}
    starts = _read_starts(source, stacks)
    for name in sorted(set(bases) | set(state_tensors)):
        own, state = state_tensors.get(name, {}), None
        t = bases.get(name)
        if t is not None:
            try:
                if name in stacks:
                    info = absmax.info if (absmax := scales[name]) else None
                    state = derive_state(t.info, info, starts[name], config, f"{t.shard}: {name}")
                    own = {".absmax": absmax} if absmax else {}
                else:
                    state = _check_state(name, t, own, raw)
            except QuantStateError as e:
                damaged.append(e)
        if t is None or (state is None and not qs.is_int8(own)):
            orphans |= {qs.state_tensor_name(name, suffix): s for suffix, s in own.items()}
            own = {}
        if t is not None:
            weights[name] = Weight(name, t, own, state)
    return weights, orphans, tuple(damaged)


def _check_state(
    name: str, t: Tensor, own: Mapping[str, Tensor], raw: Mapping[tuple[str, str], bytes]
) -> qs.QuantState | None:
    """Return the checked quant state of a weight, None for an unquantized or LLM.int8 one; raises QuantStateError."""
    where = f"{t.shard}: {name}"
    if qs.is_int8(own):
        qs.check_int8_state(t.info, {k: v.info for k, v in own.items()}, where)
        if qs.WEIGHT_FORMAT in own:
            qs.check_weight_format(raw[name, qs.WEIGHT_FORMAT], where)
        return None
    suffix = next((s for s in qs.STATE_SUFFIXES if s in own), None)
    if suffix is None:
        if t.info.dtype in ("U8", "I8"):
            raise QuantStateError("holds quantized bytes, but has no quant state", where=where)
        return None
    if (name, suffix) not in raw:
        raise QuantStateError(f"its quant state has {own[suffix].info.nbytes:,} bytes", where=where)
    state = qs.parse_state(raw[name, suffix], suffix, where)
    if t.info.dtype in qs.DTYPES.values() and t.info.shape == state.shape:
        return None  # an unquantized weight, and stale quant-state tensors
    qs.check_state(state, t.info, {k: v.info for k, v in own.items()}, where)
    return state


def _read_starts(source: Source, stacks: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the first bytes of stacks of experts, all in one call."""
    names: dict[str, list[str]] = {}
    for name, t in stacks.items():
        names.setdefault(t.shard, []).append(name)
    wanted = {s: [(stacks[n].offset, min(CHECKED, stacks[n].info.nbytes)) for n in ns] for s, ns in names.items()}
    found = source.read_many(wanted) if wanted else {}
    return {name: part for shard, parts in found.items() for name, part in zip(names[shard], parts, strict=True)}


def _read_states(source: Source, state_tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[str, str], bytes]:
    """Return the bytes of every quant state's JSON and of every weight_format, by (weight, suffix), all in one call."""
    wanted: dict[str, list[tuple[str, str, Tensor]]] = {}
    for name, own in state_tensors.items():
        for suffix in (*qs.STATE_SUFFIXES, qs.WEIGHT_FORMAT):
            if (t := own.get(suffix)) is not None and t.info.nbytes <= qs.MAX_STATE_JSON:
                wanted.setdefault(t.shard, []).append((name, suffix, t))
    out: dict[tuple[str, str], bytes] = {}
    found = source.read_many({s: [(t.offset, t.info.nbytes) for _, _, t in items] for s, items in wanted.items()})
    for shard, parts in found.items():
        out |= {(name, suffix): part for (name, suffix, _), part in zip(wanted[shard], parts, strict=True)}
    return out
