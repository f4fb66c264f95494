"""Greedy decoding: nothing but the likeliest token counts, up to what ends the model's answers."""

from __future__ import annotations

from transformers import GenerationConfig

from app.models.use_model import OpenedModel
from longlora_ext.adapter import stops


class Greedy:
    """Takes from a model what it wants of decoding by itself (temperature and the like), but for its stops.

    Args:
        opened: The model, whose generation_config is another one afterwards.
    """

    def __init__(self, opened: OpenedModel) -> None:
        tokenizer = opened.tokenizer
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.stops = sorted({*stops(opened.model.generation_config), *([] if eos is None else [eos])})
        self.padding = eos if pad is None else pad
        for module in (opened.model, opened.base):
            module.generation_config = GenerationConfig()

    def up_to(self, tokens: int) -> GenerationConfig:
        """How to generate an answer of so many tokens at most."""
        return GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=self.stops or None, pad_token_id=self.padding
        )
