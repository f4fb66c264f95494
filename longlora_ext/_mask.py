"""What the model hands to its attention layers as a mask, made by `s2attn_mask` and read by the layer.

transformers makes a mask boolean before it asks for this one: what it held besides 0 and 1 is looked for before, by a
hook on the models that are built for S2-Attn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longlora_ext._deepspeed_ulysses import sequence_parallel
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
    """The fewest tokens that some layer's attention is limited to, by a sliding window or to chunks.

    Args:
        config: The model's config. Where it has `layer_types`, they decide: it may name a window that no layer uses.

    Returns:
        `None` if all layers attend to all tokens, 0 if there is a window without a size.
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
    """Make the mask that a model hands to its attention layers (transformers' mask interface).

    Args:
        batch_size: Rows of the batch.
        kv_length: Number of keys.
        mask_function: transformers' function of (batch, head, query, key): whether the query sees the key.
        attention_mask: `[batch, keys]`, bool or 0 and 1: what is not padding.
        local_size: Size of the window or chunk, for layers that have one.
        use_vmap: Whether the model added a mask function of its own.
        kwargs: `q_length` and the interface's other arguments.

    Returns:
        Where queries and keys are the same tokens (training, prefill), `None` or a `Told` as a tensor, whose size grows
        with seqlen, not with its square. With a KV cache the latter if nothing is padding or `s2attn_mode` is `"s2"`.
        Otherwise, and where the cache has room to spare, what `sdpa` gets: `None` or bool `[batch, 1, queries, keys]`.

    Raises:
        ValueError: The mask holds other values than 0 and 1, or has holes, or padding under sequence parallelism or
            beside the cache of a window in S2-Attn, or the model asks for anything but causal attention, full or in a
            sliding window.
    """
    window = None
    if local_size is not None and local_size < kv_length:
        config = kwargs["config"]
        if attention_window(config) is None:  # transformers makes masks for layers that are not there, too
            return None
        _check_sliding(config, local_size, kv_length)
        window = local_size
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        check_zeros_and_ones(attention_mask)
    # Before 5.4, transformers passed the positions of the queries in place of their number.
    positions = kwargs.get("cache_position")
    q_length = kwargs["q_length"] if positions is None else positions.shape[0]
    device = kwargs.get("device") if positions is None else positions.device
    no_padding = attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all()))
    if q_length != kv_length:
        last = kwargs.get("q_offset", 0) + q_length == kwargs.get("kv_offset", 0) + kv_length
        s2 = getattr(kwargs.get("config"), "s2attn_mode", None) == "s2"
        if s2 and not last:
            raise ValueError(
                "S2-Attn takes a KV cache that holds as many keys as there are tokens (transformers' DynamicCache), "
                f"but this one has room for {kv_length}"
            )
        plain = mask_function is causal_mask_function or (window is not None and not use_vmap)
        in_parts = q_length > 1 and last and no_padding and plain and not torch.compiler.is_compiling()
        if not (s2 or in_parts):
            return sdpa_mask(
                batch_size=batch_size,
                kv_length=kv_length,
                mask_function=mask_function,
                attention_mask=attention_mask,
                local_size=local_size,
                use_vmap=use_vmap,
                **kwargs,
            )
    packed = None
    if mask_function is not causal_mask_function:
        packed = _documents_of(mask_function, batch_size, q_length, kv_length, use_vmap, device)
        if packed is not None and not torch.compiler.is_compiling() and not bool(packed.any()):
            packed = None  # a window made it a function of its own, which may hold the whole row
    if no_padding and packed is None and window is None and q_length == kv_length:
        return None
    if no_padding or attention_mask is None:
        return Told(packed, False, window).as_tensor(batch_size, device)
    if sequence_parallel()[1] > 1:
        raise ValueError(
            "attn_implementation='s2attn' takes no attention_mask with padding under sequence parallelism, where it "
            "would not reach the attention: pack the documents, and tell them by position_ids"
        )
    if kwargs.get("kv_offset", 0):
        raise ValueError(
            "S2-Attn counts groups from a row's first token, which padding hides once the cache of a sliding window "
            "has let go of it: take rows without padding, or set config.s2attn_mode='auto'"
        )
    attention_mask = attention_mask[:, :kv_length]
    start = doc_start_from_mask(attention_mask)
    return Told(torch.where(attention_mask.bool(), start, ~start), True, window).as_tensor(batch_size, device)


def _check_sliding(config: PreTrainedConfig, size: int, tokens: int) -> None:
    """Raise `ValueError` unless `size`, which some layers ask for, is that of a sliding window."""
    if size != getattr(config, "sliding_window", None) or size < 1:
        raise ValueError(
            "attn_implementation='s2attn' cannot express chunked attention, or a window of no tokens: this model asks "
            f"for {size} tokens, and there are {tokens}; use another attn_implementation"
        )
    if sequence_parallel()[1] > 1:
        raise ValueError(
            "attn_implementation='s2attn' takes no sliding window of the model's own under sequence parallelism, where "
            f"it might not reach the attention: this model asks for {size} tokens, and there are {tokens}"
        )


