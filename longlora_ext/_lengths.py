"""How long a context a config means: each RoPE type has its own way to say how far a scaled model reads."""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

#: The length that a model was first trained at: a field of the config, or one of its RoPE parameters.
ORIGINAL = "original_max_position_embeddings"
#: The field of ours that says how many tokens a model reads.
CONTEXT_LENGTH = "s2attn_context_length"


def context_length(config: PreTrainedConfig) -> int:
    """The number of tokens that a model of this config is made for.

    An extended config says it in `s2attn_context_length`. For any other it is `max_position_embeddings`, or, where that
    is the length from before RoPE was scaled, as many times that length as the factor says: always for `"dynamic"`,
    beyond whose `max_position_embeddings` transformers scales, and for types that name the original length, such as
    `"yarn"`, where `max_position_embeddings` does not go beyond it. A config with linear scaling may leave that open.

    Args:
        config: An extended config or any other.

    Raises:
        ValueError: It has none, as models without positions, or with positions of another kind; or it can be read in
            two ways, which the error names: `settle_context` chooses one.
    """
    found = possible_lengths(config)
    if len(found) == 1:
        return found[0]
    longer, shorter = found
    raise ValueError(
        f"the model's RoPE is scaled by a factor of {_one_rope(config)['factor']:g} ({rope_type_of(config)}), and "
        f"its config does not say whether max_position_embeddings, {config.max_position_embeddings}, is the length "
        f"before that, so that it reads {longer} tokens, or after it, so that it reads {shorter}: pass "
        f"present_context_length {longer} or {shorter}"
    )


def settle_context(config: PreTrainedConfig, present_context_length: int | None) -> PreTrainedConfig:
    """A config whose context is known.

    Args:
        config: Any config; it is not changed.
        present_context_length: The tokens that a model of this config reads, where the config can be read in two ways
            (see `context_length`). If it cannot, this must be what it says.

    Returns:
        The config itself if nothing is given, or else a copy that says it.

    Raises:
        ValueError: That is no way to read the config.
    """
    if present_context_length is None:
        return config
    possible = possible_lengths(config)
    if present_context_length not in possible:
        raise ValueError(
            f"present_context_length must be {' or '.join(map(str, possible))}, which is how the model's config can be "
            f"read, but it is {present_context_length!r}"
        )
    settled = copy.deepcopy(config)
    settled.s2attn_context_length = present_context_length
    return settled


def rope_type_of(config: PreTrainedConfig) -> str:
    """How the positions of a model of this config are scaled: `"default"` where they are not."""
    rope = getattr(config, "rope_parameters", None) or {}
    types = [parameters.get("rope_type", "default") for parameters in (of_layer_types(rope) or {"all": rope}).values()]
    return next((rope_type for rope_type in types if rope_type != "default"), "default")


def of_layer_types(rope_parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The RoPE parameters of each layer type, where a config has such: none if they are those of all layers."""
    return {name: value for name, value in rope_parameters.items() if isinstance(value, dict)}


def _one_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The RoPE parameters that hold for all layers: none where layer types differ, as Gemma 3's do."""
    rope = getattr(config, "rope_parameters", None) or {}
    first, *others = of_layer_types(rope).values() or [rope]
    return {} if any(other != first for other in others) else first


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number, which `True` is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number, which `True` is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def named_original(config: PreTrainedConfig, given: dict[str, Any] | None = None) -> int | None:
    """The original length, if the config or parameters given besides name it, which win over those that it has. As in
    transformers the config's field wins over any parameter."""
    field = getattr(config, ORIGINAL, None)
    if field is not None:
        return whole_length(f"config.{ORIGINAL}", field)
    parameter = {**_one_rope(config), **(given or {})}.get(ORIGINAL)
    return None if parameter is None else whole_length(f"{ORIGINAL} in rope_parameters", parameter)


def whole_length(name: str, value: Any) -> int:
    """A number of tokens that a config says. It may be written as 64.0 in JSON.

    Raises:
        ValueError: It is none.
    """
    if not is_number(value) or value < 1 or not float(value).is_integer():
        raise ValueError(f"{name} must be a positive integer, but it is {value!r}")
    return int(value)


def refuse_wrapped(config: PreTrainedConfig) -> None:
    """Raise `ValueError` for the config of a model of images or sound, of which a text model is a part."""
    text = config if config.is_encoder_decoder else config.get_text_config()
    if text is not config and not hasattr(config, "max_position_embeddings"):
        raise ValueError(
            f"{type(config).__name__} wraps a text model ({text.model_type}) with others: save the text model as a "
            "folder of its own, as docs/models.md says"
        )


def possible_lengths(config: PreTrainedConfig) -> tuple[int, ...]:
    """The tokens that a model of this config reads: one number, or two where it leaves that open, the longer first.

    Raises:
        ValueError: The config has no context, or names an original length that is none.
    """
    refuse_wrapped(config)
    ours: Any = getattr(config, CONTEXT_LENGTH, None)
    field = "max_position_embeddings" if ours is None else CONTEXT_LENGTH
    length: Any = getattr(config, field, None)
    if length is None:
        raise ValueError(f"{type(config).__name__} has no max_position_embeddings: it has no context to speak of")
    if not is_int(length) or length < 1:
        raise ValueError(f"config.{field} must be a positive integer, but it is {length!r}")
    rope = _one_rope(config)
    rope_type, factor = rope.get("rope_type", "default"), rope.get("factor")
    if ours is not None or rope_type == "default" or not isinstance(factor, (int, float)) or factor <= 1:
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
