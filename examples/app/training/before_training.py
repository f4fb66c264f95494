"""What is measured of a model before it is trained, as it came: with the RoPE of its old config.

All rows are measured on the one model that is trained. For the first, its rotary embedding is exchanged meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from app.runs.launch import say

BEFORE, SCALED, AFTER = "before", "scaling only", "after"


class BeforeTraining(TrainerCallback):
    """Measures before the first step of a run, not where it goes on.

    Attributes:
        base_config: The config before the extension.
        what: What is not done where the model cannot be made what it was, in words.
    """

    base_config: PreTrainedConfig
    what: str

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Called on every process when the model is ready for its first step, or its next one after an
        interruption."""
        assert model is not None
        if state.global_step > 0:
            return
        if reason := why_not_before(model, self.base_config):
            say(f"note: {self.what} before RoPE is scaled: {reason}")
        else:
            with old_rotary_embedding(model, self.base_config):
                self.measure(model, args, BEFORE)
        self.measure_scaled(model, args)

    def measure(self, model: torch.nn.Module, args: TrainingArguments, row: str) -> None:
        """Measure one row. Collective."""
        raise NotImplementedError

    def measure_scaled(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        """Measure what scaling alone does, where that is asked. Collective."""


def why_not_before(model: torch.nn.Module, base_config: PreTrainedConfig) -> str | None:
    """Why `old_rotary_embedding` does not make a model what it was, in words; `None` if it does."""
    rotate = [path for path, module in model.named_modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if other := next((path for path in rotate if not path.endswith("rotary_emb") or len(rotate) > 1), None):
        return f"{other} counts positions as well (granite_swa has such for each theta, Moshi for each layer)"
    rope: Any = base_config.rope_parameters or {}
    if rope.get("mscale_all_dim"):
        return "the model's attention too depends on RoPE's factor (mscale_all_dim, as in DeepSeek-V2 and V3)"
    return None


@contextmanager
def old_rotary_embedding(model: torch.nn.Module, base_config: PreTrainedConfig) -> Iterator[None]:
    """Let a model count positions as its old config says, for as long as the context lasts."""
    path, new = next((path, module) for path, module in model.named_modules() if path.endswith("rotary_emb"))
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    old = type(new)(base_config).to(next(new.buffers()).device)
    setattr(parent, name, old)
    try:
        yield
    finally:
        setattr(parent, name, new)
