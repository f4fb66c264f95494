"""What a model answers and how likely the right answer is to it, by one reading of the prompt.

The prompt is nearly all of the work. Its keys and values are kept: the right answer is read behind them and cut off
again, and then the model goes on by itself. Models for which that is not known to be right read the prompt twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from app.evaluation.answer_nats import answer_losses
from app.models.suitable import check_attention
from longlora_ext._lengths import rope_type_of

#: Types of RoPE whose frequencies depend on how long the text is: what was read before the answer is not what would be
#: read with it.
BY_LENGTH = ("dynamic", "longrope")


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
    if read < 1 or list(prompt) != list(ids[: len(prompt)]) or not can_go_on(opened, read, len(ids)):
        said = answered()
        opened.forget_length()
        losses, _ = answer_losses(model, prompt, right)
        return said, losses
    cache = model(input_ids=given[:, :read], use_cache=True, logits_to_keep=1).past_key_values
    windows = [copy.copy(layer) if type(layer) is DynamicSlidingWindowLayer else None for layer in cache.layers]
    losses, _ = answer_losses(model, prompt[read:], right, cache=cache)
    cache.layers = [window or cut(layer, read) for window, layer in zip(windows, cache.layers, strict=True)]
    return answered(past_key_values=cache), losses


def cut(layer: DynamicLayer, tokens: int) -> DynamicLayer:
    """A layer with the keys and values of its first tokens alone."""
    if layer.keys is not None and layer.values is not None:  # those that share another layer's have none
        layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
    return layer


def can_go_on(opened: Any, read: int, tokens: int) -> bool:
    """Whether a model's keys and values are all that it keeps of what it has read.

    Args:
        opened: What `open_model` returns.
        read: Tokens that it reads at first.
        tokens: Those of the whole prompt.
    """
    config = opened.base.config
    try:
        check_attention(config)
    except ValueError:  # attention of its own may keep more
        return False
    # Where a text grows beyond this, Phi-3 reads it anew, and forgets to in transformers 5.5.4.
    if (
        rope_type_of(config) in BY_LENGTH
        or read <= (getattr(config, "original_max_position_embeddings", 0) or 0) < tokens
    ):
        return False
    token = torch.zeros((1, 1), dtype=torch.long, device=opened.model.device)
    cache = getattr(opened.model(input_ids=token, use_cache=True, logits_to_keep=1), "past_key_values", None)
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)  # linear attention keeps a state, MiniMax in a cache of its own
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)
