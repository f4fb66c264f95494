"""How likely the right answer is to a model: nats per token, by one forward pass and without generation.

Whether an answer is found or not says little where a model nearly finds it, or nearly does not. The mean negative
log-likelihood of the right answer's tokens, each after the right ones before it, moves long before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedTokenizerBase

from app.inputs.prompt import prompt_ids

#: Tokens whose logits exist at once.
LOGITS = 1024


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and of the answer as they are behind it.

    A tokenizer may take the prompt's end and the answer's beginning together: such a token belongs to the answer.
    """
    before, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + answer)
    shared = next((i for i, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(before))
    shared = min(shared, len(whole) - 1)
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


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a model's output layer is given: [batch, tokens, width]."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    states: torch.Tensor = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def losses_of(model: Any, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token, given the states [tokens, width] that predict it: float32 [tokens].

    For models whose logits are their output layer's result, and nothing more.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    parts = zip(states.split(LOGITS), wanted.split(LOGITS), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(head(s).float(), w, reduction="none") for s, w in parts])
