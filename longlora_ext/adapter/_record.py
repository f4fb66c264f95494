"""longlora.json: what an adapter folder says of the context extension, and of the base model that it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from longlora_ext._lengths import ORIGINAL
from longlora_ext._per_layer import layer_config
from longlora_ext.adapter._checkpoint import listed
from longlora_ext.adapter._precision import fp32_weight, plain_name, whole_shape
from longlora_ext.config import CONFIG_FIELDS, context_length, fill_in_head_dim

RECORD = "longlora.json"
WEIGHTS = "adapter_model.safetensors"
FACTORS = (".lora_A.weight", ".lora_B.weight")
_FORMAT = 1
_NEEDED = {"context_length": int, "max_position_embeddings": int, "rope_parameters": dict, "config": dict,
           "base_shape": dict, "base_weights": dict}  # fmt: skip
_TIED = "tie_word_embeddings"
_SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    _TIED,
)
_SAMPLES = 16  # weights of a tensor that tell it from others
_SAME = 0.01  # relative distance of two fingerprints: rounding to bf16 makes 0.002


def write_record(
    folder: Path, config: Any, fingerprint: dict[str, list[float]], tensors: Iterable[str]
) -> dict[str, Any]:
    """Write what `load` needs beside the adapter: the extended context of `config`, the base model's shape and
    `fingerprint`, and the names of the adapter's tensors. Returns what is written."""
    record = {
        "format": _FORMAT,
        "context_length": context_length(config),
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope_parameters,
        **({ORIGINAL: getattr(config, ORIGINAL)} if hasattr(config, ORIGINAL) else {}),
        "config": {name: getattr(config, name) for name in CONFIG_FIELDS if hasattr(config, name)},
        "base_shape": _base_shape(config),
        "base_weights": fingerprint,
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
        "tensors": sorted(tensors),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter but no {RECORD}: without it the RoPE parameters that the adapter was "
            "trained with are not known; save it with longlora_ext.adapter.save_adapter"
        )
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(f"{path} has format {found!r}, but this version reads format {_FORMAT}")
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        raise ValueError(f"{path} is incomplete: it has no {', '.join(missing)}")
    for name, kind in _NEEDED.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{path} is damaged: {name} is {str(record[name])[:50]!r}")
    if not all(_are(float, values) for values in record["base_weights"].values()):
        raise ValueError(f"{path} is damaged: base_weights are no lists of numbers")
    if not _are(str, record.get("tensors", [])):  # which older ones do not have
        raise ValueError(f"{path} is damaged: tensors is no list of names")
    return record


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def check_tensors(names: Iterable[str], record: dict[str, Any], file: Path) -> None:
    """Raise `ValueError` if an adapter's file lacks tensors that were saved, or one of the two factors of a matrix."""
    there = set(names)
    pairs = {name.replace(a, b) for name in there for a, b in (FACTORS, FACTORS[::-1]) if name.endswith(a)}
    if missing := pairs.union(record.get("tensors", ())) - there:
        raise ValueError(f"{file} is incomplete: it has no {listed(missing)}")


def apply_record(config: PreTrainedConfig, record: dict[str, Any]) -> None:
    """Give the base model's config the extended context."""
    for name in ("max_position_embeddings", "rope_parameters", ORIGINAL):
        if name in record:
            setattr(config, name, record[name])
    for name, value in record["config"].items():
        setattr(config, name, value)
    fill_in_head_dim(config)


def fingerprint_of(model: nn.Module, adapter: Iterable[torch.Tensor]) -> dict[str, list[float]]:
    """What the base model of a prepared model, with the weights of `adapter`, can be known by. Collective under ZeRO
    and FSDP."""
    of_adapter = {id(weight) for weight in adapter}  # which may be frozen as well
    return fingerprint(
        {
            _name_in_base(name): parameter
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
            and id(parameter) not in of_adapter
            and len(whole_shape(parameter)) == 2
            and parameter.is_floating_point()
            and ".original_module." not in name
        }
    )


def _name_in_base(name: str) -> str:
    """What a frozen weight of a prepared model is called in the base model."""
    parts = plain_name(name).removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "token_adapter"))


def fingerprint(frozen: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """A few weights of the base model's matrices that are not trained: of the first two, as the very first may be the
    embedding, which many models that come of one another share, and of the last."""
    names = list(frozen)
    return {name: sample(fp32_weight(frozen[name])).tolist() for name in dict.fromkeys(names[:2] + names[-1:])}


def sample(weight: torch.Tensor) -> torch.Tensor:
    """A few numbers of a weight, to tell it from others by."""
    flat = weight.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]


def _base_shape(config: PreTrainedConfig) -> dict[str, Any]:
    first = layer_config(config)
    return {name: getattr(first, name, None) for name in _SHAPE_FIELDS}


def check_shape(config: PreTrainedConfig, record: dict[str, Any], base: str) -> None:
    """Compare a base model's config with that of training. Whether weights are tied is not asked of it."""
    here = _base_shape(config)
    here[_TIED] = record["base_shape"].get(_TIED)
    differ = [
        f"{name} {here.get(name)} instead of {want}"
        for name, want in record["base_shape"].items()
        if here.get(name) != want
    ]
    if differ:
        raise ValueError(f"{base} is not the base model of this adapter: it has {', '.join(differ)}")


def check_tying(peft_config: Any, tied: bool, base: str) -> None:
    """Raise `ValueError` if an adapter was trained with the output layer as the embedding, and they are two here."""
    if getattr(peft_config, "ensure_weight_tying", False) and not tied:
        raise ValueError(
            f"{base} is not the base model of this adapter: its output layer is not its embedding (lm_head and "
            "tie_word_embeddings), as it was in training"
        )


def check_weights(weight_of: Callable[[str], torch.Tensor | None], record: dict[str, Any], base: str) -> None:
    """Compare a few of the base model's weights, which `weight_of` finds by name, with those of training."""
    for name, values in record["base_weights"].items():
        weight = weight_of(name)
        if weight is not None and (weight.is_meta or not weight.is_floating_point()):
            continue  # on disk, or quantised to other numbers
        want = torch.tensor(values)
        have = torch.tensor([] if weight is None else sample(fp32_weight(weight)).tolist())
        if have.shape != want.shape or not (have - want).norm() <= _SAME * want.norm():
            raise ValueError(
                f"{base} is not the base model of this adapter: it has the same shape but other weights "
                f"({name}). Pass the model that the adapter was trained on as base_model"
            )
