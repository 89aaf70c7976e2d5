"""Proves a repair: compares the output with its record, with the source and the plan, and scans it again.

Dequantized tensors are compared with an independent decode (kernels/reference.py), not with the kernels that wrote
them.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import open_checkpoint
from ..checkpoint.source import LocalSource, Progress, Source, as_remote, read_file
from ..engines.engine import Target
from ..engines.targets import resolve_target
from ..errors import BnbfixError, NotApplicable
from ..kernels.packages import require_packages
from ..planner.layout import Copy, Dequantize, MadeWeight, ShardPlan, Split
from ..planner.plan import RECORD, Options, Plan
from ..planner.plan_repair import plan_checkpoint
from ..rules.scan import describe_run, scan_checkpoint
from ..rules.support import describe_dry_load
from ..writer.download import download_files, missing_files, reraise_callback_errors
from ..writer.in_place import BACKUP
from ..writer.record import read_record, was_edited
from ..writer.shard_writer import copied_files, source_files_by_output
from ..writer.source_hashes import SourceHashes
from ..writer.tensor_data import CHUNK_BYTES, copy_range

if TYPE_CHECKING:
    from ..engines.vllm.live import LiveVllm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One difference: the file, the tensor if it is in one, and what differs."""

    file: str
    tensor: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor + ': ' if self.tensor else ''}{self.message}"


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found, and how much it compared."""

    out: Path
    target: str
    problems: tuple[Problem, ...]
    files: int  # hashed
    kept: int  # tensors compared byte for byte with the source
    decoded: int  # weights compared with an independent decode
    source: str | None = None  # the repo that its record names, with the commit
    bf16: bool = False  # everything was dequantized
    in_place: bool = False  # the repair changed files of the user's own folder

    def __repr__(self) -> str:
        compared = f"files={self.files}, kept={self.kept}, decoded={self.decoded}"
        return f"VerifyResult(out={str(self.out)!r}, target={self.target!r}, problems={len(self.problems)}, {compared})"

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, as `bnbfix schema verify` describes it."""
        return describe_run((self.source or "").partition("@")[2] or None) | {
            "out": str(self.out),
            "target": self.target,
            "ok": self.ok,
            "problems": [{"file": p.file, "tensor": p.tensor, "message": p.message} for p in self.problems],
            "files": self.files,
            "kept": self.kept,
            "decoded": self.decoded,
        }


def verify_output(out: Path, source: Source | None, progress: Progress | None = None) -> VerifyResult:
    """See `bnbfix.verify`. `progress` is called with the number of bytes just downloaded or compared."""
    step = progress or (lambda n: None)
    output = LocalSource.open(out)
    doc = read_record(output)
    output = output.with_subfolders()
    target, options = resolve_target(doc["target"]), Options(**doc["options"])
    problems = [Problem(RECORD, None, "was edited")] if was_edited(doc) else []
    problems += _hashes(output, doc["sha256"], set(doc.get("linked", ())), step)
    kept = decoded = 0
    if source is not None:
        plan = plan_checkpoint(source, target, options)
        if plan.nothing_to_do:
            problems.append(Problem(RECORD, None, "the source needs no repair for this target; was it made from it?"))
        else:
            if plan.computes:
                require_packages(f"the repair {plan.computes}, and checking that takes numpy", ["numpy"])
            if (remote := as_remote(source)) is not None:
                with reraise_callback_errors(progress) as download_step:
                    download_files(remote, missing_files(plan), download_step)
            problems += _record_against_plan(doc, plan)
            recorded = {*doc["sha256"], *doc.get("linked", ())}
            if doc.get("in_place"):
                plan = _only_replaced(plan, doc["sha256"])
                recorded = {name for name in recorded if BACKUP not in name}
            copies = copied_files(plan)
            rewritten = {f for name, read in source_files_by_output(plan).items() if name not in copies for f in read}
            with SourceHashes(source, threading.Event()) as hashes:
                hashes.begin(rewritten)
                problems += _against_plan(output, plan, recorded, step)
                hashes.check(rewritten)
            problems += _against_hub(remote.sha256 if remote else {}, plan, doc["sha256"])
            decoded = sum(not isinstance(run[0].op, Copy) for s in plan.shards for run in s.runs())
            kept = sum(t.copied for s in plan.shards for t in s.tensors)
    try:
        problems += _fresh_scan(output, target, options)
    except NotApplicable as e:
        if not problems:
            raise
        problems.append(Problem(e.where or output.name, None, f"cannot be scanned: {e}"))
    logger.info("%s: %d files hashed, %d differences", out, len(doc["sha256"]), len(problems))
    return VerifyResult(
        out,
        target.name,
        tuple(problems),
        files=len(doc["sha256"]),
        kept=kept,
        decoded=decoded,
        source=_recorded_source(doc),
        bf16=options.bf16,
        in_place=bool(doc.get("in_place")),
    )


