"""A run whose loss is no number any more stops: nothing that follows could be of use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runs.checkpoints import complete_checkpoints
from runs.launch import fail


class StopAtNaN(TrainerCallback):
    """Looks at each loss that is logged, on every process alike."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            kept = ", ".join(path.name for path in complete_checkpoints(Path(str(args.output_dir))).values()) or "none"
            fail(
                f"the loss is {loss} at step {state.global_step}: the weights of the model are no numbers, or the "
                f"training has diverged (--learning_rate {args.learning_rate:g}). Complete checkpoints: {kept}"
            )
