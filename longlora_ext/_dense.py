"""Dense attention of a layer, by the op or by torch's `scaled_dot_product_attention`, also with a learned sink.

The tensors are those of transformers' attention interface: query `[batch, heads, tokens, head_dim]`, key and value
`[batch, KV heads, keys, head_dim]`. The functions return `[batch, tokens, heads, head_dim]` and `None`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longlora_ext._mask import Told, dense_mask
from longlora_ext.ops import s2attn
from longlora_ext.sinks import add_learned_sink


def run_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    size: int,
    documents: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
    **pattern: Any,
) -> tuple[torch.Tensor, None]:
    """Call the op on a layer's tensors, with learned sinks (`[heads]`) if there are any."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if sinks is None:
        out = s2attn(q, k, v, size, documents, scale=scaling, **pattern)
    else:
        out, lse = s2attn(q, k, v, size, documents, scale=scaling, return_lse=True, **pattern)
        out, _ = add_learned_sink(out, lse, sinks)
    return out, None


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    window: int | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Dense causal attention within each document: one group of all tokens, no head shifted."""
    heads, keys = query.shape[1], key.shape[2]
    if documents is not None:  # of one that began before these keys, the group would end within them
        documents = documents.clamp(min=0)
    return run_op(
        query, key, value, keys + keys % 2, documents, scaling, sinks, first_shifted_head=heads, window=window
    )


def dense_eval(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    told: Told,
    documents: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Dense attention outside training: `sdpa`'s own result, with packed documents kept apart besides."""
    tokens, keys = query.shape[2], key.shape[2]
    if tokens != keys:
        # A prompt in parts: whatever positions say, it goes on with all that the cache holds, but for padding.
        padding = told.first_keys(tokens) if told.padded else None
        return dense(query, key, value, padding, told.window, scaling, sinks)
    if told.starts is not None and not told.padded:
        documents = told.starts if documents is None else torch.maximum(told.starts, documents)
    padding = told.starts if told.padded else None
    # Compiled code cannot ask whether there are several.
    several = documents is not None and (torch.compiler.is_compiling() or bool(documents.any()))
    if padding is None and (several or told.window is not None):
        return dense(query, key, value, documents, told.window, scaling, sinks)
    mask = None if padding is None else dense_mask(padding, documents, told.window)
    return sdpa(module, query, key, value, mask, scaling, sinks)


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
        query: See above, as `key` and `value`.
        key: See above.
        value: See above.
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
