"""What the model hands to its attention layers as a mask, made by `s2attn_mask` and read by the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longlora_ext._ulysses import sequence_parallel
from longlora_ext.documents import doc_start_from_mask


def s2attn_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """
    The mask that a model hands to its attention layers (transformers' mask interface).

    Where queries and keys are the same tokens (training, prefill) this is `None`, or what the 2-D mask says
    about each token, int32 `[batch, 1, 1, tokens]`: for a real token the index of its document's first token,
    for padding the bitwise complement of that. It has four dimensions because transformers passes a 4-D mask
    through untouched when `generate` prepares it ahead, and its size grows with the tokens, not with their
    square. With a KV cache it is what `sdpa` gets: `None` or a boolean `[batch, 1, queries, keys]`.

    Raises:
        `ValueError`: the mask has holes, or padding under sequence parallelism, or the model asks for anything but
        full causal attention.
    """
    if local_size is not None:
        raise ValueError(
            "attn_implementation='s2attn' cannot express sliding-window or chunked attention (this model "
            f"asks for {local_size} tokens): set config.sliding_window=None, or use another one"
        )
    # Before 5.4, transformers passed the positions of the queries in place of their number.
    positions = kwargs.get("cache_position")
    q_length = kwargs["q_length"] if positions is None else positions.shape[0]
    device = kwargs.get("device") if positions is None else positions.device
    packed = None
    if mask_function is not causal_mask_function:
        packed = _documents_of(mask_function, batch_size, q_length, kv_length, use_vmap, device)
    if q_length != kv_length:
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None if packed is None else packed[:, None, None, :]
    if sequence_parallel()[1] > 1:
        raise ValueError(
            "attn_implementation='s2attn' takes no attention_mask with padding under sequence parallelism, where it "
            "would not reach the attention: pack the documents, and tell them by position_ids"
        )
    attention_mask = attention_mask[:, :kv_length]
    start = doc_start_from_mask(attention_mask)
    return torch.where(attention_mask.bool(), start, ~start)[:, None, None, :]


def _documents_of(
    mask_function: Callable, batch_size: int, q_length: int, kv_length: int, use_vmap: bool, device: Any
) -> torch.Tensor | None:
    """
    The documents `[batch, tokens]` (int32) behind a mask function that is not plainly causal: transformers
    makes one for packed sequences. It is known by what it says of neighbours; one that lets a token see the
    next one is refused.
    """
    refusal = ValueError(
        "attn_implementation='s2attn' is causal within each document: this model asks for another mask "
        "(bidirectional attention, or a mask function of its own); use another attn_implementation"
    )
    if use_vmap:  # set by transformers exactly when a model adds a mask function of its own
        raise refusal
    if q_length != kv_length or q_length == 1:
        return None
    batch = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, q_length, device=device)[None, :]
    head = torch.zeros((1, 1), dtype=torch.long, device=device)
    sees_next = mask_function(batch, head, token - 1, token)
    if not torch.compiler.is_compiling() and bool(sees_next.any()):
        raise refusal
    starts = torch.where(mask_function(batch, head, token, token - 1), 0, token).expand(batch_size, -1)
    return torch.nn.functional.pad(starts.cummax(dim=1).values, (1, 0)).to(torch.int32)


def own_mask(attention_mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """What `s2attn_mask` made, as int32 `[batch, tokens]`; anything else is a mask of the caller's own."""
    if attention_mask is None:
        return None
    batch, _, tokens, _ = query.shape
    if attention_mask.dtype != torch.int32 or attention_mask.shape != (batch, 1, 1, tokens):
        raise ValueError(
            "attn_implementation='s2attn' takes a 2-D attention_mask [batch, tokens] of 0 and 1, but it got "
            f"a {attention_mask.ndim}-D mask of shape {list(attention_mask.shape)} and dtype "
            f"{attention_mask.dtype}; packed documents are told by position_ids"
        )
    return attention_mask[:, 0, 0]


def dense_mask(padding: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """
    The boolean mask `[batch, 1, tokens, tokens]` of a padded batch in eval mode.

    `generate` reads the row of the last token even where that is padding, so rows of padding see the real
    tokens before them, as with `sdpa`. Positions say nothing at padding: a document starts at a real token.
    """
    real = padding >= 0
    index = torch.arange(padding.shape[1], device=padding.device)
    allowed = (index[None, :] <= index[:, None]) & real[:, None, :]
    if documents is not None:
        first = torch.where((documents == index) & real, index, 0).cummax(dim=1).values
        allowed = allowed & (index >= first[:, :, None])
    return allowed[:, None]
