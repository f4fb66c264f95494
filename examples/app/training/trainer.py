"""The Trainer of a run: what measures, marks and stops it, and where it begins."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from app.runs.checkpoints import CompletionMarker, take_over_rotation
from app.runs.run import Run
from app.training.data import TrainingData
from app.training.measure import Measurement
from app.training.options import ModelOptions
from app.training.retrieval_guard import RetrievalGuard
from app.training.shared_memory import KeepNoName
from app.training.shared_sequences import trainer_of
from app.training.stop_at_nan import StopAtNaN
from longlora_ext.data import pad_rows


def make_trainer(
    model: PreTrainedModel | PeftModel,
    data: TrainingData,
    options: ModelOptions,
    args: TrainingArguments,
    steps: int,
    run: Run,
    measurement: Measurement | None,
    guard: RetrievalGuard | None,
    *further: TrainerCallback | None,
) -> Trainer:
    """The Trainer, whose checkpoints say what a run must know to go on from them.

    Args:
        model: As it is trained.
        data: What on.
        options: Whether processes share sequences.
        args: The Trainer's arguments. The limit for checkpoints is taken out of them.
        steps: Of the whole run.
        run: The run.
        measurement: What measures perplexity, if anything does.
        guard: What asks for pass keys, if anything does.
        further: Other callbacks, which come before these two.
    """

    def to_go_on() -> dict[str, Any]:
        measures = {"perplexity": measurement, "retrieval": guard}
        measured = {name: measure.record for name, measure in measures.items() if measure}
        return {"resumable": not args.save_only_model, "settings": run.settings, **measured}

    marker = CompletionMarker(take_over_rotation(args), to_go_on)
    rows: torch.utils.data.Dataset[Any] = data.rows
    if 0 < steps <= run.step:  # resumed at its end, it would do one step too many: of one batch all passes are over
        args.max_steps = steps
        rows = torch.utils.data.Subset(rows, [0] * args.per_device_train_batch_size * args.world_size)
    return trainer_of(options)(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=data.eval_rows,
        data_collator=partial(pad_rows, pad_token_id=data.pad_token_id),
        callbacks=[KeepNoName(), StopAtNaN(), marker, *filter(None, (*further, measurement, guard))],
    )
