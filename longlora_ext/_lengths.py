"""The lengths that a config can mean. Each RoPE type has its own way to say how far a scaled model reads."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

#: The length that a model was first trained at: a field of the config, or one of its RoPE parameters.
ORIGINAL = "original_max_position_embeddings"


def is_int(value: Any) -> bool:
    """Whether it is a whole number, which `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def named_original(config: PreTrainedConfig) -> int | None:
    """The original length, if the config names it. As in transformers the config's field wins over the parameter."""
    original = getattr(config, ORIGINAL, None) or (getattr(config, "rope_parameters", None) or {}).get(ORIGINAL)
    return original if is_int(original) else None


def possible_lengths(config: PreTrainedConfig) -> tuple[int, ...]:
    """
    The tokens that a model of this config reads: one number, or two where the config leaves it open, the longer first.

    Raises:
        `ValueError`: the config has no context.
    """
    ours: Any = getattr(config, "s2attn_context_length", None)
    length: Any = ours or getattr(config, "max_position_embeddings", None)
    if not is_int(length) or length < 1:
        raise ValueError(f"{type(config).__name__} has no max_position_embeddings: it has no context to speak of")
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type, factor = rope.get("rope_type", "default"), rope.get("factor")
    if ours or rope_type == "default" or not isinstance(factor, (int, float)) or factor <= 1:
        return (length,)
    original = named_original(config)
    if rope_type == "dynamic":
        return (int(factor * length),)  # transformers scales beyond max_position_embeddings: it is the original length
    if rope_type == "yarn":
        original = original or length
        scaled = int(factor * original)
        is_scaled = original < length <= scaled and length > scaled - original  # the factor is the ratio, rounded up
        return (length if is_scaled else scaled,)
    if original is not None and original <= length:  # llama3's factor is no ratio of lengths, longrope needs none
        return (length if length > original else int(factor * original),)
    return int(factor * length), length
