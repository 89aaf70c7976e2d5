"""What an installed vLLM expects of a model whose class has no profile: its loader is given a tensor at a time.

The tensors are those of the checkpoint, without their bytes; of those that differ in their layers' numbers only, the
first. What a checkpoint lacks, and what stops a load, is left to a dry load of all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ...checkpoint.checkpoint import Checkpoint
from ...models.family import Model
from ..engine import Place, ReleaseRange, Slot
from ..skip_entries import Matches
from .profiles import fill_pattern, find_numbers, find_pattern
from .skip_entries import vllm_skips

Row = tuple[str, str, str, list[int], str | None]  # shard, name, dtype, shape, and the text of a quant state's JSON
QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
REMEMBERED = 8  # models
_ASKED: dict[tuple[Hashable, ReleaseRange], AskedExpectation] = {}


class Fills(NamedTuple):
    """The parts of parameters that a tensor fills, by patterns of their names, and whether its rows are moved."""

    parts: tuple[tuple[str, str], ...]
    reordered: bool


class AskedExpectation:
    """What the vLLM that was asked expects of one model. Names of tensors are the file's, of parameters vLLM's."""

    expert_prefix = None
    refuses_axial_rope = transposed_experts = interleaved_experts = False

    def __init__(self, model: Model, parameters: Mapping[str, Mapping[str, Any]], fills: Mapping[str, Fills]) -> None:
        self.tied = any(model.read(path) is True for path in ("tie_word_embeddings", "text_config.tie_word_embeddings"))
        self._fills = fills  # by the pattern of a tensor's name
        moved = {parameter for found in fills.values() if found.reordered for parameter, _ in found.parts}
        self.parameters = {
            name: Slot(
                name,
                said["prefix"] or name.rpartition(".")[0],
                said["quantized"],
                said["experts"],
                reordered=find_pattern(name) in moved,
            )
            for name, said in parameters.items()
        }

    def basis(self, names: Iterable[str]) -> object:
        """There is nothing else that says the same."""
        return self

    @property
    def skips(self) -> Matches:
        """How vLLM reads skip entries."""
        return vllm_skips

    def place(self, name: str) -> Place | None:
        """Where vLLM puts a tensor; None where it did not say."""
        if (found := self._fills.get(find_pattern(name))) is None:
            return None
        numbers = find_numbers(name)
        parts = tuple((fill_pattern(parameter, numbers), part) for parameter, part in found.parts)
        return Place(parts) if all(parameter in self.parameters for parameter, _ in parts) else None

    def canonical(self, name: str) -> str | None:
        """The name itself, where vLLM reads it."""
        return name if (place := self.place(name)) and place.fills else None

    def ignores(self, name: str) -> bool:
        """Return True if vLLM drops a tensor without a word."""
        return self.place(name) == Place()

    def missing(self, parameter: str, parts: set[str]) -> tuple[str, ...]:
        """Nothing: which tensors it takes to fill a parameter was not asked."""
        return ()

    def rename(self, name: str) -> str | None:
        """Nothing: other names were not tried."""
        return None


def find_asked(model: Model, release: ReleaseRange) -> AskedExpectation | None:
    """What a release said of a model, if it was asked."""
    return _ASKED.get((model.key, release))


def remember(
    model: Model, release: ReleaseRange, questions: Iterable[tuple[str, list[Row]]], answer: Mapping[str, Any]
) -> None:
    """Keeps a worker's answer to the questions about a model, for `find_asked`.

    Raises LookupError, TypeError or ValueError for an answer that makes no sense.
    """
    tries: dict[str, list[Mapping[str, Any]]] = {}
    for (name, _), said in zip(questions, answer["answers"], strict=True):
        tries.setdefault(find_pattern(name), []).append(said)
    fills = {p: found for p, said in tries.items() if (found := _read_tries(said, answer["parameters"])) is not None}
    if len(_ASKED) >= REMEMBERED:
        _ASKED.clear()
    _ASKED[model.key, release] = AskedExpectation(model, answer["parameters"], fills)


def _read_tries(tries: Iterable[Mapping[str, Any]], parameters: Mapping[str, Any]) -> Fills | None:
    """What the first try that did not stop says; None where all of them did."""
    taken = [said for said in tries if "error" not in said]
    if not taken:
        return None
    said = next((said for said in taken if said["fills"]), taken[0])
    parts: dict[str, set[str]] = {}
    for parameter, part in said["parts"]:
        parts.setdefault(parameter, set()).add(part)
    filled = [name for name in said["fills"] if name in parameters]  # others are buffers
    pairs = ((find_pattern(name), part) for name in filled for part in sorted(parts.get(name, {""})))
    return Fills(tuple(pairs), any(said.get("reordered") for said in taken))


def list_questions(checkpoint: Checkpoint) -> Iterator[tuple[str, list[Row]]]:
    """(name, the rows to load): each tensor in full precision, and what may be a linear module's quantized as well."""
    shard, seen = next(iter(checkpoint.shards)), set[str]()
    for name, weight in checkpoint.weights.items():
        if (pattern := find_pattern(name)) not in seen:
            seen.add(pattern)
            shape = list(weight.shape)
            yield name, describe_tensor(shard, name, shape)
            if can_be_quantized(name, shape):
                yield name, describe_quantized(shard, name, shape)


def describe_tensor(shard: str, name: str, shape: list[int]) -> list[Row]:
    """A tensor in full precision, as the worker takes it."""
    return [(shard, name, "BF16", shape, None)]


def describe_quantized(shard: str, name: str, shape: list[int]) -> list[Row]:
    """A tensor quantized to NF4, with its quant-state tensors."""
    count = math.prod(shape)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape})
    return [
        (shard, name, "U8", [(count + 1) // 2, 1], None),
        (shard, name + ".absmax", "F32", [(count + 63) // 64], None),
        (shard, name + ".quant_map", "F32", [16], None),
        (shard, name + ".quant_state.bitsandbytes__nf4", "U8", [len(state)], state),
    ]


def can_be_quantized(name: str, shape: list[int]) -> bool:
    """Return True for what could be the weight of a linear module, and for one expert's."""
    return len(shape) == 2 and name.endswith(".weight")
