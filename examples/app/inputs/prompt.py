"""A text that a model is to go on with, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text with the special ones that the tokenizer puts before it, and none that end it.

    Many tokenizers can be told to append an end-of-sequence token (`add_eos_token`), others append a separator. With
    that behind its prompt a model begins another text.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    length = len(ids)
    while length and (added[length - 1] or ids[length - 1] == tokenizer.eos_token_id):
        length -= 1
    return ids[:length]


def shared_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens, or letters, two texts begin with alike."""
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
