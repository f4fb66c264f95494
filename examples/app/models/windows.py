"""The sliding windows that a model has of its own, layer by layer."""

from __future__ import annotations

from transformers import PreTrainedConfig

from longlora_ext._mask import attention_window
from longlora_ext._pattern import hides


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """Of each layer the sliding window that the model itself has there."""
    types = getattr(config, "layer_types", None)
    if not types:
        return [attention_window(config)] * config.num_hidden_layers
    return [config.sliding_window if "sliding" in kind else None for kind in types]


def layers_for_sink(config: PreTrainedConfig) -> int:
    """How many layers can show rows the first token in training."""
    return sum(not hides(config, window) for window in own_windows(config))