class Told(NamedTuple):
    """What a model tells its attention layers beside queries, keys and values.

    transformers passes a mask of four dimensions through untouched, also when `generate` prepares it ahead. So it goes
    as int32 `[batch, 1 or 2, 1 or window + 1, keys or 1]`, the middle ones of stride 0: nothing has to be read to know
    whether there is padding, or a window.
    """

    starts: torch.Tensor | None
    """int32 `[batch, keys]`: of a real token the index of its document's first one, of padding its complement."""
    padded: bool
    """Whether there may be padding."""
    window: int | None
    """The tokens that a row sees at most, itself the last of them: the model's own window."""

    def first_keys(self, rows: int) -> torch.Tensor | None:
        """int32 `[batch, rows]`: of the last rows the first token of their document; of padding, its own."""
        if self.starts is None:
            return None
        return torch.where(self.starts < 0, ~self.starts, self.starts)[:, self.starts.shape[1] - rows :]

    def as_tensor(self, batch: int, device: Any) -> torch.Tensor:
        """It as the mask that layers get."""
        starts = self.starts
        if starts is None:
            starts = torch.zeros((batch, 1), dtype=torch.int32, device=device)
        sizes = (1 if self.padded else 2, 1 if self.window is None else self.window + 1)
        return starts[:, None, None, :].expand(-1, *sizes, -1)


def _documents_of(
    mask_function: Callable, batch_size: int, q_length: int, kv_length: int, use_vmap: bool, device: Any
) -> torch.Tensor | None:
    """The documents, int32 `[batch, tokens]`, behind a mask function that is not plainly causal.

    transformers makes one for packed sequences. What it says of neighbouring tokens tells where documents start. One
    that lets a token see the next is an error.
    """
    refusal = ValueError(
        "attn_implementation='s2attn' is causal within each document: this model asks for another mask "
        "(bidirectional attention, or a mask function of its own); use another attn_implementation"
    )
    if use_vmap:  # set by transformers exactly when a model adds a mask function of its own
        raise refusal
    if q_length != kv_length or q_length == 1 or torch.device(device or "cpu").type == "meta":  # nothing to see there
        return None
    batch = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, q_length, device=device)[None, :]
    head = torch.zeros((1, 1), dtype=torch.long, device=device)
    sees_next = mask_function(batch, head, token - 1, token)
    if not torch.compiler.is_compiling() and bool(sees_next.any()):
        raise refusal
    starts = torch.where(mask_function(batch, head, token, token - 1), 0, token).expand(batch_size, -1)
    return torch.nn.functional.pad(starts.cummax(dim=1).values, (1, 0)).to(torch.int32)


def own_mask(attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> Told:
    """What `s2attn_mask` told; anything else is a mask of the caller's own, and refused."""
    if attention_mask is None:
        return Told(None, False, None)
    batch, keys, shape = query.shape[0], key.shape[2], attention_mask.shape
    coded = attention_mask.dtype == torch.int32 and attention_mask.ndim == 4
    coded = coded and shape[0] == batch and shape[1] in (1, 2) and shape[3] in (1, keys)
    if not coded or any(shape[i] > 1 and attention_mask.stride(i) for i in (1, 2)):
        raise ValueError(
            "attn_implementation='s2attn' takes a 2-D attention_mask [batch, tokens] of 0 and 1, but it got "
            f"a {attention_mask.ndim}-D mask of shape {list(attention_mask.shape)} and dtype "
            f"{attention_mask.dtype}; packed documents are told by position_ids"
        )
    starts = attention_mask[:, 0, 0] if shape[3] == keys else None
    return Told(starts, shape[1] == 1, None if shape[2] == 1 else shape[2] - 1)


def dense_mask(padding: torch.Tensor, documents: torch.Tensor | None, window: int | None = None) -> torch.Tensor:
    """The boolean mask `[batch, 1, tokens, tokens]` of a padded batch in eval mode.

    `generate` reads the row of the last token even where that is padding, so rows of padding see the real
    tokens before them, as with `sdpa`. Positions say nothing at padding: a document starts at a real token.
    """
    real = padding >= 0
    index = torch.arange(padding.shape[1], device=padding.device)
    allowed = (index[None, :] <= index[:, None]) & real[:, None, :]
    if documents is not None:
        first = torch.where((documents == index) & real, index, 0).cummax(dim=1).values
        allowed = allowed & (index >= first[:, :, None])
    if window is not None:
        allowed = allowed & (index[None, :] > index[:, None] - window)
    return allowed[:, None]
