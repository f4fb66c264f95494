"""RoPE for a longer context: `rope_parameters` of an extended config, and whether a model can be built with them."""

from __future__ import annotations

import copy
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora_ext._lengths import (
    CONTEXT_LENGTH,
    ORIGINAL,
    context_length,
    is_int,
    is_number,
    named_original,
    rope_type_of,
)
from longlora_ext._per_layer import layer_config
from longlora_ext._rope_parameters import check_factor, check_given

# Types whose parameters name the length the model was first trained at, and what they need besides a factor.
_NEEDS_ORIGINAL = ("yarn", "llama3", "longrope")
# Types that divide all frequencies by the factor, so that one on top of another multiplies.
_OF_ALL_FREQUENCIES = ("linear", "proportional")
_DEFAULTS: dict[str, dict[str, Any]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
# Decoders of transformers that have no positions in layers that see all tokens, where others have a sliding window.
# Not cohere2_moe, of which some such layers have them.
_ROTATE_IN_WINDOWS = ("afmoe", "cohere2", "exaone4", "exaone_moe", "flint", "kolibri1")
#: A larger theta and no scaling, which is no type of transformers': the config that comes of it is of type "default".
NTK = "ntk"
#: All that a context can be extended by.
ROPE_TYPES = tuple(dict.fromkeys(("default", *ROPE_INIT_FUNCTIONS, NTK)))

# Not kept: transformers computes attention_factor from the factor if it is absent, and that of a smaller factor must
# not stay; "type" is the old name of rope_type.
_STALE = ("attention_factor", "type")


def fill_in_head_dim(config: PreTrainedConfig) -> None:
    """Give a config that leaves `head_dim` open the one that its model has. transformers computes the frequencies of a
    scaled RoPE with the field as it is."""
    layer = layer_config(config)
    if getattr(layer, "head_dim", 0) is None:
        config.head_dim = layer.hidden_size // layer.num_attention_heads


def to_extend(config: PreTrainedConfig, layer_types: dict[str, Any], context: Any) -> list[str]:
    """The layer types whose RoPE a longer context concerns: not those whose sliding window stays what it was."""
    window, used = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or layer_types
    holds_all = is_int(window) and is_int(context) and window >= context
    full = [name for name in layer_types if "sliding" not in name]
    are_alike = all(layer_types[name] == layer_types[full[0]] for name in layer_types) if full else True
    if holds_all or (are_alike and not any("sliding" in name for name in used)):
        return list(layer_types)  # all see all tokens
    return full or list(layer_types)


def only_windows_rotate(config: PreTrainedConfig, context: int) -> bool:
    """Whether only layers with a sliding window have positions, in a model whose other layers see all tokens.

    The windows stay what they were, and so does what RoPE does within them: a scaled one would be another, for nothing.
    """
    window, used = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ()
    is_mixed = {"sliding_attention", "full_attention"} <= set(used)
    return is_mixed and isinstance(window, int) and window < context and not _full_layers_rotate(config)


def _full_layers_rotate(config: PreTrainedConfig) -> bool:
    """Whether any layer that sees all tokens has positions, in a model that has layers with a window besides."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type in _ROTATE_IN_WINDOWS or rope.get("full_attention", rope) is None:  # None: Beam
        return False
    thetas = getattr(config, "layer_rope_theta", None)  # Granite's with windows: 0 where a layer has no positions
    return not thetas or any(
        theta for kind, theta in zip(config.layer_types, thetas, strict=True) if kind == "full_attention"
    )


def with_one_rope(config: PreTrainedConfig, layer_types: dict[str, dict[str, Any]]) -> PreTrainedConfig:
    """A copy of a config that has the RoPE parameters of these layer types, which must be the same, for all layers."""
    first, *others = layer_types.values()
    if any(other != first for other in others):
        raise ValueError(
            f"this model has different RoPE parameters for different layers ({', '.join(layer_types)}): it cannot be "
            "extended"
        )
    flat = copy.deepcopy(config)
    try:
        flat.rope_parameters = dict(first)
    except StrictDataclassError as error:  # ModernBERT's config takes none but those of layer types
        raise ValueError(f"{type(config).__name__} cannot be extended: {error}") from error
    if getattr(flat, CONTEXT_LENGTH, None) is None:  # of all layers, before it is asked of these
        setattr(flat, CONTEXT_LENGTH, context_length(config))
    return flat


def extended_rope(config: PreTrainedConfig, context: int, rope_type: str, given: Any) -> dict[str, Any]:
    """The new `rope_parameters`: those that stay, the factor, and over both what the caller gave."""
    present = dict(config.rope_parameters)
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, but it is {rope_type!r}")
    given = check_given(config, rope_type, given)
    if rope_type == NTK:
        return _ntk(config, context, given)
    if rope_type == "longrope" and not {"short_factor", "long_factor"} <= given.keys():
        raise ValueError(
            "rope_type 'longrope' needs rope_parameters with short_factor and long_factor: they are found by "
            "a search, not computed from the context length"
        )
    present_type = rope_type_of(config)
    if present_type == rope_type == "dynamic" and present.get("alpha"):
        raise ValueError(
            f"this model's RoPE is scaled by alpha {present['alpha']:g}, for all lengths: transformers does not look "
            "at a factor then, and nothing would be extended"
        )
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
        original = named_original(config, given) or original
        new[ORIGINAL] = original
    factor = float(math.ceil(context / original))
    if rope_type == present_type and rope_type in _OF_ALL_FREQUENCIES:
        factor = float(present.get("factor", 1.0) * math.ceil(context / context_length(config)))
    if rope_type == present_type == "llama3":
        factor = float(math.ceil(present["factor"] * context / context_length(config)))
    for key, value in _DEFAULTS.get(rope_type, {}).items():
        new.setdefault(key, value)
    extended = {**new, "factor": factor, **given}
    check_factor(extended["factor"])
    if present_type == rope_type and extended["factor"] < _number(present.get("factor")):
        raise ValueError(
            f"this model's RoPE is scaled by a factor of {present['factor']:g} already, which cannot become "
            f"{extended['factor']:g}: a factor never becomes smaller"
        )
    return extended


def _ntk(config: PreTrainedConfig, context: int, given: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with a theta at which the slowest frequency is that of linear scaling, and the fastest stays.

    What is extended so is a model with another theta: extended again it gets the theta of both at once.
    """
    if unknown := given.keys() - {"rope_type", "factor"}:
        raise ValueError(f"rope_type 'ntk' has no parameter {', '.join(sorted(unknown))}: only factor")
    if getattr(config, "layer_rope_theta", None):
        raise ValueError(
            "rope_type 'ntk' changes rope_theta, but the layers of this model have thetas of their own "
            "(layer_rope_theta): take another rope_type"
        )
    present_type = rope_type_of(config)
    if present_type != "default":
        raise ValueError(
            f"this model's RoPE is scaled with rope_type {present_type!r} already and cannot be extended with 'ntk', "
            f"which scales nothing but rope_theta: pass rope_type={present_type!r}"
        )
    factor = check_factor(given.get("factor", context / context_length(config)))
    new = {key: value for key, value in config.rope_parameters.items() if key not in _STALE}
    theta, rotated = new.get("rope_theta"), _rotated(config)
    if rotated <= 2:
        raise ValueError(f"rope_type 'ntk' needs heads of more than {rotated} rotated dimensions")
    if not is_number(theta):
        raise ValueError(f"rope_theta must be a finite number above 0, but it is {theta!r}")
    return {**new, "rope_type": "default", "rope_theta": theta * factor ** (rotated / (rotated - 2))}


def _rotated(config: PreTrainedConfig) -> int:
    """How many dimensions of a head are rotated: transformers computes a frequency for each two of them."""
    plain = copy.deepcopy(config)
    fill_in_head_dim(plain)
    plain.rope_parameters = {**plain.rope_parameters, "rope_type": "linear", "factor": 1.0}
    frequencies, _ = ROPE_INIT_FUNCTIONS["linear"](plain, "cpu")
    return 2 * len(frequencies)


def _number(factor: Any) -> float:
    """A factor to compare. What is none is found out where frequencies are computed with it."""
    return factor if isinstance(factor, (int, float)) else math.nan


def original_of_linear(config: PreTrainedConfig, present: int) -> int:
    """The length that a model was first trained at, before RoPE was ever scaled."""
    if rope_type_of(config) == "default":
        return present
    named = named_original(config)
    return named if named and named < present else int(present / config.rope_parameters["factor"])


def check_rope(config: PreTrainedConfig, rope_type: str) -> None:
    """Compute the frequencies once, so that a wrong parameter is reported here and not when the model is built."""
    theta = config.rope_parameters.get("rope_theta")
    if not is_number(theta) or not 0 < theta < math.inf:
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
