"""Sequences shared by several processes: DeepSpeed's Ulysses sequence parallelism, with S2-Attn as its attention.

Each of them holds a part of every sequence; within attention each has all of it, for a part of the heads. So the
activations of a long context are spread over GPUs. The Trainer does nearly all of it, given a `ParallelismConfig`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, Trainer

from app.runs.launch import WORLD_SIZE
from longlora_ext.attention import NAME
from longlora_ext.config import rope_type_of
from longlora_ext.loss import IGNORED_LABEL


def parallelism(processes: int) -> Any:
    """The `ParallelismConfig` of accelerate that has this many processes share each sequence.

    Raises:
        ImportError: accelerate is too old for it.
    """
    try:
        from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
    except ImportError as error:
        raise ImportError("--sequence_parallel_size needs accelerate 1.13 or newer") from error
    how = DeepSpeedSequenceParallelConfig()
    # Its constructor knows the names of transformers' own attentions only. DeepSpeed, which reads it, takes any.
    how.sp_attn_implementation = NAME
    return ParallelismConfig(dp_shard_size=WORLD_SIZE // processes, sp_size=processes, sp_handler=how)


def check_sequence_parallel(config: PreTrainedConfig, context: int, processes: int) -> None:
    """Raise `ValueError` if sequences of `context` tokens of such a model cannot be shared by so many processes."""
    if processes == 1:
        return
    heads: int = config.num_attention_heads
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    rope = rope_type_of(config)
    if heads % processes or (groups % processes and processes % groups):
        raise ValueError(
            f"--sequence_parallel_size {processes} does not divide the model's heads: {heads} query heads, "
            f"{groups} key and value heads"
        )
    if context % processes:
        raise ValueError(f"--sequence_parallel_size {processes} does not divide the context of {context} tokens")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"--sequence_parallel_size is not for --rope_type {rope}: it depends on a sequence's length, of which each "
            "process sees a part"
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
