"""What S2-Attn shows a row beside its group, and in which layers it does, as a model's config says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from longlora_ext._lengths import CONTEXT_LENGTH, is_int

SINK = "s2attn_sink"
WINDOW = "s2attn_window"
DENSE_LAYERS = "s2attn_dense_layers"


def sink(config: PreTrainedConfig) -> bool:
    """Whether each row sees the first token of its document besides: `s2attn_sink`, no if the config has none.

    Raises:
        ValueError: It is not a `bool`.
    """
    value: Any = getattr(config, SINK, None)
    return False if value is None else check_sink("config.s2attn_sink", value)


def window(config: PreTrainedConfig) -> int | None:
    """How many tokens of its group a row sees at most, itself the last of them: `s2attn_window`, all if there is none.

    Raises:
        ValueError: It is not a positive integer.
    """
    value: Any = getattr(config, WINDOW, None)
    return None if value is None else check_window("config.s2attn_window", value)


def of_layer(config: PreTrainedConfig, own_window: int | None, keys: int) -> dict[str, Any]:
    """`window` and `sink` of S2-Attn in a layer with this sliding window of its own, or without, over so many keys.

    The narrower of two windows counts. A layer's own window never showed the first token, so it does not now.
    """
    shown = sink(config) and not hides(config, own_window)
    return {"window": smaller(clipped(own_window, keys), window(config)), "sink": shown}


def hides(config: PreTrainedConfig, own_window: int | None) -> bool:
    """Whether a layer's own window hides any of the model's context. It is not asked of a row, which may be shorter:
    what a document sees must not depend on the others in its row."""
    context = getattr(config, CONTEXT_LENGTH, None) or getattr(config, "max_position_embeddings", None)
    return own_window is not None and (context is None or own_window < context)


def window_of_layer(module: Any) -> int | None:
    """The window that the config gives a layer. Some models tell their attention of it by the mask alone, and by none
    where a row is shorter."""
    types, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    slides = types and index is not None and index < len(types) and types[index] == "sliding_attention"
    return module.config.sliding_window if slides else None


def clipped(own_window: int | None, keys: int) -> int | None:
    """A layer's own window where it hides any of so many keys, and otherwise none."""
    return own_window if own_window is not None and own_window < keys else None


def dense_layers(config: PreTrainedConfig) -> list[int]:
    """The layers that attend densely in training too: `s2attn_dense_layers`, none if the config has none.

    Raises:
        ValueError: It is no list of layer indices.
    """
    value: Any = getattr(config, DENSE_LAYERS, None)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(_is_index(index) for index in value):
        raise ValueError(f"config.s2attn_dense_layers must be a list of layer indices, but it is {value!r}")
    return list(value)


def is_dense_layer(module: Any) -> bool:
    """Whether an attention layer is one of those.

    Raises:
        ValueError: There are such, but the layer does not say which one it is.
    """
    dense = dense_layers(module.config)
    index = getattr(module, "layer_idx", None)
    if dense and index is None:
        raise ValueError(
            f"config.s2attn_dense_layers is {dense}, but {type(module).__name__} has no layer_idx that says which "
            "layer it is: this model's layers cannot be told apart"
        )
    return index in dense


def resolve_layers(asked: int | Sequence[int], layers: int) -> list[int]:
    """The indices of dense layers, in order.

    Args:
        asked: How many of the last layers, or which: indices from 0, or from -1 backwards.
        layers: How many the model has.

    Raises:
        ValueError: There is no such layer, or no such number of them.
    """
    if is_int(asked):
        if not 0 < asked <= layers:
            raise ValueError(f"dense_layers must be a number of layers from 1 to {layers}, but it is {asked}")
        return list(range(layers - asked, layers))
    if isinstance(asked, str) or not isinstance(asked, Sequence) or not asked:
        raise ValueError(f"dense_layers must be a number of layers or a list of their indices, but it is {asked!r}")
    wrong = [index for index in asked if not _is_index(index, -layers) or index >= layers]
    if wrong:
        raise ValueError(f"dense_layers has {wrong[0]!r}, but the model's layers are 0 to {layers - 1}")
    return sorted({index % layers for index in asked})


def in_words(layers: Sequence[int]) -> str:
    """Indices of layers in order, to read: "0, 27-29"."""
    runs: list[list[int]] = []
    for index in layers:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _is_index(value: Any, least: int = 0) -> bool:
    return is_int(value) and value >= least


def check_sink(name: str, value: Any) -> bool:
    """`value`, or `ValueError` if that is neither yes nor no: a text such as "false" would count as yes."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, but it is {value!r}")
    return value


def check_window(name: str, value: Any) -> int:
    """`value`, or `ValueError` if that is no number of tokens."""
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, but it is {value!r}")
    return value


def smaller(one: int | None, other: int | None) -> int | None:
    """The smaller of two windows; `None` is one without an end."""
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)
