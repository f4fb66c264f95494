"""The change of a model's config that lets it read further.

The RoPE parameters are part of the config, so the change is made before the model is built, and it is saved
with it:

    import longlora_ext.attention  # registers attn_implementation="s2attn"

    config = extend_config(AutoConfig.from_pretrained(name), 32768, rope_type="yarn", sink=True)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, attn_implementation="s2attn")
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from longlora_ext import _lengths
from longlora_ext._fields import (
    CONFIG_FIELDS,
    DEFAULT_GROUP_RATIO,
    MODE,
    MODES,
    asked_group_size,
    attention_mode,
    even_group_size,
    group_size,
    set_pattern,
)
from longlora_ext._lengths import context_length, is_int, of_layer_types, refuse_wrapped, rope_type_of, settle_context
from longlora_ext._per_layer import layer_config
from longlora_ext._rope import (
    NTK,
    check_rope,
    extended_rope,
    fill_in_head_dim,
    only_windows_rotate,
    original_of_linear,
    to_extend,
    with_one_rope,
)

__all__ = [
    "CONFIG_FIELDS",
    "DEFAULT_GROUP_RATIO",
    "MODE",
    "MODES",
    "attention_mode",
    "config_for",
    "context_length",
    "even_group_size",
    "extend_config",
    "fill_in_head_dim",
    "group_size",
    "rope_type_of",
    "set_pattern",
    "settle_context",
]


def config_for(
    config: PreTrainedConfig,
    context_length: int | None = None,
    *,
    rope_type: str | None = None,
    rope_parameters: dict[str, Any] | None = None,
    present_context_length: int | None = None,
    group_ratio: float = DEFAULT_GROUP_RATIO,
    group_size: int | None = None,
    sink: bool = False,
    window: int | None = None,
    dense_layers: int | Sequence[int] | None = None,
) -> PreTrainedConfig:
    """A copy of a model's config to train with, for a longer context or for the model's own.

    A longer context is that of `extend_config`. For the model's own, RoPE stays as it is.

    Args:
        config: The base model's config; it is not changed.
        context_length: The context to train at, in tokens, at least the model's own, which is the default.
        rope_type: How RoPE is scaled for a longer context, as for `extend_config`. Default: as it is scaled already,
            or `"linear"`.
        rope_parameters: As for `extend_config`.
        present_context_length: As for `extend_config`.
        group_ratio: As for `extend_config`.
        group_size: As for `extend_config`.
        sink: As for `extend_config`.
        window: As for `extend_config`.
        dense_layers: As for `extend_config`.

    Returns:
        A config with `s2attn_context_length` and `s2attn_group_size`.

    Raises:
        ValueError: An argument is out of its range, the context is shorter than the model's own, scaling is asked for
            but the context is the model's own, or RoPE cannot be extended as asked.
    """
    config = settle_context(config, present_context_length)
    own = _lengths.context_length(config)
    if context_length is None:
        context_length = own
    if not is_int(context_length) or context_length < own:
        raise ValueError(
            f"context_length must be an integer of at least the model's own {own} tokens, but it is {context_length!r}"
        )
    if context_length > own:
        scaled = rope_type_of(config)
        return extend_config(
            config,
            context_length,
            rope_type=rope_type or ("linear" if scaled == "default" else scaled),
            rope_parameters=rope_parameters,
            group_ratio=group_ratio,
            group_size=group_size,
            sink=sink,
            window=window,
            dense_layers=dense_layers,
        )
    if rope_parameters or rope_type not in (None, "linear"):
        raise ValueError(f"context_length {context_length} is the model's own: RoPE is not scaled for it")
    config = copy.deepcopy(config)
    config.s2attn_context_length = context_length
    config.s2attn_group_size = asked_group_size(context_length, group_ratio, group_size)
    set_pattern(config, sink=sink, window=window, dense_layers=dense_layers)
    return config


def extend_config(
    config: PreTrainedConfig,
    context_length: int,
    *,
    rope_type: str = "linear",
    rope_parameters: dict[str, Any] | None = None,
    present_context_length: int | None = None,
    group_ratio: float = DEFAULT_GROUP_RATIO,
    group_size: int | None = None,
    sink: bool = False,
    window: int | None = None,
    dense_layers: int | Sequence[int] | None = None,
) -> PreTrainedConfig:
    """A copy of a model's config for a longer context.

    The factor is `ceil(context_length / original)`. For a model without scaling, `original` is its
    `max_position_embeddings`, or for `yarn`, `llama3` and `longrope` the `original_max_position_embeddings` in
    `rope_parameters`. A model that is scaled already is extended with its own `rope_type` only:
    factors of `linear` and `llama3` multiply, those of Llama 3.1 and 3.2 being no ratio of lengths; for `yarn`
    and the like the factor is counted from the length that the parameters name as the original one. The other
    parameters are kept. A factor never becomes smaller.

    Args:
        config: The base model's config; it is not changed.
        context_length: The new context, in tokens; more than the present one.
        rope_type: Any type that transformers knows, or `"ntk"`. `"default"` scales nothing (of use with another
            `rope_theta` in `rope_parameters`); `"longrope"` needs its factors in `rope_parameters`. `"ntk"` multiplies
            `rope_theta` by `s ** (d / (d - 2))`, s the new context over the present one, d the dimensions of a head
            that are rotated ("NTK-aware"). The config then holds another `rope_theta` and no scaling, which everything
            that reads configs understands, and can be extended again.
        rope_parameters: Parameters of that type, in place of those computed here. For `"ntk"`: `factor`, in place of s.
        present_context_length: The tokens that the model reads now, where its config can be read in two ways: see
            `settle_context`.
        group_ratio: The group size as a part of the new context, in (0, 1]; it is made even.
        group_size: The group size in tokens, even, in place of the ratio. Twice the context makes one group of it,
            shifted or not: for a `window` alone.
        sink: Let each row see the first token of its document besides: the attention sink of pretrained models.
        window: Let each row see so many tokens of its group at most.
        dense_layers: Layers that attend densely in training too: how many of the last ones, or their indices.

    Returns:
        A config with changed `rope_parameters`, `max_position_embeddings` (the new context; for `"dynamic"` it stays,
        as transformers scales only beyond it), `s2attn_context_length` and `s2attn_group_size`, and `s2attn_sink`,
        `s2attn_window` and `s2attn_dense_layers` where they are asked for (an earlier extension's are not taken over).
        Where layer types have RoPE parameters of their own, those of layers with a sliding window stay as they are, and
        so does RoPE where these alone have positions (Cohere 2, EXAONE 4, Afmoe, Flint, Kolibri, Beam, some Granite),
        unless `rope_parameters` are given.
        Linear scaling is given `original_max_position_embeddings` too, so that nobody has to ask whether
        `max_position_embeddings` is the length before or after it. A `head_dim` of `None` is filled in.

    Raises:
        ValueError: An argument is out of its range, or the config's RoPE cannot be extended as asked.
    """
    stays = is_int(context_length) and only_windows_rotate(config, context_length) and not rope_parameters
    by_type = copy.deepcopy(getattr(config, "rope_parameters", None) or {})
    layer_types = of_layer_types(by_type)
    concerned = to_extend(config, layer_types, context_length)
    config = settle_context(config, present_context_length)
    if layer_types:
        config = with_one_rope(config, {name: layer_types[name] for name in concerned})
    if stays:
        rope_type = rope_type_of(config)
    present = _present_length(config)
    if not is_int(context_length) or context_length <= present:
        raise ValueError(
            f"context_length must be an integer above the model's present context of {present} tokens, but "
            f"it is {context_length!r}"
        )
    extended = copy.deepcopy(config)
    extended.s2attn_group_size = asked_group_size(context_length, group_ratio, group_size)
    set_pattern(extended, sink=sink, window=window, dense_layers=dense_layers)
    extended.s2attn_context_length = context_length
    new = dict(config.rope_parameters)
    if not stays:
        given = {} if rope_parameters is None else rope_parameters
        new = extended_rope(layer_config(config, concerned), context_length, rope_type, given)
    if rope_type != "dynamic":
        extended.max_position_embeddings = context_length
    if rope_type == "linear":
        extended.original_max_position_embeddings = original_of_linear(config, present)
    extended.rope_parameters = new
    fill_in_head_dim(extended)
    check_rope(layer_config(extended, concerned), "default" if rope_type == NTK else rope_type)
    if layer_types:
        new = dict(extended.rope_parameters)
        kept = {name: rope for name, rope in by_type.items() if rope is None or isinstance(rope, dict)}
        extended.rope_parameters = {**kept, **{name: dict(new) for name in concerned}}
    return extended


def _present_length(config: PreTrainedConfig) -> int:
    refuse_wrapped(config)
    if not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"{type(config).__name__} has no rope_parameters: only decoders with rotary position embeddings can "
            "be extended"
        )
    return context_length(config)
