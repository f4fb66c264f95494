"""What a model answers and how likely the right answer is to it, by one reading of the prompt.

The prompt is nearly all of the work. Its keys and values are kept: the right answer is looked at behind them, and then
the model goes on from them by itself. A layer that has read further has made new tensors; the old ones are still there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from app.evaluation.answer_nats import answer_losses

#: Types of RoPE whose frequencies depend on how long the text is: what was read before the answer is not what would be
#: read with it.
BY_LENGTH = ("dynamic", "longrope")
#: Layers that make new tensors for what they are given. Linear attention changes its state in place, and in
#: transformers 5.5.4 forgets it where more than one token comes (Qwen3-Next).
APPENDING = (DynamicLayer, DynamicSlidingWindowLayer)


@torch.no_grad()
def answer_and_losses(
    opened: Any, ids: Sequence[int], question: tuple[Sequence[int], Sequence[int]], generation: GenerationConfig
) -> tuple[list[int], torch.Tensor]:
    """Let a model answer a prompt, and measure how likely the right answer is to it.

    Args:
        opened: What `open_model` returns.
        ids: The prompt that is answered, token ids.
        question: The prompt and the right answer as `answer_ids` has them: the prompt may end some tokens before `ids`.
        generation: How to generate.

    Returns:
        The new token ids, and what `answer_losses` returns: nats, float32 `[tokens of the right answer]`.
    """
    model, (prompt, right) = opened.model, question
    opened.forget_length()
    given = torch.tensor([list(ids)], device=model.device)

    def answered(**kept: Any) -> list[int]:
        said = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), generation_config=generation, **kept
        )
        return list(said[0, len(ids) :].tolist())

    read = len(prompt) - 1
    if read < 1 or list(prompt) != list(ids[: len(prompt)]) or not can_go_on(opened):
        said = answered()
        opened.forget_length()
        losses, _ = answer_losses(model, prompt, right)
        return said, losses
    before = torch.tensor([prompt[:read]], device=model.device)
    cache = model(input_ids=before, use_cache=True, logits_to_keep=1).past_key_values
    behind = copy.copy(cache)
    behind.layers = list(map(copy.copy, cache.layers))
    losses, _ = answer_losses(model, prompt[read:], right, cache=behind)
    return answered(past_key_values=cache), losses


def can_go_on(opened: Any) -> bool:
    """Whether a model can go on twice from what it has read, as the cache of a single token tells."""
    if opened.description["rope"].get("rope_type") in BY_LENGTH:
        return False
    token = torch.zeros((1, 1), dtype=torch.long, device=opened.model.device)
    cache = getattr(opened.model(input_ids=token, use_cache=True, logits_to_keep=1), "past_key_values", None)
    return isinstance(cache, DynamicCache) and all(type(layer) in APPENDING for layer in cache.layers)
