"""The dense tail: the last steps of a run with dense attention, the one that the model is used with.

The steps before see attention in groups. In the last ones the same operator gets one group of the whole sequence and
shifts no head, so that what was learned in groups settles into dense attention. They cost what dense attention costs.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from app.runs.launch import fail, say


def dense_count(asked: float, steps: int) -> int:
    """How many of a run's steps are dense: `asked` below 1 is a share of them, rounded up, and from 1 on a count."""
    return math.ceil(asked * steps) if asked < 1 else int(asked)


class DenseTail(TrainerCallback):
    """Makes the last steps dense.

    Which ones follows from the number of the step alone, so a run that goes on from a checkpoint does what an
    undisturbed one does. Between steps the config is as it was: what is saved or evaluated there is not concerned.

    Args:
        config: The config that the model's attention layers read.
        asked: `--dense_steps`.

    Attributes:
        first: The first dense step, counting from 1; known when the training begins.
    """

    def __init__(self, config: PreTrainedConfig, asked: float) -> None:
        self.config: Any = config
        self.asked = asked
        self.mode = getattr(config, "s2attn_mode", None) or "auto"
        self.first: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.asked > state.max_steps:
            fail(f"--dense_steps {self.asked:g} is more than the {state.max_steps} steps that there are")
        self.first = state.max_steps - dense_count(self.asked, state.max_steps) + 1
        if state.global_step < self.first <= state.max_steps:
            say(f"dense attention from step {self.first:,} of {state.max_steps:,} on")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called on every process before the first forward pass of a step; `global_step` counts those done."""
        assert self.first is not None
        if state.global_step + 1 >= self.first:
            self.config.s2attn_mode = "dense"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called on every process behind a step, before anything is saved or evaluated."""
        self.config.s2attn_mode = self.mode
