"""A run whose loss is NaN or infinite stops: no step after that could be of use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from app.runs.checkpoints import complete_checkpoints
from app.runs.launch import fail


class StopAtNaN(TrainerCallback):
    """Looks at each loss that is logged, on every process alike, and has it logged before each checkpoint.

    A checkpoint is written after the log of its step: none holds weights that are NaN.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after the Trainer's own callback, which has decided what is to be saved."""
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logged = logs or {}
        loss, gradient = (float(logged.get(name, 0.0)) for name in ("loss", "grad_norm"))
        # The loss tells of the weights before the step. In fp16 gradients overflow now and then; that step is skipped.
        if not math.isfinite(loss) or (math.isnan(gradient) and not args.fp16):
            what = f"gradient is {gradient}" if math.isfinite(loss) else f"loss is {loss}"
            kept = ", ".join(path.name for path in complete_checkpoints(Path(str(args.output_dir))).values()) or "none"
            fail(
                f"the {what} at step {state.global_step}: the weights of the model are no numbers, or the "
                f"training has diverged (--learning_rate {args.learning_rate:g}). Complete checkpoints: {kept}"
            )
