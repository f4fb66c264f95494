"""Dense attention by torch's `scaled_dot_product_attention`, also for layers with a learned sink."""

from __future__ import annotations

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa` gives.

    Args:
        module: The attention layer.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, KV heads, keys, head_dim]`.
        value: Like `key`.
        mask: bool `[batch, 1, tokens, keys]`, or `None`: causal, or one token that sees all keys.
        scaling: Factor of the logits.
        sinks: `[heads]`, the logit of one more key, whose value is 0 (gpt-oss).
    """
    if sinks is None:
        out: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
        return out, None
    batch, heads, tokens, _ = query.shape
    keys = key.shape[2]
    # A key of zeros has the score 0, to which the mask adds the logit: so is it one more column of the mask.
    bias = torch.zeros(batch, heads, tokens, keys + 1, dtype=query.dtype, device=query.device)
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if mask is not None:
        bias[..., :keys].masked_fill_(~mask, float("-inf"))
    bias[..., keys] = sinks.to(query.dtype)[:, None]
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    out = sdpa_attention_forward(module, query, key, value, bias, scaling=scaling)[0]
    return out, None
