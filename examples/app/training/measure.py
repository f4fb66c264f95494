"""What the training changed: the perplexity of held-out text at the old context and beyond, in three rows.

`before` is the model as it came, `scaling only` the same weights with the new RoPE, `after` the trained
model; all with dense attention, as the model is used later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, TrainingArguments

from app.evaluation.perplexity import fingerprint, sliding_window_perplexity
from app.runs.json_files import write_json
from app.runs.launch import say
from app.runs.run import Run
from app.runs.wording import counted
from app.training.before_training import AFTER, BEFORE, SCALED, BeforeTraining
from app.training.data import TrainingData
from app.training.options import EVAL_TOKENS
from longlora_ext._processes import is_first_process
from longlora_ext.config import context_length


def lengths_to_measure(base: int, context: int) -> list[int]:
    """The old context, doubled until the new one, which is always the last; the new one alone if it is not
    longer."""
    doublings = []
    while base < context:
        doublings.append(base)
        base *= 2
    return [*doublings, context]


class Measurement(BeforeTraining):
    """Measures before the first step and after the last, and keeps the results in `perplexity.json`.

    Args:
        folder: The run's output folder.
        base_config: The config before the extension.
        config: The extended config.
        documents: Token ids to measure on.
        before: The `record` of the run up to the checkpoint that this one goes on from, if it does. Its rows are kept
            if they were measured likewise.
        labels: What to score of them, as for `sliding_window_perplexity`; None: all.

    Attributes:
        record: How it was measured, and the rows so far: what the file holds.
    """

    what = "perplexity is not measured"

    def __init__(
        self,
        folder: Path,
        base_config: PreTrainedConfig,
        config: PreTrainedConfig,
        documents: list[np.ndarray],
        before: dict[str, Any] | None = None,
        labels: list[np.ndarray] | None = None,
    ) -> None:
        self.file = folder / "perplexity.json"
        self.base_config = base_config
        self.lengths = lengths_to_measure(context_length(base_config), context_length(config))
        self.documents = documents
        self.labels = labels
        self.rows: dict[str, dict[str, float]] = {}
        self.record: dict[str, Any] = {
            "tokens": sum(map(len, documents)),
            "documents": len(documents),
            "sha256": fingerprint([*documents, *(labels or [])]),
            "scored": "all" if labels is None else "answers",
            "attention": "dense",
            "stride": "half the context",
            "lengths": self.lengths,
            "perplexity": self.rows,
        }
        if before and {**before, "perplexity": self.rows} == self.record:
            self.rows |= {
                row: {length: float(value) for length, value in values.items()}
                for row, values in before["perplexity"].items()
            }
        elif before:
            say("note: the perplexities before training were measured on other text: the table will be without them")

    def measure_scaled(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        """Measure it where there is more than one length. Collective."""
        if len(self.lengths) > 1:
            self.measure(model, args, SCALED)

    def measure(self, model: torch.nn.Module, args: TrainingArguments, row: str) -> None:
        """Measure one row. Collective."""
        say(f"measuring perplexity: {row}")
        self.rows[row] = {
            str(length): sliding_window_perplexity(
                model, self.documents, length, stride=length // 2, labels=self.labels, device=args.device
            )
            for length in self.lengths
        }
        if is_first_process():
            write_json(self.file, self.record)

    def table(self) -> str:
        """The results as text."""
        tokens, documents = self.record["tokens"], self.record["documents"]
        what = f"{tokens:,} held-out tokens in {counted(documents, 'document')}"
        if self.labels is not None:
            what = f"the answers in {counted(documents, 'held-out sample')} of {tokens:,} tokens"
        title = f"perplexity of {what} ({{attention}} attention, sliding window, stride {{stride}})"
        header = f"{'context':<14}" + "".join(f"{length:>10,}" for length in self.lengths)
        lines = [title.format(**self.record), "", header]
        for row in (BEFORE, SCALED, AFTER):
            if row in self.rows:
                values = (self.rows[row][str(length)] for length in self.lengths)
                lines.append(f"{row:<14}" + "".join(f"{value:>10.2f}" for value in values))
        return "\n".join(lines) + "\n"


def make_measurement(
    data: TrainingData, tokens: int | None, base_config: PreTrainedConfig, config: PreTrainedConfig, run: Run
) -> Measurement | None:
    """What measures the held-out part of a run's text, if there is anything to measure.

    Args:
        data: The text.
        tokens: How many tokens to measure at most; None: the usual number, or as many as the new context has if these
            are more.
        base_config: The config before the extension.
        config: The extended config.
        run: The run; what was measured up to the checkpoint that it goes on from is kept.
    """
    longest = context_length(config)
    documents, labels = data.held_out.to_measure(max(EVAL_TOKENS, longest) if tokens is None else tokens, longest)
    if not documents:
        return None
    return Measurement(run.folder, base_config, config, documents, run.marker.get("perplexity"), labels)
