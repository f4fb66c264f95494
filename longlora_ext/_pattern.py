"""What S2-Attn shows a row beside its group, as a model's config says."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

SINK = "s2attn_sink"
WINDOW = "s2attn_window"


def sink(config: PreTrainedConfig) -> bool:
    """Whether each row sees the first token of its document besides: `s2attn_sink`, no if the config has none.

    Raises:
        ValueError: It is not a `bool`.
    """
    value: Any = getattr(config, SINK, None)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.s2attn_sink must be true or false, but it is {value!r}")
    return bool(value)


def window(config: PreTrainedConfig) -> int | None:
    """How many tokens of its group a row sees at most, itself the last of them: `s2attn_window`, all if there is none.

    Raises:
        ValueError: It is not a positive integer.
    """
    value: Any = getattr(config, WINDOW, None)
    return None if value is None else check_window("config.s2attn_window", value)


def check_window(name: str, value: Any) -> int:
    """`value`, or `ValueError` if that is no number of tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, but it is {value!r}")
    return value


def smaller(one: int | None, other: int | None) -> int | None:
    """The smaller of two windows; `None` is one without an end."""
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)
