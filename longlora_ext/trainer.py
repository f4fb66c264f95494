"""What a Trainer needs for two things beside S2-Attn in groups: steps with dense attention, and shared sequences.

    Trainer(model, args, callbacks=[DenseTail(model.config, 0.1)])           # the last tenth of the steps is dense

    args = TrainingArguments(..., deepspeed="zero3.json")
    args.parallelism_config = sequence_parallelism(4, processes=8)           # four GPUs share each sequence
    UlyssesTrainer(model, args, ...)

Shared sequences are DeepSpeed's Ulysses sequence parallelism, with S2-Attn as its attention. Each process holds a part
of every sequence; within attention each has all of it, for a part of the heads. So the activations of a long context
are spread over GPUs. transformers' Trainer does nearly all of it, given a `ParallelismConfig`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from longlora_ext.attention import NAME
from longlora_ext.config import MODE, attention_mode, rope_type_of
from longlora_ext.loss import IGNORED_LABEL

__all__ = ["DenseTail", "UlyssesTrainer", "check_sequence_parallel", "dense_count", "sequence_parallelism"]


def dense_count(share: float, steps: int) -> int:
    """How many of a run's steps are dense: below 1 `share` is a share of them, rounded up, and from 1 on a count."""
    return math.ceil(share * steps) if share < 1 else int(share)


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


def sequence_parallelism(sequence_parallel_size: int, processes: int) -> Any:
    """The `ParallelismConfig` of accelerate, for `TrainingArguments.parallelism_config`, with S2-Attn as its attention.

    Args:
        sequence_parallel_size: How many processes share each sequence.
        processes: How many there are, a multiple of that.

    Raises:
        ImportError: accelerate is too old for it.
        ValueError: The one does not divide the other.
    """
    try:
        from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
    except ImportError as error:
        raise ImportError("sequence parallelism (--sequence_parallel_size) needs accelerate 1.13 or newer") from error
    if sequence_parallel_size < 1 or processes % sequence_parallel_size:
        raise ValueError(
            f"sequence_parallel_size must divide the number of processes, {processes}, but it is "
            f"{sequence_parallel_size}"
        )
    how = DeepSpeedSequenceParallelConfig()
    # Its constructor knows the names of transformers' own attentions only. DeepSpeed, which reads it, takes any.
    how.sp_attn_implementation = NAME
    return ParallelismConfig(
        dp_shard_size=processes // sequence_parallel_size, sp_size=sequence_parallel_size, sp_handler=how
    )


def check_sequence_parallel(config: PreTrainedConfig, context_length: int, sequence_parallel_size: int) -> None:
    """Check that processes can share sequences of a model.

    Args:
        config: The model's config.
        context_length: Tokens of a sequence.
        sequence_parallel_size: How many processes share it.

    Raises:
        ValueError: They cannot: the heads or the tokens do not divide, or RoPE depends on the length of a sequence.
    """
    size = sequence_parallel_size
    if size == 1:
        return
    heads: int = config.num_attention_heads
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    rope = rope_type_of(config)
    if heads % size or (groups % size and size % groups):
        raise ValueError(
            f"sequence_parallel_size {size} does not divide the model's heads: {heads} query heads, "
            f"{groups} key and value heads"
        )
    if context_length % size:
        raise ValueError(f"sequence_parallel_size {size} does not divide the context of {context_length} tokens")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"sequence_parallel_size {size} is not for --rope_type {rope}: it depends on a sequence's length, of which "
            "each process sees a part"
        )


class UlyssesTrainer(Trainer):
    """A Trainer whose loss and gradients, when processes share a sequence, are those of one that has it all.

    Each sequence of a step counts alike, also the last one of a text, which may be padded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # `compute_loss` averages over one row; the Trainer is to divide by the rows of a step, in all its versions.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss over the whole row, of which this process has a part. Collective in training."""
        if not self.model.training:  # type: ignore[union-attr]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        from deepspeed.runtime.sequence_parallel.parallel_state_sp import get_sequence_parallel_group

        group = get_sequence_parallel_group()
        labels = inputs["shift_labels"]  # the labels, moved by one before the sequence was cut
        count = (labels != IGNORED_LABEL).sum()
        dist.all_reduce(count, group=group)
        count.clamp_(min=1)  # of a row that holds nothing to learn
        outputs = model(**inputs, labels=labels, num_items_in_batch=count)
        part: torch.Tensor = outputs.loss
        whole = part.detach().clone()
        dist.all_reduce(whole, group=group)
        loss = whole + (part - part.detach()) * (1 if self._adds_up() else dist.get_world_size(group))
        return (loss, outputs) if return_outputs else loss

    def _adds_up(self) -> bool:
        """Whether DeepSpeed adds up the gradients of those who share a sequence, or averages them as all others."""
        plugin: Any = self.args.deepspeed_plugin
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        return zero.get("stage") != 3 or not zero.get("reduce_scatter", True)
