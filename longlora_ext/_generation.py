"""The generation_config.json of a model, which goes along with what is made of it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME


class AsItIs(GenerationConfig):
    """
    Saved whatever it says. transformers refuses to save options that it would ignore, up to 5.20 even those of a file
    that it has read, such as the `temperature` without `do_sample` of early Llama 2 and of Vicuna.
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
