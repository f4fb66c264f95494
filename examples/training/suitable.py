"""Whether a text and a plan fit together: refused here, before anything is computed, or not at all."""

from __future__ import annotations

from transformers import TrainingArguments

from inputs.packed import PackedSequences
from inputs.samples import SampleRows
from runs.launch import WORLD_SIZE


def check_training(args: TrainingArguments, sequences: PackedSequences | SampleRows) -> None:
    """Raise `ValueError` if there would be nothing to learn, or not a step to do."""
    if not sequences.targets:
        raise ValueError(f"there is nothing to learn from {sequences.tokens} tokens, none with another before it")
    if isinstance(sequences, PackedSequences) and sequences.tokens < sequences.context_length:
        raise ValueError(
            f"the context of {sequences.context_length:,} tokens is longer than the whole text of "
            f"{sequences.tokens:,}: there is nothing so long to learn from"
        )
    batch = args.per_device_train_batch_size * WORLD_SIZE
    if args.dataloader_drop_last and len(sequences) < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: {len(sequences)} sequences are no batch of {batch}"
        )
