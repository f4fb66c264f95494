"""What is logged of steps besides their loss: how fast they were, what memory they took, and which attention they saw.

The Trainer hands its log to the console, to the checkpoint and to whatever `--report_to` names.
"""

from __future__ import annotations

import resource
from time import perf_counter
from typing import Any

import torch
from transformers import Trainer

from app.runs.launch import WORLD_SIZE
from longlora_ext.config import attention_mode
from longlora_ext.parallel import SequenceParallelTrainer


class LoggingTrainer(Trainer):
    """A Trainer that adds numbers to the log of each `--logging_steps`.

    - `tokens_per_second`: of all processes, padding included. The time of evaluating and saving is not counted. Rows of
      different lengths (`--rows padded`) are counted as if all processes had those of the first.
    - `peak_memory_gb`: the most that the first process has taken so far: of its GPU, or of the host on a CPU.
    - `dense_attention`: the share of the steps that saw dense attention instead of S2-Attn.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin_counting()

    def _begin_counting(self) -> None:
        self.tokens, self.batches, self.dense_batches, self.began = 0, 0, 0, 0.0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward, counted."""
        if not self.batches:
            self.began = perf_counter()
        self.batches += 1
        self.tokens += inputs["input_ids"].numel()
        inner: Any = self.model  # `model` is what DeepSpeed or DDP made of it
        self.dense_batches += attention_mode(inner.config) == "dense"
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, whose time is none of the steps before and behind it."""
        before, began = self.began, perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.began = before + perf_counter() - began  # not added to: of several sets, it calls itself

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer has to say, and of steps the numbers above."""
        if "loss" in logs and self.batches:
            seconds = perf_counter() - self.began  # the loss was read: a GPU has done what it was given
            logs |= {
                "tokens_per_second": round(self.tokens * WORLD_SIZE / seconds, 1),
                "peak_memory_gb": round(peak_memory(self.args.device) / 1e9, 3),
                "dense_attention": self.dense_batches / self.batches,
            }
            self._begin_counting()
        super().log(logs, *args, **kwargs)


class SharedLoggingTrainer(LoggingTrainer, SequenceParallelTrainer):
    """The same where processes share sequences, each with a part of the tokens."""


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at once: allocated on its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
