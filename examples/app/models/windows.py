"""The sliding windows that a model has of its own, layer by layer."""

from __future__ import annotations

from transformers import PreTrainedConfig

from longlora_ext._mask import attention_window
from longlora_ext._pattern import sink


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """Of each layer the sliding window that the model itself has there."""
    types = getattr(config, "layer_types", None)
    if not types:
        return [attention_window(config)] * config.num_hidden_layers
    return [config.sliding_window if "sliding" in kind else None for kind in types]


def layers_with_sink(config: PreTrainedConfig) -> int:
    """How many layers show rows the first token in training, if the config says so: a window of the model's own never
    has (`longlora_ext._pattern.of_layer`)."""
    return own_windows(config).count(None) if sink(config) else 0
