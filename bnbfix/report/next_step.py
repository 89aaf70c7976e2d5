"""What to run next, after a scan, a repair, a verification or an error: lines that can be pasted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.checkpoint import CONFIG
from ..engines.engine import DEFAULT, Target
from ..engines.registry import engines
from ..engines.targets import resolve_target
from ..errors import (
    BnbfixError,
    EngineError,
    HubError,
    NotApplicable,
    OutputError,
    QuantStateError,
    Unrepairable,
    UsageError,
    VerifyError,
)
from ..hub.resolve import parse_repo
from ..rules.rule import Code
from .outcome import ScanOutcome
from .text import conclude, escape_control_chars, format_growth

if TYPE_CHECKING:  # a scan needs none of these
    from ..hub.push import Pushed
    from ..planner.choices import Choice
    from ..planner.plan import Plan
    from ..verifier.verify import VerifyResult
    from ..writer.write import RepairResult


COMMANDS = ("scan", "repair", "verify", "fleet", "releases", "explain", "schema")
FLEET_COMMANDS = ("scan", "repair")


class Step(NamedTuple):
    """A few words, and the commands that they announce."""

    words: str
    commands: tuple[str, ...]


def describe_cost(choice: Choice) -> str:
    """`19.1 -> 20.6 GB`, or what changes where no shard does."""
    if choice.nothing_to_do:
        return "as it is"
    if choice.config_only:
        return "only config.json changes"
    return format_growth(choice.before, choice.after)


def repair_commands(model: str, choice: Choice) -> tuple[str, ...]:
    """What carries a choice out, in place where that is enough; where nothing changes, what serves the checkpoint."""
    if choice.nothing_to_do:
        return serve_commands(model, choice.target)
    options = ["--bf16"] if choice.bf16 else ["--vllm", choice.target.name]
    options += ask_again(choice.target, choice.family)
    return (command_line("repair", model, *suggest_place(model, config_only=choice.config_only), *options),)


def ask_again(target: Target, family: str) -> tuple[str, ...]:
    """The options that ask the same vLLM again, where nobody else knows the model's class."""
    known = any(family in r.classes for r in engines()[target.engine].ranges)
    return () if known else target.asking


def suggest_place(model: str, *, config_only: bool) -> tuple[str, ...]:
    """The options that say where a repair goes: in place where that is enough and possible, else next to the model."""
    if config_only and os.path.isdir(model) and not os.path.islink(os.path.join(model, CONFIG)):
        return ("--in-place",)
    return ("--out", suggest_output(model))


def suggest_output(model: str) -> str:
    """A folder for the repaired copy: next to a folder, in the working directory for a repo."""
    repo = parse_repo(model)
    if not os.path.lexists(model) and repo is not None:
        return f"{repo[0].split('/')[1]}-repaired"
    folder = Path(model)
    folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    return str(folder.with_name(f"{folder.name}-repaired"))


def serve_commands(folder: str, target: Target | None) -> tuple[str, ...]:
    """What serves a checkpoint that loads in a target; None for one in full precision, which any vLLM loads."""
    engine = engines()[target.engine if target else DEFAULT]
    packages = engine.serving_packages(target) if target else []
    install = (shell_words("pip", "install", *packages),) if packages else ()
    repo = parse_repo(folder) if not os.path.lexists(folder) else None
    revision = ["--revision", repo[1]] if repo and repo[1] else []
    return (*install, shell_words(*engine.command, repo[0] if repo else folder, *revision))


def command_line(*arguments: str) -> str:
    """A command of bnbfix, quoted for a shell."""
    return shell_words("bnbfix", *arguments)


def shell_words(*words: str) -> str:
    """Words quoted for a shell. Control characters are spelled out, so that what is shown is what is pasted."""
    return escape_control_chars(shlex.join(words))


