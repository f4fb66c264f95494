"""What the tensors of a base model's files become in the model: transformers renames some, and joins or cuts others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from longlora_ext._errors import naming
from longlora_ext.adapter._checkpoint import Checkpoint, listed
from longlora_ext.adapter._lora import NeedsWholeModel
from longlora_ext.adapter._tying import is_tied, say_tied


class StoredModel:
    """The weights of a model by the names of its files.

    Args:
        config: The model's. It is made to say that weights are not tied of which the files hold two.
        weights: The files.
        base: How an error calls the model.
        trust_remote_code: As for `from_pretrained`.

    Raises:
        NeedsWholeModel: The tensors of the files do not make up the model.
    """

    def __init__(
        self, config: PreTrainedConfig, weights: Checkpoint, base: str, trust_remote_code: bool = False
    ) -> None:
        with naming(f"the base model {base}"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self._weights = weights
        self._names_of = {name: names for names in _tied(model) for name in names}
        #: By the name in the files that of the model's weight, or `None` for a part of one.
        self.becomes = dict(_becomes(model, weights))
        by_weight: dict[str, list[str]] = {}
        for stored, name in self.becomes.items():
            if name is not None:
                by_weight.setdefault(self._names_of[name][0], []).append(stored)
        for group, files in by_weight.items():
            names = self._names_of[group]
            first, *others = sorted(files, key=lambda stored: names.index(str(self.becomes[stored])))
            if any(not weights.get(first).equal(weights.get(other)) for other in others):
                say_tied(config, False)  # transformers does not tie them either
                self._names_of |= {name: (name,) for name in names}
            else:
                for other in others:
                    del self.becomes[other]
        #: Whether the output layer is the embedding.
        self.is_tied = is_tied(model) and bool(getattr(config, "tie_word_embeddings", False))
        self._check_complete(model)

    def names_of(self, name: str) -> tuple[str, ...]:
        """All names of a weight that is tied, or the one of any other."""
        return self._names_of.get(name, ())

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of the files is the model's weight of that name."""
        return any(to is not None and to in self.names_of(name) for to in self.becomes.values())

    def get(self, name: str) -> Any:
        """The weight of that name in the model, or `None` if no tensor of the files is it."""
        return next((self._weights.get(file) for file, to in self.becomes.items() if to in self.names_of(name)), None)

    def _check_complete(self, model: PreTrainedModel) -> None:
        there = {other for name in self.becomes.values() if name is not None for other in self.names_of(name)}
        left = {self._names_of[name][0]: weight for name, weight in model.state_dict().items() if name not in there}
        parts = sum(self._weights.like(stored).numel() for stored, name in self.becomes.items() if name is None)
        if sum(weight.numel() for weight in left.values()) != parts:
            raise NeedsWholeModel(f"the base model's files have no {listed(left) or 'such parts of weights'}")


def _tied(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """The names of each weight."""
    tied: dict[int, list[str]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(weight), []).append(name)
    return [tuple(names) for names in tied.values()]


def _becomes(model: PreTrainedModel, weights: Checkpoint) -> Iterator[tuple[str, str | None]]:
    """As transformers reads the files: what the model has no place for is passed over."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    for stored in weights:
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = stored, None
        if name in state:
            yield stored, name if pattern is None else None
