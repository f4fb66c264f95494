"""Checks before the training that need the text or the model itself, not the options alone."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from app.runs.launch import WORLD_SIZE
from app.training.arguments import compute_dtype
from app.training.data import TrainingData
from app.training.options import ModelOptions
from longlora_ext.independence import check_documents_apart


def check_training(args: TrainingArguments, data: TrainingData, options: ModelOptions) -> None:
    """Raise `ValueError` if there would be nothing to learn, or not a step to do."""
    data.train.check_rows(data.rows)
    if args.eval_strategy != "no" and not len(data.eval_rows):
        strategy = args.to_dict()["eval_strategy"]
        raise ValueError(
            f"--eval_strategy {strategy} has nothing to evaluate on, as none of so little text is held out: give "
            "--eval_file"
        )
    batch = args.per_device_train_batch_size * (WORLD_SIZE // options.sequence_parallel_size)
    if args.dataloader_drop_last and len(data.rows) < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: {len(data.rows)} sequences are no batch of {batch}"
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
