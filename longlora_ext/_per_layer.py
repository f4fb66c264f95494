"""Models whose layers differ in what the config says of all, as Gemma 4's in `head_dim`, Laguna's in query heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def layer_configs(config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
    """The config of each layer where they differ, otherwise the model's alone."""
    each: Any = config  # older versions of transformers have no such configs
    return each.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,)


def layer_config(config: PreTrainedConfig, layer_types: Iterable[str] = ()) -> PreTrainedConfig:
    """The config of the first layer of one of these types, or of the first one of all."""
    each, kinds = layer_configs(config), getattr(config, "layer_types", None) or ()
    return next((layer for kind, layer in zip(kinds, each, strict=False) if kind in layer_types), each[0])


def query_heads(layer: nn.Module) -> int:
    """The query heads of an attention layer. Under DeepSpeed's Ulysses, a process is called with a part of them."""
    config: Any = layer.config
    by_layer = getattr(config, "num_attention_heads_per_layer", None)
    return by_layer[layer.layer_idx] if by_layer else config.num_attention_heads
