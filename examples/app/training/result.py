"""What a run leaves behind when its training is over: the adapter or model, perplexities, the loss curve."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from app.runs.errors import one_clear_error
from app.runs.launch import fail
from app.runs.run import Run
from app.training.before_training import AFTER
from app.training.dense_tail import DenseTail
from app.training.measure import Measurement
from app.training.options import ModelOptions
from app.training.plot import loss_curve
from app.training.retrieval_guard import RetrievalGuard
from longlora_ext._processes import is_first_process, wait_for_all
from longlora_ext.adapter import save_adapter


def save_result(
    run: Run,
    model: PreTrainedModel | PeftModel,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    options: ModelOptions,
    measurement: Measurement | None,
    guard: RetrievalGuard | None,
    tail: DenseTail | None,
    title: str,
) -> Path:
    """Write everything into the run's folder. Collective.

    Args:
        run: The run.
        model: What was trained.
        trainer: What trained it.
        tokenizer: Goes along with the adapter.
        options: Whether there is an adapter, or a model.
        measurement: Measures the trained model, if anything was measured before.
        guard: Asks the trained model for pass keys, if it asked before.
        tail: Knows the first step with dense attention.
        title: Of the loss curve.

    Returns:
        The folder of the adapter, or of the model after full fine-tuning.
    """
    if trainer.state.global_step == 0:
        fail("not a single step was done: there is nothing to save")
    result = run.folder / ("model" if options.full_finetune else "adapter")
    if run.checkpoint and is_first_process() and result.exists():
        # The run was at its end before, or was shorter then. The checkpoint it went on from has all that is needed.
        shutil.rmtree(result)
    wait_for_all()
    with one_clear_error(only=ValueError):  # there are NaN in what was trained
        save_adapter(model, result, tokenizer)
    if measurement:
        measurement.measure(model, trainer.args, AFTER)
    if guard:
        guard.measure(model, trainer.args, AFTER)
    if is_first_process():
        loss_curve(trainer.state.log_history, run.folder / "loss.png", title)
        if measurement:
            (run.folder / "perplexity.txt").write_text(measurement.table())
        first_dense = tail.first if tail else None
        run.record_outcome(result, {"steps": trainer.state.global_step, "first_dense_step": first_dense})
    return result
