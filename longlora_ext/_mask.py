"""What the model hands to its attention layers as a mask, made by `s2attn_mask` and read by the layer.

transformers makes a mask boolean before it asks for this one: what it held besides 0 and 1 is looked for before, by a
hook on the models that are built for S2-Attn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longlora_ext._ulysses import sequence_parallel
from longlora_ext.documents import check_zeros_and_ones, doc_start_from_mask


def check_masks_of(parent: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
    """Have a model look at the masks it is given (torch's hook for modules that get a child)."""
    if isinstance(parent, PreTrainedModel) and _check_mask not in parent._forward_pre_hooks.values():
        parent.register_forward_pre_hook(_check_mask, with_kwargs=True)


def _check_mask(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if model.config._attn_implementation != "s2attn" or not isinstance(mask, torch.Tensor):
        return
    if mask.ndim == 2 and mask.dtype != torch.bool and model.base_model is model:  # it gets what its head is given
        check_zeros_and_ones(mask)


def attention_window(config: PreTrainedConfig) -> int | None:
    """
    The fewest tokens that some layer's attention is limited to, by a sliding window or to chunks.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            What `layer_types` say counts, where it has them: it may name a window that no layer uses.

    Returns:
        `int`, *optional*: 0 if there is a window and no size. `None` if all layers attend to all tokens.
    """
    types = getattr(config, "layer_types", None)
    sizes = []
    for field, kinds in (("sliding_window", ("sliding", "compressed")), ("attention_chunk_size", ("chunked",))):
        size = getattr(config, field, None)
        if types and any(kind in layer for kind in kinds for layer in types):
            sizes.append(size or 0)
        elif not types and size is not None and getattr(config, "use_sliding_window", True):
            sizes.append(size)
    return min(sizes, default=None)


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
        `ValueError`: the mask holds other values than 0 and 1, or has holes, or padding under sequence parallelism, or
        the model asks for anything but full causal attention.
    """
    if local_size is not None and local_size < kv_length:
        if attention_window(kwargs["config"]) is None:  # transformers makes masks for layers that are not there, too
            return None
        raise ValueError(
            "attn_implementation='s2attn' cannot express sliding-window or chunked attention: this model asks for "
            f"{local_size} tokens, and there are {kv_length}; "
            + ("" if getattr(kwargs["config"], "layer_types", None) else "set config.sliding_window=None, or ")
            + "use another attn_implementation"
        )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        check_zeros_and_ones(attention_mask)
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