def after_scan(outcome: ScanOutcome) -> Iterator[Step]:
    """Serve it, repair it, or what else can be done about a model that was scanned."""
    result, choices = outcome.result, outcome.choices
    assert result is not None
    model = result.model  # with the revision of a repo
    if not any(f.blocking for f in result.findings):
        yield Step("Serve it:", serve_commands(model, result.target))
        return
    for choice in choices:
        own = choice.target == result.target
        words = "Repair it" if own else f"Or only for {choice.target.label}"
        if choice is choices[0] and not (own and not choice.bf16):
            words = f"No repair in 4 bits serves {result.target.label}. The nearest is "
            words += "full precision" if choice.bf16 else choice.target.label
        yield Step(f"{words} ({describe_cost(choice)}):", repair_commands(model, choice))
    if not choices and conclude(outcome).fixable:
        options = ["--vllm", result.target.name, *ask_again(result.target, result.family)]
        yield Step("Repair it:", (command_line("repair", model, "--out", suggest_output(model), *options),))
    elif not choices:
        worst = max(result.findings, key=lambda f: (f.blocking and f.reason is not None, f.severity))
        yield Step("No repair is known:", (command_line("explain", worst.code.value),))


def after_plan(plan: Plan, command: str) -> Iterator[Step]:
    """The command that carries a plan out."""
    if plan.nothing_to_do:
        yield Step("Serve it:", serve_commands(plan.checkpoint.source.name, plan.target))
    else:
        yield Step("Repair it:", (command,))


def after_repair(result: RepairResult, pushed: Pushed | None) -> Iterator[Step]:
    """Verify it, and serve it."""
    plan, model, out = result.plan, result.plan.checkpoint.source.name, str(result.out)
    target = None if plan.drops_quantization else plan.target
    if plan.nothing_to_do:
        yield Step("Serve it:", serve_commands(model, plan.target))
    elif result.out is not None:
        source = [] if result.in_place else ["--source", model]
        source += ask_again(plan.target, plan.scan.family)
        yield Step("Verify it:", (command_line("verify", out, *source),))
        yield Step("Serve it:", serve_commands(out, target))
    elif pushed is not None:
        repo = f"{pushed.repo}@{pushed.commit}"
        yield Step("Scan it:", (command_line("scan", repo, "--vllm", plan.target.name),))


def after_verify(result: VerifyResult, source: str | None) -> Iterator[Step]:
    """Serve it; where there are differences, repair the source again."""
    out, model = str(result.out), source or result.source
    if result.ok:
        yield Step("Serve it:", serve_commands(out, None if result.bf16 else resolve_target(result.target)))
    elif model is None or result.in_place:  # a record does not name a folder; and a folder of the user's own stays
        yield Step("Scan it:", (command_line("scan", out, "--vllm", result.target),))
    else:
        options = ["--vllm", result.target, *(["--bf16"] if result.bf16 else [])]
        yield Step("Repair it again:", (command_line("repair", model, "--out", out, "--overwrite", *options),))


def next_command(error: BnbfixError, arguments: Sequence[str]) -> str:
    """What to run after an error: its own command, or one that its type suggests.

    Args:
        arguments: Those of the command that failed.
    """
    if error.command is not None and not error.command.startswith("--"):
        return error.command
    if isinstance(error, NotApplicable) and error.command is not None and "verify" not in arguments[:1]:
        # Asked about other models, a scan also says whether they can be repaired.
        return command_line("scan", *arguments[1:2], error.command)
    if error.command is not None:
        return command_line(*arguments, *shlex.split(error.command))
    match error:
        case QuantStateError():
            return command_line("explain", Code.QUANT_STATE.value)
        case HubError() | EngineError() | OutputError() | VerifyError():
            return command_line(*arguments)
        case UsageError() | NotApplicable() | Unrepairable():
            return command_line(*_command_words(arguments), "--help")
    return command_line(*arguments, "-vv")


def _command_words(arguments: Sequence[str]) -> Sequence[str]:
    """The words that name a command, whose help has its options; none where they name nothing."""
    if not arguments or arguments[0] not in COMMANDS:
        return ()
    return arguments[: 2 if arguments[0] == "fleet" and arguments[1:2] and arguments[1] in FLEET_COMMANDS else 1]