def _recorded_source(doc: Mapping[str, Any]) -> str | None:
    match doc.get("source"):
        case {"repo": str(repo), "revision": str(revision)}:
            return f"{repo}@{revision}"
    return None


def _hashes(output: Source, expected: dict[str, str], linked: set[str], step: Progress) -> Iterator[Problem]:
    for name in sorted(set(output.files) - set(expected) - linked - {RECORD}):
        yield Problem(name, None, "is not in the record")
    for name in sorted(linked - set(output.files)):
        yield Problem(name, None, "is missing")
    for name, want in expected.items():
        if name not in output.files:
            yield Problem(name, None, "is missing")
            continue
        digest = hashlib.sha256()
        for chunk in copy_range(output, name, 0, output.files[name]):
            digest.update(chunk)
            step(len(chunk))
        if digest.hexdigest() != want:
            yield Problem(name, None, "differs from the hash in the record")


def _record_against_plan(doc: Mapping[str, Any], plan: Plan) -> Iterator[Problem]:
    keys = ("action", "name", "code")  # words may change from version to version
    if [[e.get(k) for k in keys] for e in doc["edits"]] != [[e.to_dict()[k] for k in keys] for e in plan.edits]:
        yield Problem(RECORD, None, "its edits are not those of the plan")


def _only_replaced(plan: Plan, replaced: Container[str]) -> Plan:
    """The plan as a repair in place carries it out: texts that it does not replace, such as the model card, stay."""
    stay = [name for name in plan.texts if name not in replaced and name in plan.checkpoint.source.files]
    texts = {name: text for name, text in plan.texts.items() if name in replaced}
    return replace(plan, texts=texts, copied=(*plan.copied, *stay))


def _against_plan(output: Source, plan: Plan, recorded: set[str], step: Progress) -> Iterator[Problem]:
    source, files = plan.checkpoint.source, output.files
    planned = {s.name for s in plan.shards} | set(plan.texts) | set(plan.copied)
    for name in sorted(planned - set(files) - recorded):  # `_hashes` reports those in the record
        yield Problem(name, None, "is missing")
    for name in sorted((set(files) & recorded) - planned - {RECORD}):
        yield Problem(name, None, "is not in the plan")
    for name, text in plan.texts.items():
        data = text.encode()
        if name in files and (files[name] != len(data) or read_file(output, name) != data):
            yield Problem(name, None, "differs from what the plan writes")
    for name in plan.copied:
        if name not in files:
            continue
        if files[name] != source.files[name]:
            yield Problem(name, None, f"has {files[name]:,} bytes, the source {source.files[name]:,}")
        elif (at := _difference(source, name, 0, output, name, 0, source.files[name])) is not None:
            yield Problem(name, None, f"differs from the source at byte {at:,}")
    for shard in plan.shards:
        if shard.name not in files:
            continue
        if files[shard.name] != shard.size:
            yield Problem(shard.name, None, f"has {files[shard.name]:,} bytes, the plan {shard.size:,}")
        else:
            yield from _shard(output, plan, shard, step)


