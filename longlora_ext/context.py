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

from longlora_ext._pattern import check_window
from longlora_ext.attention import DEFAULT_GROUP_RATIO, even_group_size

# The fields of ours on a config. A model without them is a plain transformers model.
CONFIG_FIELDS = ("s2attn_group_size", "s2attn_sink", "s2attn_window", "s2attn_mode", "s2attn_context_length")

# Types whose parameters name the length the model was first trained at, and what they need besides a factor.
_ORIGINAL = "original_max_position_embeddings"
_NEEDS_ORIGINAL = ("yarn", "llama3", "longrope")
_DEFAULTS: dict[str, dict[str, Any]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
# transformers computes it from the factor if it is absent: that of a smaller factor must not stay.
_STALE = "attention_factor"


def context_length(config: PreTrainedConfig) -> int:
    """
    The number of tokens that a model of this config is made for.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            An extended config or any other; for any other it is `max_position_embeddings`. A merged model's is either:
            `max_position_embeddings`, or for RoPE of the type `"dynamic"` the `s2attn_context_length` beside it.

    Raises:
        `ValueError`: it has none, as models without positions, or with positions of another kind.
    """
    length: Any = getattr(config, "s2attn_context_length", None) or getattr(config, "max_position_embeddings", None)
    if not _is_int(length) or length < 1:
        raise ValueError(f"{type(config).__name__} has no max_position_embeddings: it has no context to speak of")
    return length


def rope_type_of(config: PreTrainedConfig) -> str:
    """
    How the positions of a model of this config are scaled: `"default"` where they are not.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    types = [parameters.get("rope_type", "default") for parameters in (_of_layer_types(rope) or {"all": rope}).values()]
    return next((rope_type for rope_type in types if rope_type != "default"), "default")


def extend_config(
    config: PreTrainedConfig,
    context_length: int,
    *,
    rope_type: str = "linear",
    rope_parameters: dict[str, Any] | None = None,
    group_ratio: float = DEFAULT_GROUP_RATIO,
    group_size: int | None = None,
    sink: bool = False,
    window: int | None = None,
) -> PreTrainedConfig:
    """
    A copy of a model's config for a longer context.

    The factor is `ceil(context_length / original)`. For a model without scaling, `original` is its
    `max_position_embeddings`. A model that is scaled already is extended with its own `rope_type` only:
    factors of `linear` and `llama3` multiply, those of Llama 3.1 and 3.2 being no ratio of lengths; for `yarn`
    and the like the factor is counted from the length that the parameters name as the original one. The other
    parameters are kept.

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
        group_ratio (`float`, defaults to 0.25):
            The group size as a part of the new context, in (0, 1]; it is made even.
        group_size (`int`, *optional*):
            The group size in tokens, even, in place of the ratio. Twice the context makes one group of it, shifted or
            not: for a `window` alone.
        sink (`bool`, defaults to `False`):
            Let each row see the first token of its document besides: the attention sink of pretrained models.
        window (`int`, *optional*):
            Let each row see so many tokens of its group at most.

    Returns:
        [`~transformers.PreTrainedConfig`]: with changed `rope_parameters`, `max_position_embeddings` (the new
        context; for `"dynamic"` it stays, as transformers scales only beyond it), `s2attn_context_length` and
        `s2attn_group_size`, and `s2attn_sink` and `s2attn_window` where they are asked for.
        RoPE parameters of each layer type stay so.

    Raises:
        `ValueError`: an argument is out of its range, or the config's RoPE cannot be extended as asked.
    """
    layer_types = _of_layer_types(getattr(config, "rope_parameters", None) or {})
    if layer_types:
        config = _with_one_rope(config, layer_types)
    present = _present_length(config)
    if not _is_int(context_length) or context_length <= present:
        raise ValueError(
            f"context_length must be an integer above the model's present context of {present} tokens, but "
            f"it is {context_length!r}"
        )
    extended = copy.deepcopy(config)
    extended.s2attn_group_size = _group_size(context_length, group_ratio, group_size)
    set_pattern(extended, sink=sink, window=window)
    extended.s2attn_context_length = context_length
    new = _extended_rope(config, context_length, rope_type, dict(rope_parameters or {}))
    if rope_type != "dynamic":
        extended.max_position_embeddings = context_length
    extended.rope_parameters = new
    _check_rope(extended, rope_type)
    if layer_types:
        extended.rope_parameters = {layer_type: dict(extended.rope_parameters) for layer_type in layer_types}
    return extended


def _of_layer_types(rope_parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The RoPE parameters of each layer type, where a config has such: none if they are those of all layers."""
    return {name: value for name, value in rope_parameters.items() if isinstance(value, dict)}


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


def set_pattern(config: PreTrainedConfig, *, sink: bool, window: int | None) -> None:
    """
    Set what S2-Attn shows a row beside its group. A config without is as those of before: it gets no field.

    Raises:
        `ValueError`: `window` is not a positive integer.
    """
    if sink:
        config.s2attn_sink = True
    if window is not None:
        config.s2attn_window = check_window("window", window)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _present_length(config: PreTrainedConfig) -> int:
    if not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"{type(config).__name__} has no rope_parameters: only decoders with rotary position embeddings can "
            "be extended"
        )
    return context_length(config)


def _group_size(context: int, ratio: float, size: int | None) -> int:
    if size is not None:
        if not _is_int(size) or size < 2 or size % 2 or size > 2 * context:
            raise ValueError(
                f"group_size must be an even integer from 2 to twice the context of {context}, but it is {size!r}"
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
    new = {key: value for key, value in present.items() if key != _STALE}
    new["rope_type"] = rope_type
    if rope_type == "default":
        return {**new, **given}
    original = config.max_position_embeddings
    if rope_type in _NEEDS_ORIGINAL:
        # transformers lets the field of the config, where a model has one, win over that of the parameters
        original = getattr(config, _ORIGINAL, None) or present.get(_ORIGINAL) or original
        new[_ORIGINAL] = original
    factor = float(math.ceil(context / original))
    if rope_type == present_type == "linear":
        factor *= present["factor"]
    if rope_type == present_type == "llama3":
        factor = float(math.ceil(present["factor"] * context / _present_length(config)))
    for key, value in _DEFAULTS.get(rope_type, {}).items():
        new.setdefault(key, value)
    return {**new, "factor": factor, **given}


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
