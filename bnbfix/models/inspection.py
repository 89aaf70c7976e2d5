"""What is known of a checkpoint before any release is asked: its model, and the role of each linear weight.

Made once for a scan or a plan, and handed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint, Weight, compare_bytes
from ..errors import QuantStateError
from .detect import check_applicable
from .family import Model, TensorRole
from .roles import EMBEDDINGS, LINEAR_KINDS, LM_HEAD, canonical, classify_tensor

PEFT_PREFIX = "base_model."
PEFT_PARTS = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")
EXPERTS = ("expert", "expert_linear")


class LinearWeight(NamedTuple):
    """The weight of a linear module, and its role in the model."""

    weight: Weight
    role: TensorRole
    new_name: str | None = None  # of one that is added: a copy of `weight`

    @property
    def name(self) -> str:
        """Its tensor name in the file."""
        return self.new_name or self.weight.name

    @property
    def quantized(self) -> bool:
        return self.weight.quantized


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, its model, and the weights of its linear modules by name."""

    checkpoint: Checkpoint
    model: Model
    linears: tuple[LinearWeight, ...]
    invalid: tuple[QuantStateError, ...]  # quant states that do not describe their weight, or no weight of this model

    @cached_property
    def damaged(self) -> frozenset[str]:
        """Names of the weights whose quant state the file itself contradicts."""
        return _damaged_weights(self.checkpoint)

    @cached_property
    def by_layer(self) -> Mapping[tuple[int, str], LinearWeight]:
        """Attention and MLP weights of the language model, by (layer, part)."""
        return {
            (linear.role.layer, linear.role.part): linear
            for linear in self.linears
            if linear.role.layer is not None
            and linear.role.part is not None
            and linear.role.kind in ("attention", "mlp")
        }

    def canonical(self, name: str) -> str:
        """A tensor name as transformers spells it."""
        return canonical(name)

    @cached_property
    def lm_head(self) -> Weight | None:
        """The weight of lm_head, where the file has one."""
        return self._find_weight(LM_HEAD)

    @cached_property
    def embeddings(self) -> Weight | None:
        """The weight of the token embeddings."""
        return self._find_weight(EMBEDDINGS)

    @cached_property
    def lm_head_is_copy(self) -> bool | None:
        """True if lm_head has the bytes of the embeddings, False if it has not; None if that was not compared."""
        head, embeddings = self.lm_head, self.embeddings
        if head is None or embeddings is None or head.quantized or embeddings.quantized:
            return None
        if head.shape != embeddings.shape:
            return False
        if head.form != embeddings.form:
            return None
        return compare_bytes(self.checkpoint.source, head.tensor, embeddings.tensor)

    def _find_weight(self, spellings: tuple[str, ...]) -> Weight | None:
        return next((w for name in spellings if (w := self.checkpoint.weights.get(name))), None)

    @cached_property
    def adapter_names(self) -> tuple[str, ...]:
        """Tensors with names that PEFT gives; none where all that a file has of PEFT is a prefix before every name."""
        tensors = self.checkpoint.tensors
        text = "\n".join(tensors)  # there may be a hundred thousand names, and almost always none of these
        if not any(part in text for part in (PEFT_PREFIX, *PEFT_PARTS)):
            return ()
        parts = {name for name in tensors if any(part in name for part in PEFT_PARTS)}
        names = tuple(name for name in tensors if name in parts or name.startswith(PEFT_PREFIX))
        return names if parts or len(names) < len(tensors) else ()

    @cached_property
    def canonical_names(self) -> frozenset[str]:
        """Every weight's name as transformers spells it."""
        return frozenset(canonical(name) for name in self.checkpoint.weights)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Reads the config and gives every linear weight its role, once.

    Raises NotApplicable when this is not a bitsandbytes checkpoint of a known family, InputError when its config
    makes no sense.
    """
    if "inspection" not in checkpoint.memory:
        checkpoint.memory["inspection"] = _inspect(checkpoint)
    found: Inspection = checkpoint.memory["inspection"]
    return found


def _inspect(checkpoint: Checkpoint) -> Inspection:
    model = check_applicable(checkpoint)
    linears = tuple(_find_linears(checkpoint))
    return Inspection(checkpoint, model, linears, (*checkpoint.damaged, *_find_wrong_shapes(linears, model)))


def _find_linears(checkpoint: Checkpoint) -> Iterator[LinearWeight]:
    """Quantized weights, and unquantized ones of two dimensions; those with a damaged quant state are neither."""
    damaged = _damaged_weights(checkpoint)
    for weight in checkpoint.weights.values():
        if weight.name in damaged:
            continue
        role = classify_tensor(weight.name)
        if weight.quantized or (role.kind in LINEAR_KINDS and len(weight.tensor.info.shape) == 2):
            yield LinearWeight(weight, role)


def _damaged_weights(checkpoint: Checkpoint) -> frozenset[str]:
    where = {e.where for e in checkpoint.damaged}
    return frozenset(w.name for w in checkpoint.weights.values() if where and f"{w.tensor.shard}: {w.name}" in where)


def _find_wrong_shapes(linears: tuple[LinearWeight, ...], model: Model) -> Iterator[QuantStateError]:
    """Language weights whose quant state gives a shape that the model cannot have, such as a transposed one.

    The number of bytes does not show it: as many values are stored either way.
    """
    width = model.text_config.get("hidden_size")
    for linear in linears:
        side = 0 if linear.role.part in ("o_proj", "down_proj") else 1
        state = linear.weight.state
        if state is None or linear.role.kind not in ("attention", "mlp", *EXPERTS) or type(width) is not int:
            continue
        if len(state.shape) != 2 or state.shape[side] != width:
            which = ("rows", "columns")[side]
            yield QuantStateError(
                f"quant state says shape {list(state.shape)[:8]}; hidden_size asks for {width:,} {which}",
                where=f"{linear.weight.tensor.shard}: {linear.name}",
                hint="config.json or the quant state is wrong; quantize the model again.",
            )
