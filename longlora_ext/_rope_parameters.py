"""Whether `rope_parameters` that a caller gives can work: transformers passes over what it does not know."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from longlora_ext._lengths import ORIGINAL, is_number, whole_length

_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
#: What transformers computes the frequencies of a type with, besides those of all.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "alpha"),
    "yarn": (
        "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"
    ),
    "longrope": ("factor", ORIGINAL, "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}  # fmt: skip


def check_given(config: PreTrainedConfig, rope_type: str, given: Any) -> dict[str, Any]:
    """The parameters that were given for a type, with numbers of tokens as such.

    Raises:
        ValueError: They are no dict, or of another type, or one is not known or out of its range.
    """
    if not isinstance(given, dict):
        raise ValueError(f"rope_parameters must be a dict, but they are {given!r}")
    if nested := [name for name, value in given.items() if isinstance(value, dict)]:
        raise ValueError(
            f"rope_parameters must be one set, which is taken for all layers that are extended, but they have one for "
            f"{', '.join(map(str, nested))}"
        )
    if (said := given.get("rope_type", given.get("type", rope_type))) != rope_type:
        raise ValueError(f"rope_parameters say rope_type {said!r}, but rope_type is {rope_type!r}")
    # A model may know more than its type: then they are in its config, or its class names them.
    of_model = {*config.rope_parameters, *(getattr(config, "ignore_keys_at_rope_validation", None) or ())}
    if rope_type in PARAMETERS and (unknown := given.keys() - {*_OF_ALL, *PARAMETERS[rope_type], *of_model}):
        raise ValueError(
            f"rope_type {rope_type!r} has no parameter {', '.join(sorted(map(str, unknown)))}: only "
            f"{', '.join((*PARAMETERS[rope_type], *_OF_ALL[2:]))}"
        )
    if given.get(ORIGINAL) is None:
        return given
    return {**given, ORIGINAL: whole_length(f"{ORIGINAL} in rope_parameters", given[ORIGINAL])}


def check_factor(factor: Any) -> float:
    """`factor`, or `ValueError` if a context cannot be made longer by it. llama.cpp writes 0.25 for one of 4."""
    if not is_number(factor) or not 1 <= factor < math.inf:
        raise ValueError(f"factor must be a finite number of at least 1, but it is {factor!r}")
    return factor
