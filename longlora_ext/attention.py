"""`attn_implementation="s2attn"` for transformers.

Importing this module registers the name with transformers' two public registries: `AttentionInterface` (what
an attention layer calls) and `AttentionMaskInterface` (what turns a model's mask arguments into what the
layer receives). Any decoder that routes its attention through them can use it:

    import longlora_ext.attention
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="s2attn")

A module in training mode runs S2-Attn; in eval mode, and so in `generate`, it runs dense attention with the
KV cache as it is. Three fields of the model's config are read:

- `s2attn_group_size` (even `int`): tokens a group; absent, a quarter of `max_position_embeddings`.
- `s2attn_mode`: `"auto"` (absent: the same), or `"s2"` and `"dense"` to ask for one of them in training and
  eval alike.
- `num_attention_heads`: the second half of the heads is shifted.

Documents are kept apart: padding (a 2-D `attention_mask`), packing (`position_ids` that restart, or
`cu_seq_lens_q`) all end up as the op's `doc_start`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longlora_ext.documents import (
    doc_start_from_cu_seqlens,
    doc_start_from_mask,
    doc_start_from_position_ids,
)
from longlora_ext.ops import s2attn

NAME = "s2attn"
MODES = ("auto", "s2", "dense")
DEFAULT_GROUP_RATIO = 0.25

# Arguments with which some models extend plain attention, and what each stands for. The op has none of them.
_UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capping of the logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


def even_group_size(tokens: float) -> int:
    """The largest even group size of at most `tokens` tokens, at least 2."""
    return max(2, int(tokens) // 2 * 2)


def group_size(config: PreTrainedConfig) -> int:
    """
    The group size that a model of this config trains with, in tokens.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            `s2attn_group_size` if it has one, otherwise a quarter of `max_position_embeddings`, made even.

    Raises:
        `ValueError`: `s2attn_group_size` is not a positive even integer.
    """
    size = getattr(config, "s2attn_group_size", None)
    if size is None:
        return even_group_size(config.max_position_embeddings * DEFAULT_GROUP_RATIO)
    if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
        raise ValueError(f"config.s2attn_group_size must be a positive even integer, but it is {size!r}")
    return size


def _config(module: torch.nn.Module) -> Any:
    return module.config


def _wants_s2(module: torch.nn.Module) -> bool:
    mode = getattr(_config(module), "s2attn_mode", None) or "auto"
    if mode not in MODES:
        raise ValueError(f"config.s2attn_mode must be one of {', '.join(map(repr, MODES))}, but it is {mode!r}")
    return mode == "s2" or (mode == "auto" and module.training)


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
        `ValueError`: the mask has holes, or the model asks for anything but full causal attention.
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


def s2attn_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention of one layer (transformers' attention interface).

    Args:
        module (`torch.nn.Module`):
            The attention layer; `training` and `config` are read.
        query, key, value (`torch.Tensor`):
            `[batch, heads, tokens, head_dim]`; key and value may have fewer heads, and more tokens (a KV
            cache).
        attention_mask (`torch.Tensor`, *optional*):
            What [`s2attn_mask`] made.
        dropout (`float`):
            Must be 0.
        scaling (`float`, *optional*):
            Factor of the logits, `head_dim ** -0.5` if absent.
        position_ids (`torch.Tensor`, *optional*):
            `[batch or 1, tokens]`: a document starts wherever they do not go up by one.

    Returns:
        `tuple[torch.Tensor, None]`: `[batch, tokens, heads, head_dim]`, and no attention weights.

    Raises:
        `ValueError`: the call asks for what the op cannot express.
    """
    _refuse_unsupported(module, key, value, dropout, kwargs)
    # Models in mixed precision rotate q and k in fp32; v comes straight from its projection and has the dtype
    # to compute in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    tokens = query.shape[2]
    whole = tokens == key.shape[2]
    wants_s2 = _wants_s2(module)
    if not whole:
        if wants_s2:
            raise ValueError(
                "S2-Attn needs the queries and keys of the same tokens, but a KV cache makes them "
                f"{tokens} and {key.shape[2]}: call model.eval(), or pass use_cache=False, or set "
                "config.s2attn_mode='auto'"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)

    padding = _own_mask(attention_mask, query)
    documents = _documents(position_ids, kwargs, query)
    if not (wants_s2 or module.training):
        return _dense_eval(module, query, key, value, padding, documents, scaling)
    if padding is not None:
        start = torch.where(padding < 0, ~padding, padding)
        documents = start if documents is None else torch.maximum(start, documents)
    if wants_s2:
        return _run(
            query,
            key,
            value,
            group_size(_config(module)),
            _first_shifted_head(module, query),
            documents,
            scaling,
        )
    return _dense(query, key, value, documents, scaling)


