"""The config.json of a model folder, so that those read it right who know no `rope_parameters`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlora_ext._lengths import ORIGINAL, of_layer_types

_BESIDE = ("rope_theta", "partial_rotary_factor")  # what older versions look for beside `rope_scaling`, not in it
#: Whose layer types have RoPE parameters of their own, under names that transformers 4 has for them.
_IN_TRANSFORMERS_4 = ("gemma3_text", "olmo3")


def complete_config(folder: Path, **changes: Any) -> None:
    """Write RoPE under its older names as well, as transformers 4 and what is built on it read it: `rope_scaling`, and
    `rope_theta` beside it. transformers 5 reads the same of them.

    Args:
        folder: It holds the config.json.
        changes: Fields to set.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("rope_parameters"), dict):
            part.update(_older_names(part["rope_parameters"], str(part.get("model_type"))))
    path.write_text(json.dumps(config | changes, indent=2, sort_keys=True) + "\n")


def _older_names(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The same RoPE as transformers 4 names it. Where kinds of layers differ, each model has names of its own."""
    kinds = of_layer_types(rope)
    beside = {}
    if kinds:
        if model_type not in _IN_TRANSFORMERS_4:
            return {}
        rope, local = kinds["full_attention"], kinds["sliding_attention"]
        if local.get("rope_theta") != rope.get("rope_theta"):
            beside = {"rope_local_base_freq": local.get("rope_theta")}
    older = {name: rope[name] for name in _BESIDE if name in rope} | beside
    scaled = rope.get("rope_type", "default") != "default"
    older["rope_scaling"] = {name: rope[name] for name in rope if name not in _BESIDE} if scaled else None
    if rope.get("rope_type") == "longrope" and ORIGINAL in rope:  # there it is no part of rope_scaling
        older[ORIGINAL] = rope[ORIGINAL]
    return older