def _against_hub(listed: Mapping[str, str], plan: Plan, recorded: Mapping[str, str]) -> Iterator[Problem]:
    """Compares what was copied; what was rewritten is compared with files that were compared themselves."""
    for name in sorted(copied_files(plan) & listed.keys() & recorded.keys()):
        if recorded[name] != listed[name]:
            yield Problem(name, None, f"has another SHA-256 than the Hub lists, {listed[name]}")


def _shard(output: Source, plan: Plan, shard: ShardPlan, step: Progress) -> Iterator[Problem]:
    source = plan.checkpoint.source
    if shard.copied:
        if (at := _difference(source, shard.name, 0, output, shard.name, 0, shard.data_start)) is not None:
            yield Problem(shard.name, None, f"its header differs from the source at byte {at:,}")
    elif output.read(shard.name, [(0, len(shard.header))])[0] != shard.header:
        yield Problem(shard.name, None, "its header differs from what the plan writes")
        return
    for run in shard.runs():
        op, first = run[0].op, run[0].info
        at = shard.data_start + first.begin
        if isinstance(op, Copy):
            origin = op.origin
            where = _difference(source, origin.shard, origin.offset, output, shard.name, at, first.nbytes)
            problem = f"differs from {origin.info.name} of the source at byte {where:,}" if where is not None else None
        elif isinstance(op, Dequantize):
            from .compare_weights import compare_dequantized  # here, since it imports numpy

            problem = compare_dequantized(source, op, output, shard.name, at)
        elif isinstance(op, Split):
            from .compare_weights import compare_split

            problem = compare_split(source, op, output, shard.name, at)
        else:
            from .compare_weights import compare_quantized

            problem = compare_quantized(source, op, output, shard.name, at)
        if problem is not None:
            yield Problem(shard.name, op.name if isinstance(op, MadeWeight) else first.name, problem)
        step(sum(t.info.nbytes for t in run))


def _difference(a: Source, file_a: str, at_a: int, b: Source, file_b: str, at_b: int, length: int) -> int | None:
    """The first byte, counted from the start, at which two ranges differ; None where they are equal."""
    for done in range(0, length, CHUNK_BYTES):
        n = min(CHUNK_BYTES, length - done)
        x, y = a.read(file_a, [(at_a + done, n)])[0], b.read(file_b, [(at_b + done, n)])[0]
        if x != y:
            return done + next(i for i in range(n) if x[i] != y[i])
    return None


def _fresh_scan(output: Source, target: Target, options: Options) -> Iterator[Problem]:
    try:
        checkpoint = open_checkpoint(output)
        if options.bf16 or not checkpoint.quantization:
            yield from (
                Problem(w.tensor.shard, w.name, "is quantized") for w in checkpoint.weights.values() if w.quantized
            )
            return
        result = scan_checkpoint(checkpoint, target)
    except NotApplicable:  # its class is known only to the vLLM that the repair was planned with
        raise
    except BnbfixError as e:
        yield Problem(e.where or output.name, None, f"cannot be scanned: {e}")
        return
    for f in result.findings:
        if f.blocking:
            yield Problem(output.name, f.tensors[0] if f.tensors else None, f"{f.code.value}: {f.message}")


def ask_vllm(result: VerifyResult, live: LiveVllm) -> VerifyResult:
    """Adds what a vLLM says against the folder, which is asked to load it without the bytes."""
    (answer,) = live.dry_load([open_checkpoint(LocalSource.open(result.out))])
    hits = [hit for _, hit in describe_dry_load(answer)]
    found = (Problem(str(result.out), next(iter(hit.tensors), None), hit.message) for hit in hits)
    return replace(result, problems=(*result.problems, *found))
