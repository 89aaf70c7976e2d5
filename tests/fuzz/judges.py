"""What must hold whatever a file says: the safetensors library, bitsandbytes and simple arithmetic as judges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from bitsandbytes.functional import QuantState
from safetensors import SafetensorError, deserialize

from bnbfix.checkpoint.checkpoint import Checkpoint, Weight
from bnbfix.checkpoint.safetensors import Header, header_length, parse_header
from bnbfix.errors import HeaderError
from bnbfix.planner.plan import Plan

STRICTER = (  # the rules for headers that the library does not have
    "is in the header twice",
    "needs exactly dtype, shape and data_offsets",
    "has an unknown dtype (",  # it takes {"U8": null} for "U8"
    "not a list of sizes",  # from 2**63 to 2**64
    "not [begin, end]",
)


class Disagreement(AssertionError):
    """bnbfix let something pass that a judge refuses, or refuses for no reason that is on the list."""


def library_accepts(content: bytes) -> bool:
    """What the safetensors library says of a whole file."""
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def parse_file(content: bytes) -> Header:
    """The header of a whole file, read as `checkpoint` reads it."""
    n = header_length(content[:8], len(content), "m.safetensors")
    return parse_header(content[8 : 8 + n], len(content), "m.safetensors")


def judge_header(content: bytes) -> str:
    """Holds both parsers against each other on a whole file: "accepted", "refused" by both, or "stricter"."""
    accepted = library_accepts(content)
    try:
        parse_file(content)
    except HeaderError as e:
        if accepted and not any(rule in str(e) for rule in STRICTER):
            raise Disagreement(f"refused though the library accepts it: {e}") from e
        return "stricter" if accepted else "refused"
    if not accepted:
        raise Disagreement("accepted though the library refuses it")
    return "accepted"


def judge_checkpoint(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> None:
    """Every shard is one that the library reads, and every quant state fits its weight, by simple arithmetic."""
    for shard in checkpoint.shards:
        if not library_accepts(files[shard]):
            raise Disagreement(f"{shard} was opened though the library refuses it")
    for weight in checkpoint.weights.values():
        if weight.state is not None:
            judge_state(weight, files)


def judge_state(weight: Weight, files: Mapping[str, bytes]) -> None:
    """The sizes that bitsandbytes' kernels rely on, from the JSON and the tensors themselves."""
    at = weight.state_tensors
    suffix = next(s for s in at if ".quant_state." in s)
    raw = files[at[suffix].shard][at[suffix].offset :][: at[suffix].info.nbytes]
    said = json.loads(raw)
    blocks = math.ceil(math.prod(said["shape"]) / said["blocksize"])
    nested = "nested_blocksize" in said
    want = {
        "quantized": (math.ceil(math.prod(said["shape"]) / 2), weight.tensor.info.nbytes),
        "absmax": (blocks * (1 if nested else 4), at[".absmax"].info.nbytes),
        "map": (16 * 4, at[".quant_map"].info.nbytes),
    }
    if nested:
        outer = math.ceil(blocks / said["nested_blocksize"])
        want["nested"] = (outer * 4, at[".nested_absmax"].info.nbytes)
        want["nested map"] = (256 * 4, at[".nested_quant_map"].info.nbytes)
    for what, (asked, there) in want.items():
        if asked != there:
            raise Disagreement(f"{weight.name}: {what} has {there} bytes, the kernel reads {asked}")
    if not suffix.endswith("__" + said["quant_type"]) or not math.isfinite(said.get("nested_offset", 0.0)):
        raise Disagreement(f"{weight.name}: {suffix} says {said}")


def judge_reading(weight: Weight, parts: Mapping[str, object]) -> None:
    """bitsandbytes reads the same numbers as bnbfix from the quant-state tensors (`parts`: tensors by full name)."""
    theirs, ours = QuantState.from_dict(dict(parts), "cpu"), weight.state
    assert ours is not None
    nested = theirs.state2 if theirs.nested else None
    same = (
        (theirs.quant_type, theirs.blocksize, tuple(theirs.shape)) == (ours.quant_type, ours.blocksize, ours.shape)
        and str(theirs.dtype) == f"torch.{ours.dtype}"
        and (nested and nested.blocksize) == (ours.nested and ours.nested.blocksize)
    )
    if not same:
        raise Disagreement(f"{weight.name}: bitsandbytes reads {vars(theirs)}, bnbfix {ours}")


def judge_plan(plan: Plan, files: Mapping[str, bytes]) -> None:
    """Every header and text that would be written is one that others read; the files keep to their names."""
    for shard in plan.shards:
        content = files[shard.name] if shard.copied else shard.header + bytes(shard.size - len(shard.header))
        if not library_accepts(content):
            raise Disagreement(f"the plan's {shard.name} is refused by the library")
    for name, text in plan.texts.items():
        if name.endswith(".json") and not isinstance(json.loads(text.encode()), dict):
            raise Disagreement(f"the plan's {name} is not an object")
    names = [*(s.name for s in plan.shards), *plan.texts, *plan.copied]
    if len(set(names)) != len(names):
        raise Disagreement("the plan writes a file twice")
