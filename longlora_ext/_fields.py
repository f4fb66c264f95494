"""The fields of ours on a model's config: the groups of S2-Attn, which attention is computed; with `_pattern.py` what a
row sees beside its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from longlora_ext._lengths import CONTEXT_LENGTH, is_int, is_number
from longlora_ext._pattern import DENSE_LAYERS, SINK, WINDOW, check_sink, check_window, resolve_layers

GROUP_SIZE = "s2attn_group_size"
MODE = "s2attn_mode"
# The fields of ours on a config. A model without them is a plain transformers model.
CONFIG_FIELDS = (GROUP_SIZE, SINK, WINDOW, DENSE_LAYERS, MODE, CONTEXT_LENGTH)

MODES = ("auto", "s2", "dense")
DEFAULT_GROUP_RATIO = 0.25


def even_group_size(tokens: float) -> int:
    """The largest even group size of at most `tokens` tokens, at least 2."""
    return max(2, int(tokens) // 2 * 2)


def group_size(config: PreTrainedConfig) -> int:
    """The group size that a model of this config trains with, in tokens.

    Args:
        config: `s2attn_group_size` if it has one, otherwise a quarter of `max_position_embeddings`, made even.

    Raises:
        ValueError: `s2attn_group_size` is not a positive even integer.
    """
    size = getattr(config, GROUP_SIZE, None)
    if size is None:
        return even_group_size(config.max_position_embeddings * DEFAULT_GROUP_RATIO)
    if not is_int(size) or size < 2 or size % 2:
        raise ValueError(f"config.s2attn_group_size must be a positive even integer, but it is {size!r}")
    return size


def kv_heads(config: PreTrainedConfig) -> int:
    """The heads of keys and values of a model of this config: as many as of queries, if it does not say."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def attention_mode(config: PreTrainedConfig) -> str:
    """Which attention a model of this config computes: one of `MODES`, `"auto"` if the config does not say.

    Raises:
        ValueError: `s2attn_mode` is none of them.
    """
    mode: Any = getattr(config, MODE, None) or "auto"
    if mode not in MODES:
        raise ValueError(f"config.s2attn_mode must be one of {', '.join(map(repr, MODES))}, but it is {mode!r}")
    return mode


def set_pattern(
    config: PreTrainedConfig, *, sink: bool, window: int | None, dense_layers: int | Sequence[int] | None = None
) -> None:
    """Set what S2-Attn shows a row beside its group, and which layers are dense. A config without gets no field.

    What it has of an earlier extension goes, whether or not something else is asked.

    Raises:
        ValueError: `sink` is not a `bool`, `window` is not a positive integer, or there are no such layers.
    """
    for name in (SINK, WINDOW, DENSE_LAYERS):
        if hasattr(config, name):
            delattr(config, name)
    if dense_layers is not None:
        config.s2attn_dense_layers = resolve_layers(dense_layers, config.num_hidden_layers)
    if check_sink("sink", sink):
        config.s2attn_sink = True
    if window is not None:
        config.s2attn_window = check_window("window", window)


def asked_group_size(context: int, ratio: float, size: int | None) -> int:
    """The group size for a context, in tokens: `size`, or that part of the context, made even.

    Raises:
        ValueError: One of them is out of its range.
    """
    if size is not None:
        if not is_int(size) or size < 2 or size % 2 or size > 2 * context:
            raise ValueError(
                f"group_size must be an even integer from 2 to twice the context of {context}, but it is {size!r}"
            )
        return size
    if not is_number(ratio) or not 0 < ratio <= 1:
        raise ValueError(f"group_ratio must be a number above 0 and at most 1, but it is {ratio!r}")
    return even_group_size(context * ratio)
