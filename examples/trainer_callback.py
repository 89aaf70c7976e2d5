"""A callback for transformers' Trainer: stops a checkpoint that vLLM cannot load from leaving the machine.

    trainer = Trainer(..., callbacks=[CheckCheckpoints(vllm="portable")])

It looks at every checkpoint that is saved, before it is pushed too, and stops the run with `bnbfix.FindingsRemain`;
with `stop=False` it warns and goes on. Whatever is not a bitsandbytes checkpoint passes, an adapter for example.

`trainer.push_to_hub()` calls its callbacks before it saves what it pushes. So at the end of a run:

    trainer.save_model()
    bnbfix.check_before_upload(trainer.args.output_dir)
    trainer.push_to_hub()
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import bnbfix


class CheckCheckpoints(TrainerCallback):
    """Checks what a Trainer has saved, for a vLLM release or "portable"."""

    def __init__(self, vllm: str | None = "portable", *, stop: bool = True) -> None:
        self.vllm, self.stop = vllm, stop

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.check(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    on_push_begin = on_save  # a checkpoint is saved, then pushed, and only then is on_save called

    def check(self, folder: Path) -> None:
        """Raises or warns when the checkpoint in a folder would not load."""
        if not folder.is_dir():
            return
        try:
            bnbfix.check_before_upload(folder, vllm=self.vllm)
        except bnbfix.FindingsRemain as e:
            if self.stop:
                raise
            warnings.warn(f"{e}. {e.hint} {e.command}", stacklevel=2)
