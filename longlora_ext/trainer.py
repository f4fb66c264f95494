"""What a Trainer needs for steps with dense attention, at the end of a training in groups.

    Trainer(model, args, callbacks=[DenseTail(model.config, 0.1)])           # the last tenth of the steps is dense

The steps before attend as the model's config says.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora_ext.config import MODE, attention_mode

__all__ = ["DenseTail", "dense_count"]


def dense_count(share: float, steps: int) -> int:
    """How many of a run's steps are dense: below 1 `share` is a share of them, rounded up, and from 1 on a count."""
    # As it is written: 0.07 of 100 are 7, of which the product of the nearest binary number is a little more.
    return math.ceil(Fraction(str(share)) * steps) if share < 1 else int(share)


class DenseTail(TrainerCallback):
    """Gives the last steps of a run dense attention, the one that the model is used with.

    The steps before see attention in groups. In the last ones the same operator gets one group of the whole sequence
    and shifts no head, so that what was learned in groups settles into dense attention. They cost what dense attention
    costs.

    Which ones follows from the number of the step alone, so a run that goes on from a checkpoint does what an
    undisturbed one does. Between steps the config is as it was: what is saved or evaluated there is not concerned.

    Args:
        config: The config that the model's attention layers read; its `s2attn_mode` is set.
        share: How many steps: a share of them below 1, a count from 1 on (see [`dense_count`]).

    Attributes:
        first: The first dense step, counting from 1; known when the training begins.

    Raises:
        ValueError: `share` is neither a share nor a count, or there are not so many steps, when the training begins.
    """

    def __init__(self, config: PreTrainedConfig, share: float) -> None:
        if not (0 < share < 1 or (share >= 1 and share % 1 == 0)):
            raise ValueError(
                f"dense steps must be a share of all, above 0 and below 1, or a whole number, but they are {share!r}"
            )
        self.config = config
        self.share = share
        self.mode = attention_mode(config)
        self.first: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle which steps are dense. Called on every process."""
        if self.share > state.max_steps:
            raise ValueError(f"{self.share:g} dense steps are more than the {state.max_steps} steps that there are")
        self.first = state.max_steps - dense_count(self.share, state.max_steps) + 1

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called on every process before the first forward pass of a step; `global_step` counts those done."""
        assert self.first is not None
        if state.global_step + 1 >= self.first:
            setattr(self.config, MODE, "dense")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called on every process behind a step, before anything is saved or evaluated."""
        setattr(self.config, MODE, self.mode)
