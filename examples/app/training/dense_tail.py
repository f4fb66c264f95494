"""The dense tail of a run of the program, which says when it begins (`--dense_steps`)."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from app.runs.launch import fail, say
from longlora_ext import trainer


class DenseTail(trainer.DenseTail):
    """Makes the last steps dense, and says from which on; ends the program if there are not so many."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.share > state.max_steps:
            fail(f"--dense_steps {self.share:g} is more than the {state.max_steps} steps that there are")
        super().on_train_begin(args, state, control, **kwargs)
        if self.first is not None and state.global_step < self.first <= state.max_steps:
            say(f"dense attention from step {self.first:,} of {state.max_steps:,} on")