def _refuse_unsupported(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    what = next((text for name, text in _UNSUPPORTED.items() if kwargs.get(name) is not None), None)
    is_causal = kwargs.get("is_causal")
    if what is None and dropout > 0:
        what = f"attention dropout (it is {dropout}; set config.attention_dropout=0.0)"
    elif what is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        what = "bidirectional attention (is_causal=False)"
    elif what is None and kwargs.get("output_attentions"):
        what = "output_attentions=True (the weights are never formed)"
    elif what is None and value.shape[-1] != key.shape[-1]:
        what = f"a head dim of v ({value.shape[-1]}) other than that of q and k ({key.shape[-1]})"
    if what is not None:
        raise ValueError(
            f"attn_implementation='s2attn' cannot express {what}: use attn_implementation='eager' or 'sdpa' "
            "for this model"
        )


def _own_mask(attention_mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
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


def _documents(position_ids: torch.Tensor | None, kwargs: dict[str, Any], query: torch.Tensor) -> torch.Tensor | None:
    """The packed documents, int32 `[batch, tokens]`, or `None` if the call says nothing about them."""
    batch, _, tokens, _ = query.shape
    documents = None
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
            raise ValueError(
                f"position_ids must be [{batch}, {tokens}] or [1, {tokens}], but they are {list(position_ids.shape)}"
            )
        documents = doc_start_from_position_ids(position_ids).expand(batch, -1)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, but the batch has {batch}")
        packed = doc_start_from_cu_seqlens(cu_seqlens, tokens).to(query.device)
        documents = packed if documents is None else torch.maximum(packed, documents)
    return documents


def _first_shifted_head(module: torch.nn.Module, query: torch.Tensor) -> int:
    heads: int = _config(module).num_attention_heads
    if query.shape[1] != heads:
        raise ValueError(
            f"config.num_attention_heads is {heads}, but this layer has {query.shape[1]} heads: which of "
            "them are shifted is not known when heads are split over ranks"
        )
    return heads // 2


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    size: int,
    first_shifted_head: int,
    documents: torch.Tensor | None,
    scaling: float | None,
) -> tuple[torch.Tensor, None]:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return s2attn(q, k, v, size, documents, first_shifted_head=first_shifted_head, scale=scaling), None


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    scaling: float | None,
) -> tuple[torch.Tensor, None]:
    """Dense causal attention within each document: one group of all tokens, no head shifted."""
    heads, tokens = query.shape[1:3]
    return _run(query, key, value, tokens + tokens % 2, heads, documents, scaling)


def _dense_eval(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    documents: torch.Tensor | None,
    scaling: float | None,
) -> tuple[torch.Tensor, None]:
    """Dense attention outside training: `sdpa`'s own result, with packed documents kept apart besides."""
    if padding is not None:
        mask = _dense_mask(padding, documents)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    if documents is not None and (torch.compiler.is_compiling() or bool(documents.any())):
        return _dense(query, key, value, documents, scaling)
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)


def _dense_mask(padding: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
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


AttentionInterface.register(NAME, s2attn_forward)
AttentionMaskInterface.register(NAME, s2attn_mask)
