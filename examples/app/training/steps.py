"""How many steps a run has, and what of its recipe depends on that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from app.runs.command_line import is_given
from app.training.options import TrainingOptions
from app.training.recipe import for_steps


def left_open(names: Sequence[str], argv: Sequence[str], args: TrainingOptions) -> tuple[str, ...]:
    """Those of these options that the steps decide once they are counted."""
    deepspeed = args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin else {}
    given = {name for name in names if is_given(argv, name)}
    given |= {"warmup_steps"} if is_given(argv, "warmup_ratio") else set()  # what older versions of transformers have
    # An optimizer or a schedule of DeepSpeed's has been told the rate by now.
    given |= {"learning_rate"} if {"optimizer", "scheduler"} & deepspeed.keys() else set()
    return tuple(name for name in names if name not in given)


def steps_of(args: TrainingArguments, rows: int, shared: int) -> int:
    """The steps of a whole run, as the Trainer counts them.

    Args:
        args: The Trainer's arguments.
        rows: Rows of its data.
        shared: How many processes share a sequence.
    """
    if args.max_steps > 0:
        return args.max_steps
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(rows / (args.per_device_train_batch_size * (args.world_size // shared)))
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def fit_to_steps(args: TrainingOptions, steps: int) -> dict[str, Any]:
    """Decide what was left open (`TrainingOptions.by_steps`) because passes over the text had not been counted yet.

    Returns:
        That, as settings of the run.
    """
    decided = {name: value for name, value in for_steps(steps).items() if name in args.by_steps}
    for name, value in decided.items():
        setattr(args, name, value)
    return decided
