"""A Trainer in which processes share sequences.

    SequenceParallelTrainer(model, args, sequence_parallel_size=4, ...)      # four processes share each sequence

Each process holds a part of a sequence, so that the activations of a long context are spread over GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, Trainer, TrainingArguments

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from longlora_ext._fields import kv_heads
from longlora_ext._per_layer import layer_configs
from longlora_ext.independence import check_documents_apart
from longlora_ext.loss import IGNORED_LABEL
from longlora_ext.parallel._layers import SequenceGroup, check_rope
from longlora_ext.parallel._ulysses import why_not_ulysses

__all__ = ["Cut", "SequenceParallelTrainer", "check_sequence_parallel"]


def check_sequence_parallel(config: PreTrainedConfig, sequence_parallel_size: int, by: str = "auto") -> None:
    """Check that processes can share sequences of a model.

    Args:
        config: The model's config.
        sequence_parallel_size: How many processes share a sequence.
        by: How they attend to what others hold, as for `longlora_ext.parallel.SequenceGroup`.

    Raises:
        ValueError: They cannot: heads are to be divided and do not, or RoPE depends on the length of a sequence.
    """
    size = sequence_parallel_size
    if size == 1:
        return
    check_rope(config)
    for layer in layer_configs(config) if by == "ulysses" else ():
        if reason := why_not_ulysses(layer.num_attention_heads, kv_heads(layer), size):
            raise ValueError(f"sequence_parallel_size {size} with by='ulysses': {reason}; by='halo' has no such limit")


class SequenceParallelTrainer(Trainer):
    """A Trainer in which each `sequence_parallel_size` processes share their sequences.

    Loss and gradients are those of processes that have whole sequences, under DeepSpeed, FSDP or DDP. Evaluation is
    shared as well.

    Args:
        args: As for `Trainer`, like all that are not named here.
        sequence_parallel_size: How many processes share a sequence. It divides their number. Rows that it does not
            divide are filled up.
        by: As for `longlora_ext.parallel.SequenceGroup`.
        kwargs: `data_collator` makes batches of `input_ids`, `labels` and `position_ids`, as
            `longlora_ext.data.pad_rows` does; `compute_metrics` is not for shared sequences.

    Raises:
        ValueError: The size does not divide the number of processes, or an argument is not for shared sequences, or
            the model passes something from token to token beside its attention, as hybrids with Mamba do.
    """

    def __init__(self, *args: Any, sequence_parallel_size: int, by: str = "auto", **kwargs: Any) -> None:
        size = sequence_parallel_size
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        if size < 1 or self.processes % size:
            raise ValueError(
                f"sequence_parallel_size must divide the number of processes, {self.processes}, but it is {size}"
            )
        if not dist.is_initialized():
            raise ValueError("there are no processes to share sequences: start the program by torchrun or deepspeed")
        if kwargs.get("compute_metrics") or kwargs.get("compute_loss_func"):
            raise ValueError("compute_metrics and compute_loss_func are not for sequences that processes share")
        groups = [list(range(first, first + size)) for first in range(0, self.processes, size)]
        # All processes make all groups. Those of one place have the same part of other sequences.
        own, _ = dist.new_subgroups_by_enumeration(groups)
        self.same_place, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in zip(*groups, strict=True)])
        self.sequence_group = SequenceGroup(own, by)
        super().__init__(*args, **kwargs)
        model: Any = self.model
        check_sequence_parallel(model.config.get_text_config(), size, by)
        if size > 1:
            self._check_mixing()
        self.data_collator = Cut(self.data_collator, dist.get_rank(own), size)
        if self.label_smoother is not None or not self.args.average_tokens_across_devices:
            raise ValueError(
                "sequences that processes share are trained without label_smoothing_factor, and with "
                "average_tokens_across_devices"
            )

    def _check_mixing(self) -> None:
        """Raise `ValueError` if the model passes anything from token to token by other means than its attention, which
        alone knows of the other processes: what it passes on does not stop at a document's end."""
        model: Any = self.model
        plugin = self.args.deepspeed_plugin
        if plugin and plugin.zero_stage < 3:
            model.to(self.args.device)  # as DeepSpeed does; else it would compute on the CPU until then
        try:
            with self.accelerator.autocast():
                check_documents_apart(model)
        except ValueError as error:
            raise ValueError(f"the sequences of {type(model).__name__} cannot be shared: {error}") from error

    def get_train_dataloader(self) -> DataLoader:
        """Batches of which each process of a group gets the same, its part of them."""
        return self._shared(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same for evaluation."""
        return self._shared(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same for `predict`."""
        return self._shared(super().get_test_dataloader(test_dataset))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a test set: each process has the logits of its part of a sequence alone.

        Raises:
            ValueError: `args.prediction_loss_only` is not set.
        """
        if not self.args.prediction_loss_only:
            raise ValueError("processes that share sequences predict their loss alone: set prediction_loss_only=True")
        return super().predict(*args, **kwargs)

    def _shared(self, loader: Any) -> DataLoader:
        """To accelerate, a group is to be one process.

        It has each process skip the batches of the others.
        """
        shard = loader.batch_sampler
        if not isinstance(shard, BatchSamplerShard):
            raise ValueError(f"{type(self).__name__} needs a data set with a length, and no dispatch_batches")
        shard.num_processes = self.processes // self.sequence_group.ranks
        shard.process_index = dist.get_rank() // self.sequence_group.ranks
        if shard.num_processes == 1:  # nobody waits for another batch: the last one need not be filled up
            shard.even_batches = False
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Sequences of a step."""
        return super().get_total_train_batch_size(args) // self.sequence_group.ranks

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, of which this process has a part. Collective."""
        shared = self.sequence_group
        shared.layers = 0
        if not model.training:
            inputs = self._without_fillers(inputs)
        inputs = {**inputs, "sequence_group": shared, "use_cache": False}
        if model.training and num_items_in_batch is not None:
            # Counted over all parts: their losses add up as those of any processes do.
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            count = (inputs["shift_labels"] != IGNORED_LABEL).sum()
            dist.all_reduce(count, group=shared.group)
            outputs = model(**inputs, num_items_in_batch=count.clamp(min=1))  # of a row without anything to learn
            part: torch.Tensor = outputs.loss
            whole = part.detach().clone()
            dist.all_reduce(whole, group=shared.group)
            # Gradients are averaged over all processes, and those who share a sequence are to add up theirs.
            loss = whole + (part - part.detach()) * shared.ranks
        self._check_layers()
        return (loss, outputs) if return_outputs else loss

    def _check_layers(self) -> None:
        """Raise `ValueError` if layers saw nothing of what other processes hold, as is the case without attention."""
        model: Any = self.model
        layers, shared = model.config.get_text_config().num_hidden_layers, self.sequence_group.layers
        if shared < layers:
            raise ValueError(
                f"{shared} of the {layers} layers of {type(model).__name__} attend to what other processes hold: its "
                "sequences cannot be shared"
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, in which each sequence counts once."""
        self.gather_function = self._each_sequence
        return super().evaluation_loop(*args, **kwargs)

    def _without_fillers(self, inputs: Any) -> dict[str, torch.Tensor]:
        """A batch in which rows that only fill up the last one, repeated for it, are nothing to learn."""
        if (kept := self._kept()) is None:
            return dict(inputs)
        rows = len(inputs["input_ids"])
        own = max(0, kept - dist.get_rank(self.same_place) * rows)
        labels = inputs["labels"].clone()
        labels[own:] = IGNORED_LABEL
        return {**inputs, "labels": labels, "shift_labels": labels}

    def _kept(self) -> int | None:
        """How many sequences of a batch of all processes are no repetitions, if it is one that was filled up."""
        state = self.accelerator.gradient_state
        return state.remainder if state.end_of_dataloader and state.remainder > 0 else None

    def _each_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """[values of all processes], those of a sequence once, and none of those that fill up the last batch."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.same_place))]
        dist.all_gather(parts, values.contiguous(), group=self.same_place)
        return torch.cat(parts)[: self._kept()]


class Cut:
    """A collator that keeps one process's part of each row, its labels moved by one before.

    Args:
        collate: Makes batches of `input_ids`, `labels` and `position_ids` [rows, tokens].
        rank: Which part.
        ranks: Of how many. Rows that they do not divide are filled up, by a piece of its own without labels.
    """

    def __init__(self, collate: Callable[[Any], Any], rank: int, ranks: int) -> None:
        self.collate, self.rank, self.ranks = collate, rank, ranks

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        """The batch of these rows: `input_ids`, `position_ids`, and `shift_labels`, also as `labels`.

        Raises:
            ValueError: It holds something else that has to be cut, or no positions.
        """
        batch = dict(self.collate(rows))
        mask = batch.pop("attention_mask", None)
        if set(batch) != {"input_ids", "labels", "position_ids"} or not (mask is None or bool(mask.all())):
            raise ValueError(
                "processes share rows of input_ids, labels and position_ids, in which padding has positions of its "
                f"own, but a batch has {', '.join(sorted(batch))}{'' if mask is None else ', and a mask with padding'}"
            )
        missing = -batch["input_ids"].shape[1] % self.ranks
        ids = pad(batch["input_ids"], (0, missing))
        places = torch.cat([batch["position_ids"], torch.arange(missing).expand(len(ids), -1)], dim=1)
        labels = pad(batch["labels"], (0, missing + 1), value=IGNORED_LABEL)[:, 1:]
        ids, places, labels = (x.chunk(self.ranks, dim=1)[self.rank].contiguous() for x in (ids, places, labels))
        return {"input_ids": ids, "position_ids": places, "labels": labels, "shift_labels": labels}
