"""The layers of a model by kind: a run of a few layers tells what all take only where these are like the others.

Mixtures of experts begin with dense layers or have them in between, and some models take turns in other ways.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from longlora_ext._pattern import DENSE_LAYERS, dense_layers


@dataclass(frozen=True)
class Kind:
    """Layers that are alike: which they are, and what they have in common."""

    layers: tuple[int, ...]
    structure: tuple[Any, ...]

    @property
    def first(self) -> int:
        return self.layers[0]

    def after(self, kind: Kind) -> int:
        """How many of these layers come after the last one of another kind."""
        return sum(layer > kind.layers[-1] for layer in self.layers)


def kinds(config: PreTrainedConfig) -> tuple[Kind, ...]:
    """
    The kinds of a model's layers.

    Raises:
        ValueError: It has layers whose computation cannot be counted.
    """
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("its config is another one for some layers (per_layer_config), so it cannot be planned")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = layers_of(model)
    _check_attention(layers)
    found: dict[tuple[Any, ...], list[int]] = {}
    dense = dense_layers(config)
    for index, layer in enumerate(layers):
        found.setdefault((structure(layer), (index in dense, *_settings(layer))), []).append(index)
    return tuple(Kind(tuple(alike), common) for (common, _), alike in found.items())


def structure(layer: nn.Module) -> tuple[Any, ...]:
    """The modules of a layer, and the shapes of its weights."""
    modules = ((name, type(module).__name__) for name, module in layer.named_modules())
    return *modules, *((name, weight.shape) for name, weight in layer.named_parameters())


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """What its modules hold besides, such as whether positions are rotated, but for the layer's number."""
    held = (pair for module in layer.modules() for pair in vars(module).items())
    return tuple(
        (name, value)
        for name, value in held
        if isinstance(value, bool | int | float | str) and name not in ("layer_idx", "layer_id", "layer_number")
    )


def _check_attention(layers: nn.ModuleList) -> None:
    """Attention is to be all that mixes tokens, in every layer.

    Mamba, linear attention and their kin run in kernels of their own, and what those hold and compute is not what
    transformers' stand-ins for them do. Most of them begin with a short convolution.
    """
    unknown = "what that holds and computes is not known here, so this model cannot be planned"
    for module in layers.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            raise ValueError(f"its layers mix tokens by {type(module).__name__}, which is no attention: {unknown}")
    attend = [any(name.endswith("q_proj") for name, _ in layer.named_modules()) for layer in layers]
    if any(attend) and not all(attend):
        raise ValueError(f"of its {len(layers)} layers {attend.count(False)} have another kind of attention: {unknown}")


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a causal language model.

    Raises:
        ValueError: It has no list of as many layers as its config says.
    """
    return getattr(*_place_of_layers(model))


def _place_of_layers(model: Any) -> tuple[nn.Module, str]:
    decoder = model.get_decoder()
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
            return decoder, name
    raise ValueError(f"{type(model).__name__} has no list of its {model.config.num_hidden_layers} layers to count by")


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A config of the first layers alone."""
    short = copy.deepcopy(config)
    for name, value in _by_layer(config).items():
        setattr(short, name, value[:layers])
    short.num_hidden_layers = layers
    return short


def keep_layers(model: Any, chosen: Sequence[int]) -> None:
    """Let a model have these of its layers, of which one may come several times."""
    decoder, name = _place_of_layers(model)
    layers = getattr(decoder, name)
    for field, value in _by_layer(model.config).items():
        setattr(model.config, field, [value[index] for index in chosen])
    setattr(decoder, name, nn.ModuleList(copy.deepcopy(layers[index]) for index in chosen))
    model.config.num_hidden_layers = len(chosen)


def _by_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Fields with an entry for each layer. The list of dense ones is none: layers keep the numbers that it has."""
    layers = config.num_hidden_layers
    return {
        name: list(value)
        for name, value in vars(config).items()
        if "layer" in name and name != DENSE_LAYERS and isinstance(value, list | tuple) and len(value) == layers
    }
