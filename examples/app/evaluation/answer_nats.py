"""How likely the right answer is to a model: nats per token, by one forward pass and without generation.

Whether an answer is found or not says little where a model nearly finds it, or nearly does not. The mean negative
log-likelihood of the right answer's tokens, each after the right ones before it, moves long before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedTokenizerBase

from app.inputs.prompt import prompt_ids, shared_start


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and of the answer as they are behind it.

    A tokenizer may take the prompt's end and the answer's beginning together: such a token belongs to the answer.
    """
    before, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + answer)
    shared = min(shared_start(before, whole), len(whole) - 1)
    return whole[:shared], whole[shared:]


@torch.no_grad()
def answer_losses(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    device: torch.device | None = None,
    cache: Cache | None = None,
) -> tuple[torch.Tensor, bool]:
    """The negative log-likelihood of each of an answer's tokens behind a prompt.

    Args:
        model: A transformers causal language model, in the mode to measure it in.
        prompt: Token ids, one or more.
        answer: Token ids, one or more.
        device: Where the model takes its inputs; default: what it says itself, which a wrapped one may not.
        cache: Of what stands before the prompt; it is changed.

    Returns:
        Nats, float32 `[tokens of the answer]`, and whether each token was the likeliest one, as greedy decoding asks.
    """
    ids = torch.tensor([[*prompt, *answer]], device=device or model.device)
    kept: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    logits = model(input_ids=ids[:, :-1], logits_to_keep=len(answer), **kept).logits[0, -len(answer) :].float()
    wanted = ids[0, -len(answer) :].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    return losses, bool((logits.argmax(-1) == wanted).all())
