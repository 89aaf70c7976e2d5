"""The errors as one tree. Each type has the exit code that the command line ends with.

BnbfixError                  2
├── UsageError               2   an option, a path or a combination of them makes no sense
├── InputError               2   the checkpoint cannot be read as it stands: missing, broken, inconsistent
│   ├── HeaderError          2   a safetensors header is not what the format allows
│   └── QuantStateError      2   a quantized weight and its quant state contradict each other
├── NotApplicable            3   nothing here to check: not a bitsandbytes checkpoint of a known model
├── FindingsRemain           1   a check before upload found why the checkpoint does not load
├── Unrepairable             1   findings remain that no edit of the files can repair for this target
├── VerifyError              1   an output differs from what its plan says
├── EngineError              2   the installed vLLM gives no answer
├── HubError                 2   the Hub refuses, cannot be reached, or sends something other than announced
└── OutputError              2   the output cannot be written: exists, no space, I/O error
"""

from __future__ import annotations

from typing import Any


class BnbfixError(Exception):
    """Base of every error that bnbfix raises on purpose.

    `where` names the file, and the tensor if there is one; `hint` says what to do next, and `command` is a command line
    that does it. Where that is only an option, such as "--overwrite", it is for the command that failed. Every error
    can be pickled: each subclass can be made of its message only, and attributes are restored after that.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, command: str | None = None
    ) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where
        self.hint = hint
        self.command = command


class UsageError(BnbfixError):
    """An option or a path makes no sense."""


class InputError(BnbfixError):
    """The checkpoint is missing something, or something in it is broken."""


class HeaderError(InputError):
    """A safetensors header breaks the format's rules."""


class QuantStateError(InputError):
    """A quantized weight and its quant state contradict each other."""


class NotApplicable(BnbfixError):
    """There is no bitsandbytes checkpoint of a known model."""

    exit_code = 3


class FindingsRemain(BnbfixError):
    """A checkpoint should not be uploaded; `findings` says why."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        findings: tuple[Any, ...] = (),
        *,
        where: str | None = None,
        hint: str | None = None,
        command: str | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint, command=command)
        self.findings = findings  # bnbfix.Finding, a layer above this one


class Unrepairable(BnbfixError):
    """The checkpoint cannot be made to load in the target."""

    exit_code = 1


class VerifyError(BnbfixError):
    """An output differs from what its plan says."""

    exit_code = 1


class EngineError(BnbfixError):
    """The installed vLLM gave no answer: it took too long, was killed, or the machine is too small."""


class HubError(BnbfixError):
    """The Hub refuses, cannot be reached, or sends something other than announced."""


class OutputError(BnbfixError):
    """The output cannot be written."""
