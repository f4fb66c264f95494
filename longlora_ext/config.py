"""Context extension: the change of a model's config that lets it read further.

The RoPE parameters are part of the config, so the change is made before the model is built, and it is saved
with it:

    config = extend_config(AutoConfig.from_pretrained(name), 32768)
    model = AutoModelForCausalLM.from_pretrained(name, config=config, attn_implementation="s2attn")
"""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora_ext._lengths import (
    ORIGINAL,
    context_length,
    is_int,
    named_original,
    of_layer_types,
    rope_type_of,
    settle_context,
)
from longlora_ext.attention import DEFAULT_GROUP_RATIO, even_group_size

__all__ = ["CONFIG_FIELDS", "context_length", "extend_config", "fill_in_head_dim", "rope_type_of", "settle_context"]

# The fields of ours on a config. A model without them is a plain transformers model.
CONFIG_FIELDS = ("s2attn_group_size", "s2attn_mode", "s2attn_context_length")

# Types whose parameters name the length the model was first trained at, and what they need besides a factor.
_NEEDS_ORIGINAL = ("yarn", "llama3", "longrope")
_DEFAULTS: dict[str, dict[str, Any]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
# Not kept: transformers computes attention_factor from the factor if it is absent, and that of a smaller factor must
# not stay; "type" is the old name of rope_type.
_STALE = ("attention_factor", "type")


def fill_in_head_dim(config: PreTrainedConfig) -> None:
    """Give a config that leaves `head_dim` open the one that its model has. transformers computes the frequencies of a
    scaled RoPE with the field as it is."""
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads


def extend_config(
    config: PreTrainedConfig,
    context_length: int,
    *,
    rope_type: str = "linear",
    rope_parameters: dict[str, Any] | None = None,
    present_context_length: int | None = None,
    group_ratio: float = DEFAULT_GROUP_RATIO,
    group_size: int | None = None,
) -> PreTrainedConfig:
    """
    A copy of a model's config for a longer context.

    The factor is `ceil(context_length / original)`. For a model without scaling, `original` is its
    `max_position_embeddings`. A model that is scaled already is extended with its own `rope_type` only:
    factors of `linear` and `llama3` multiply, those of Llama 3.1 and 3.2 being no ratio of lengths; for `yarn`
    and the like the factor is counted from the length that the parameters name as the original one. The other
    parameters are kept. A factor never becomes smaller.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The base model's config; it is not changed.
        context_length (`int`):
            The new context, in tokens; more than the present one.
        rope_type (`str`, defaults to `"linear"`):
            Any type that transformers knows. `"default"` scales nothing (of use with another `rope_theta` in
            `rope_parameters`); `"longrope"` needs its factors in `rope_parameters`.
        rope_parameters (`dict`, *optional*):
            Parameters of that type, in place of those computed here.
        present_context_length (`int`, *optional*):
            The tokens that the model reads now, where its config can be read in two ways: see [`settle_context`].
        group_ratio (`float`, defaults to 0.25):
            The group size as a part of the new context, in (0, 1]; it is made even.
        group_size (`int`, *optional*):
            The group size in tokens, even, in place of the ratio.

    Returns:
        [`~transformers.PreTrainedConfig`]: with changed `rope_parameters`, `max_position_embeddings` (the new
        context; for `"dynamic"` it stays, as transformers scales only beyond it), `s2attn_context_length` and
        `s2attn_group_size`. RoPE parameters of each layer type stay so. Linear scaling is given
        `original_max_position_embeddings` too, so that nobody has to ask whether `max_position_embeddings` is the
        length before or after it. A `head_dim` of `None` is filled in.

    Raises:
        `ValueError`: an argument is out of its range, or the config's RoPE cannot be extended as asked.
    """
    layer_types = of_layer_types(getattr(config, "rope_parameters", None) or {})
    if layer_types:
        config = _with_one_rope(config, layer_types)
    config = settle_context(config, present_context_length)
    present = _present_length(config)
    if not is_int(context_length) or context_length <= present:
        raise ValueError(
            f"context_length must be an integer above the model's present context of {present} tokens, but "
            f"it is {context_length!r}"
        )
    extended = copy.deepcopy(config)
    extended.s2attn_group_size = _group_size(context_length, group_ratio, group_size)
    extended.s2attn_context_length = context_length
    new = _extended_rope(config, context_length, rope_type, dict(rope_parameters or {}))
    if rope_type != "dynamic":
        extended.max_position_embeddings = context_length
    if rope_type == "linear":
        extended.original_max_position_embeddings = _original_of_linear(config, present)
    extended.rope_parameters = new
    fill_in_head_dim(extended)
    _check_rope(extended, rope_type)
    if layer_types:
        extended.rope_parameters = {layer_type: dict(extended.rope_parameters) for layer_type in layer_types}
    return extended


def _with_one_rope(config: PreTrainedConfig, layer_types: dict[str, dict[str, Any]]) -> PreTrainedConfig:
    """A copy of a config whose layer types have the same RoPE parameters, with these for all layers."""
    first, *others = layer_types.values()
    if any(other != first for other in others):
        raise ValueError(
            f"this model has different RoPE parameters for different layers ({', '.join(layer_types)}): it cannot be "
            "extended"
        )
    flat = copy.deepcopy(config)
    flat.rope_parameters = dict(first)
    return flat


def _present_length(config: PreTrainedConfig) -> int:
    if not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"{type(config).__name__} has no rope_parameters: only decoders with rotary position embeddings can "
            "be extended"
        )
    return context_length(config)


