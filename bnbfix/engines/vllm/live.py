"""A load without the bytes, asked of an installed vLLM: its own loader is given each tensor's name, dtype and shape.

Any model class works that this vLLM knows. What happens after loading is not seen: values, and the first forward pass.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...checkpoint.checkpoint import CONFIG, INDEX, Checkpoint
from ...checkpoint.safetensors import build_header
from ...errors import EngineError, NotApplicable, UsageError
from ...models.inspection import inspect_checkpoint
from ..engine import Installed, Target
from ..targets import find_range
from .asked import QUANTIZATION, find_asked, list_questions, remember
from .process import Status, run_worker, scratch_folder
from .recorded import expect, find_refusal
from .releases import INSTALL, PLUGIN, VLLM_DISTRIBUTIONS, ranges

SECONDS = 600.0
MAX_MEMORY = 8_000_000_000  # bytes; a 31B takes 1.7 GB
MAX_COMPANION = 64_000_000  # bytes of a file next to the weights: tokenizer.json has 33 MB
COMPANIONS = (".json", ".model", ".txt", ".jinja")  # what config, tokenizer and processor are read from
TENSORS, EXPERIMENTS = "bnbfix-tensors.json", "bnbfix-experiments.json"  # as inside/ reads them
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryLoad:
    """What an installed vLLM does with a checkpoint, up to the first forward pass. Names are the checkpoint's."""

    vllm: str  # its release
    versions: Mapping[str, str | None]
    error: str | None  # the engine's own words
    tensors: tuple[str, ...]  # that the error is about
    requantized: tuple[str, ...]  # unquantized in the file, quantized at load time
    quantized: int  # parameters
    unbound: tuple[str, ...]  # quantized parameters without a quant state, by vLLM's names
    reordered: tuple[str, ...]  # quantized in the file, their elements moved to other places at load time

    @property
    def ok(self) -> bool:
        return self.error is None and not self.requantized and not self.unbound and not self.reordered

    def to_dict(self) -> dict[str, Any]:
        """{vllm, versions, error, tensors, requantized, quantized, unbound, reordered}"""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class LiveVllm:
    """The vLLM of a Python, which is asked in a process of its own.

    Every question raises UsageError when there is no such Python or it has no vLLM, EngineError when no answer comes in
    time or memory, or none that makes sense.
    """

    python: str | None = None  # this one by default
    seconds: float = SECONDS  # for all that is asked at once
    max_memory: int = MAX_MEMORY  # bytes of RAM that vLLM may hold
    status: Status | None = None  # called with what vLLM is doing

    @cached_property
    def installed(self) -> Installed:
        """Its release and its plugin's, from their metadata."""
        with scratch_folder() as scratch:
            (answer,) = run_worker("about", [Path(scratch)], seconds=self.seconds, python=self.python)
        version = next((v for name in VLLM_DISTRIBUTIONS if (v := answer["versions"].get(name))), None)
        if version is None:
            hint = "Name the Python of an environment that has vLLM, or install vLLM next to bnbfix."
            raise UsageError("has no vLLM", where=self.python or sys.executable, hint=hint, command=INSTALL)
        return Installed(version, answer["versions"].get(PLUGIN), answer["versions"].get("transformers"))

    @property
    def target(self) -> Target:
        """It as a target; of a release newer than the table, with the newest row."""
        release = find_range(self.installed.version) or ranges()[-1]
        asking = ("--dry-load", *(("--python", self.python) if self.python else ()))
        return Target(self.installed.version, (release,), self.installed, asking=asking)

    def ask(self, checkpoint: Checkpoint) -> DryLoad:
        """What it does with a checkpoint; where that is wrong, a class that has no profile is asked about as well."""
        (answer,) = self.dry_load([checkpoint])
        if not answer.ok:
            try:
                self.learn(checkpoint)
            except EngineError as e:
                logger.warning("vLLM does not say what it expects: %s", e)
        return answer

    def learn(self, checkpoint: Checkpoint) -> None:
        """Asks what it expects of the model, if its class has no profile: from then on the rules know.

        Not of a mixture of experts: how its class stores them is not seen from outside.
        """
        try:
            model = inspect_checkpoint(checkpoint).model
        except NotApplicable:
            return
        (release,) = self.target.ranges
        if model.moe or find_asked(model, release) or expect(model, release) or find_refusal(model, release):
            return
        questions = list(list_questions(checkpoint))
        with scratch_folder() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            _write_companions(checkpoint, folder)
            config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
            (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": QUANTIZATION}), "utf-8")
            (folder / TENSORS).write_text("[]", "utf-8")
            (folder / EXPERIMENTS).write_text(json.dumps([rows for _, rows in questions]), "utf-8")
            (answer,) = self._run("expect", [folder])
        try:
            if answer["error"] is None and not any(p["experts"] for p in answer["parameters"].values()):
                remember(model, release, questions, answer)
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise EngineError(f"vLLM's answer makes no sense ({e})", where=checkpoint.source.name) from e

    def dry_load(self, checkpoints: Sequence[Checkpoint]) -> list[DryLoad]:
        """What it does with each checkpoint, up to the first forward pass.

        The sources are read like in a scan: headers and quant states, and the small files next to the weights.
        """
        version = self.installed.version
        with scratch_folder() as scratch:
            folders = [Path(scratch) / f"model-{i}" for i in range(len(checkpoints))]
            for checkpoint, folder in zip(checkpoints, folders, strict=True):
                folder.mkdir()
                _write_companions(checkpoint, folder)
                (folder / TENSORS).write_text(json.dumps(list(_list_tensors(checkpoint))), "utf-8")
            answers = self._run("dry_load", folders)
        return [_read_answer(version, a, c) for a, c in zip(answers, checkpoints, strict=True)]

    def _run(self, what: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
        return run_worker(
            what, folders, seconds=self.seconds, python=self.python, max_memory=self.max_memory, status=self.status
        )


def _write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """The files that vLLM reads before the weights; of each shard its header, and a hole in place of the rest."""
    source = checkpoint.source
    for name, size in source.files.items():
        if "/" not in name and name.endswith(COMPANIONS) and size <= MAX_COMPANION and name != INDEX:
            (folder / name).write_bytes(source.read(name, [(0, size)])[0])
    if checkpoint.index is not None:
        weight_map = {name: shard for shard, header in checkpoint.shards.items() for name in header.tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    for shard, header in checkpoint.shards.items():
        raw = build_header(header.tensors.values(), header.metadata)
        with (folder / shard).open("wb") as f:
            f.write(raw)
            f.truncate(len(raw) + sum(info.nbytes for info in header.tensors.values()))


def _list_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str, list[int], str | None]]:
    for shard, header in checkpoint.shards.items():
        for info in header.tensors.values():
            text = None
            if ".quant_state.bitsandbytes__" in info.name:
                raw = checkpoint.source.read(shard, [(header.data_start + info.begin, info.nbytes)])[0]
                text = raw.decode("utf-8", "replace")
            yield shard, info.name, info.dtype, list(info.shape), text


def _read_answer(vllm: str, answer: Mapping[str, Any], checkpoint: Checkpoint) -> DryLoad:
    error = answer["error"]
    try:
        return DryLoad(
            vllm=vllm,
            versions={str(k): v if v is None else str(v) for k, v in answer["versions"].items()},
            error=None if error is None else str(error),
            tensors=_tensors_in(str(error), answer.get("tensor"), checkpoint) if error is not None else (),
            requantized=tuple(sorted(map(str, answer.get("requantized", ())))),
            quantized=int(answer.get("quantized", 0)),
            unbound=tuple(map(str, answer.get("unbound", ()))),
            reordered=tuple(sorted(map(str, answer.get("reordered", ())))),
        )
    except (TypeError, ValueError, OverflowError) as e:
        raise EngineError(f"vLLM's answer makes no sense ({e})", where=checkpoint.source.name) from e


def _tensors_in(error: str, last: object, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors that an error is about: those that it names, else the one that the loader was given last.

    They have the checkpoint's names where it has such a tensor, else vLLM's.
    """
    out: list[str] = []
    for name in re.findall(r"'([\w.]+)'", error):
        found = [n for n in checkpoint.tensors if n == name or n.endswith("." + name)]
        out += found or ([name] if "." in name else [])
    if not out and isinstance(last, str) and last in checkpoint.tensors:
        out.append(last)
    return tuple(dict.fromkeys(out))
