"""Whether model, text and plan fit together: refused here, before the training, or not at all."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from inputs.packed import PackedSequences
from inputs.samples import SampleRows
from longlora_ext.independence import check_documents_apart
from runs.launch import WORLD_SIZE
from training.arguments import compute_dtype


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


def check_documents(model: torch.nn.Module, args: TrainingArguments, packed: bool) -> None:
    """Raise `ValueError` if the model would mix documents, or tokens with later ones. Collective under ZeRO-3.

    Args:
        model: Prepared for training, but not yet in the hands of DeepSpeed.
        args: How it is going to be trained.
        packed: Whether documents share rows.
    """
    plugin, dtype = args.deepspeed_plugin, compute_dtype(args)
    if plugin and plugin.zero_stage < 3:
        model.to(args.device)  # as DeepSpeed does; else it would compute on the CPU until then
    with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
        check_documents_apart(model, packed=packed)
