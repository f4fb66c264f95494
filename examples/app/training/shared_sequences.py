"""The Trainer of a run: one in which each process has its sequences, or one in which processes share them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedConfig, Trainer

from app.runs.errors import one_clear_error
from app.training.options import ModelOptions
from app.training.step_log import LoggingTrainer, SharedLoggingTrainer
from longlora_ext.parallel import check_sequence_parallel


def check_sharing(config: PreTrainedConfig, size: int, by: str) -> None:
    """End the program if so many processes cannot share the sequences of this model in this way."""
    with one_clear_error(f"--sequence_parallel_size {size} --sequence_parallel {by}: "):
        check_sequence_parallel(config, size, by)


def trainer_of(options: ModelOptions) -> Callable[..., Trainer]:
    """What makes the Trainer, given what every Trainer is given."""
    size = options.sequence_parallel_size
    if size == 1:
        return LoggingTrainer
    return partial(SharedLoggingTrainer, sequence_parallel_size=size, by=options.sequence_parallel)
