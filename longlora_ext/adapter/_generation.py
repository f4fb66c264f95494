"""The generation_config.json of a model: it goes along with what is made of it, and says what ends a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME


class AsItIs(GenerationConfig):
    """Saved whatever it says.

    transformers refuses to save options that it would ignore, up to 5.20 even those of a file that it has read, such as
    the `temperature` without `do_sample` of early Llama 2 and of Vicuna.
    """

    def validate(self, strict: bool = False, *others: Any, **named: Any) -> None:
        super().validate(False, *others, **named)


def keep_generation_config(model: PreTrainedModel) -> None:
    """Let a model be saved with the generation config that it has."""
    if model.can_generate():
        model.generation_config = AsItIs.from_dict(model.generation_config.to_dict())


def save_generation_config(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the one that the model has into a folder."""
    if model.can_generate():
        AsItIs.from_dict(model.generation_config.to_dict()).save_pretrained(folder)


def has_generation_config(folder: Path) -> bool:
    """Whether an adapter folder has one: those of before it was saved have not, and go by the base model's."""
    return (folder / GENERATION_CONFIG_NAME).is_file()


def stop_at(model: nn.Module, tokens: Iterable[int]) -> list[int]:
    """Let generation end at more tokens, such as those that end an answer in a chat template.

    Args:
        model: A `PreTrainedModel` or a `peft.PeftModel` around one; its generation config is changed.
        tokens: Token ids. They join `eos_token_id`, and what is in it stays.

    Returns:
        The tokens that were not in it.
    """
    config = getattr(model, "generation_config", None)
    if config is None:  # nothing is generated with it
        return []
    known = stops(config)
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if new:
        config.eos_token_id = [*known, *new]
    return new


def stops(config: GenerationConfig) -> list[int]:
    """The tokens at which generation ends, which a config has as one number, as several, or not at all."""
    found = config.eos_token_id
    return [] if found is None else [*found] if isinstance(found, (list, tuple)) else [found]