def _group_size(context: int, ratio: float, size: int | None) -> int:
    if size is not None:
        if not is_int(size) or size < 2 or size % 2 or size > context:
            raise ValueError(
                f"group_size must be an even integer from 2 to the context of {context}, but it is {size!r}"
            )
        return size
    if not 0 < ratio <= 1:
        raise ValueError(f"group_ratio must be above 0 and at most 1, but it is {ratio!r}")
    return even_group_size(context * ratio)


def _extended_rope(config: PreTrainedConfig, context: int, rope_type: str, given: dict[str, Any]) -> dict[str, Any]:
    """The new `rope_parameters`: those that stay, the factor, and over both what the caller gave."""
    present = dict(config.rope_parameters)
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}, but it is {rope_type!r}")
    if given.get("rope_type", rope_type) != rope_type:
        raise ValueError(f"rope_parameters say rope_type {given['rope_type']!r}, but rope_type is {rope_type!r}")
    if rope_type == "longrope" and not {"short_factor", "long_factor"} <= given.keys():
        raise ValueError(
            "rope_type 'longrope' needs rope_parameters with short_factor and long_factor: they are found by "
            "a search, not computed from the context length"
        )
    present_type = rope_type_of(config)
    if present_type not in ("default", rope_type):
        raise ValueError(
            f"this model's RoPE is scaled with rope_type {present_type!r} already and cannot be extended "
            f"with {rope_type!r}: pass rope_type={present_type!r}"
        )
    new = {key: value for key, value in present.items() if key not in _STALE}
    new["rope_type"] = rope_type
    if rope_type == "default":
        return {**new, **given}
    original = config.max_position_embeddings
    if rope_type in _NEEDS_ORIGINAL:
        original = named_original(config) or original
        new[ORIGINAL] = original
    factor = float(math.ceil(context / original))
    if rope_type == present_type == "linear":
        factor = float(present["factor"] * math.ceil(context / _present_length(config)))
    if rope_type == present_type == "llama3":
        factor = float(math.ceil(present["factor"] * context / _present_length(config)))
    for key, value in _DEFAULTS.get(rope_type, {}).items():
        new.setdefault(key, value)
    extended = {**new, "factor": factor, **given}
    if present_type == rope_type and _number(extended["factor"]) < _number(present.get("factor")):
        raise ValueError(
            f"this model's RoPE is scaled by a factor of {present['factor']:g} already, which cannot become "
            f"{extended['factor']:g}: a factor never becomes smaller"
        )
    return extended


def _number(factor: Any) -> float:
    """A factor to compare. What is none is found out where frequencies are computed with it."""
    return factor if isinstance(factor, (int, float)) else math.nan


def _original_of_linear(config: PreTrainedConfig, present: int) -> int:
    """The length that a model was first trained at, before RoPE was ever scaled."""
    if rope_type_of(config) == "default":
        return present
    named = named_original(config)
    return named if named and named < present else int(present / config.rope_parameters["factor"])


def _check_rope(config: PreTrainedConfig, rope_type: str) -> None:
    """
    Compute the frequencies once, so that a wrong parameter is reported here and not when the model is built.
    """
    theta = config.rope_parameters.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise ValueError(f"rope_theta must be a finite number above 0, but it is {theta!r}")
    if rope_type == "default":
        return
    try:
        config.validate_rope()
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=context_length(config))
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"rope_parameters {config.rope_parameters} do not fit rope_type {rope_type!r}: {error}"
        ) from error
    if not bool(frequencies.isfinite().all()) or not bool((frequencies >= 0).all()):
        raise ValueError(f"rope_parameters {config.rope_parameters} give frequencies that are not finite and positive")
