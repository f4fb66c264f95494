"""`attn_implementation="s2attn"` for transformers.

Importing this module registers the name with transformers' two public registries: `AttentionInterface` (what
an attention layer calls) and `AttentionMaskInterface` (what turns a model's mask arguments into what the
layer receives). Any decoder that routes its attention through them can use it:

    import longlora_ext.attention
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="s2attn")

A module in training mode runs S2-Attn; in eval mode, and so in `generate`, it runs dense attention with the
KV cache as it is. These fields of the model's config are read:

- `s2attn_group_size` (even `int`): tokens a group; absent, a quarter of `max_position_embeddings`.
- `s2attn_sink` (`bool`): each row sees the first token of its document besides; absent, it does not.
- `s2attn_window` (`int`): each row sees so many tokens of its group at most; absent, all.
- `s2attn_dense_layers` (list of `int`): these layers attend densely in training too; absent, none.
- `s2attn_mode`: `"auto"` (absent: the same), or `"s2"` and `"dense"` to ask for one of them in training and
  eval alike.
- `num_attention_heads`, or what `num_attention_heads_per_layer` has for the layer: the second half of the heads is
  shifted.

A forward pass with `sequence_group=SequenceGroup(group)`, of `longlora_ext.parallel`, is on sequences that processes
share: documents are told by `position_ids` alone.

Under DeepSpeed's Ulysses sequence parallelism (`UlyssesSPAttentionHF`, `core_attn_implementation="s2attn"`) each
process attends with its share of the heads; documents are told by `position_ids` alone, and a mask is refused.

Documents are kept apart: padding (a 2-D `attention_mask`), packing (`position_ids` that restart, or
`cu_seq_lens_q`) all end up as the op's `doc_start`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from longlora_ext import _pattern
from longlora_ext._deepspeed_ulysses import first_shifted_head, sequence_parallel
from longlora_ext._dense import dense, dense_eval, run_op, sdpa
from longlora_ext._mask import attention_window, check_masks_of, own_mask, s2attn_mask
from longlora_ext._per_layer import query_heads
from longlora_ext._routed import check_class_of
from longlora_ext.config import attention_mode, group_size
from longlora_ext.documents import doc_start_from_cu_seqlens, doc_start_from_position_ids
from longlora_ext.parallel._layers import attend as attend_shared

__all__ = [
    "NAME",
    "attention_window",
    "s2attn_forward",
]

NAME = "s2attn"

# Arguments with which some models extend plain attention, and what each stands for. The op has none of them.
_UNSUPPORTED = {
    "softcap": "soft-capping of the logits",
    "position_bias": "a position bias",
}


def _wants_s2(module: torch.nn.Module) -> bool:
    config: Any = module.config
    mode = attention_mode(config)
    if _pattern.is_dense_layer(module):
        return False
    return mode == "s2" or (mode == "auto" and module.training)


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
    """Attention of one layer: the function behind transformers' attention interface.

    Args:
        module: The attention layer. Its `training` and `config` decide what it computes.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, KV heads, keys, head_dim]`. With a KV cache there are more keys than tokens.
        value: Like `key`.
        attention_mask: What `s2attn_mask` of this package made of the model's mask.
        dropout: Must be 0.
        scaling: Factor of the logits, `head_dim ** -0.5` if absent.
        position_ids: `[batch or 1, tokens]`. A document starts wherever they do not go up by one.
        kwargs: `cu_seq_lens_q`, `sliding_window`, `s_aux` (learned sinks) and `sequence_group`, if the model passes
            them. Others have no effect, or are an error where they change what is computed.

    Returns:
        `[batch, tokens, heads, head_dim]`, and `None` in place of attention weights, which are never formed.

    Raises:
        ValueError: The call asks for what the op cannot express.
    """
    _refuse_unsupported(module, dropout, kwargs)
    # Models in mixed precision rotate q and k in fp32; v comes straight from its projection and has the dtype
    # to compute in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    tokens, keys = query.shape[2], key.shape[2]
    wants_s2 = _wants_s2(module)
    if (shared := kwargs.get("sequence_group")) is not None:
        return attend_shared(shared, module, query, key, value, attention_mask, position_ids, scaling, wants_s2, kwargs)
    if tokens != keys and (attention_mask is None or attention_mask.dtype == torch.bool):
        if wants_s2:
            raise ValueError(
                "S2-Attn in training mode cannot go on with a KV cache by one token, with padding, or where the cache "
                f"has room to spare ({tokens} tokens, {keys} keys): call model.eval(), pass use_cache=False, or set "
                "config.s2attn_mode='s2'"
            )
        return sdpa(module, query, key, value, attention_mask, scaling, kwargs.get("s_aux"))

    told = own_mask(attention_mask, query, key)
    window = _pattern.smaller(told.window, kwargs.get("sliding_window", _pattern.window_of_layer(module)))
    told = told._replace(window=_pattern.clipped(window, keys))
    documents = _documents(position_ids, kwargs, query, keys)
    if not (wants_s2 or module.training):
        return dense_eval(module, query, key, value, told, documents, scaling, kwargs.get("s_aux"))
    if (start := told.first_keys(tokens)) is not None:
        documents = start if documents is None else torch.maximum(start, documents)
    if not wants_s2:
        return dense(query, key, value, documents, told.window, scaling, kwargs.get("s_aux"))
    config: Any = module.config
    return run_op(
        query,
        key,
        value,
        group_size(config),
        documents,
        scaling,
        kwargs.get("s_aux"),
        first_shifted_head=first_shifted_head(query_heads(module), query.shape[1]),
        **_pattern.of_layer(config, window, keys),
    )


def _unsupported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """What is asked of an attention that S2-Attn cannot express, if anything."""
    for name, text in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            return text
    if dropout > 0:  # formatted here alone: to torch.compile it may be a symbol, which goes into no text
        return f"attention dropout (it is {dropout}; set config.attention_dropout=0.0)"
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "bidirectional attention (is_causal=False)"
    has_sinks = kwargs.get("s_aux") is not None
    if has_sinks and (kwargs.get("sequence_group") is not None or sequence_parallel()[1] > 1):
        return "learned sinks where processes share sequences"
    return "output_attentions=True (the weights are never formed)" if kwargs.get("output_attentions") else None


def _refuse_unsupported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    what = _unsupported(module, dropout, kwargs)
    if what is not None:
        raise ValueError(
            f"attn_implementation='s2attn' cannot express {what}: use attn_implementation='eager' or 'sdpa' "
            "for this model"
        )


def _documents(
    position_ids: torch.Tensor | None, kwargs: dict[str, Any], query: torch.Tensor, keys: int
) -> torch.Tensor | None:
    """The packed documents, int32 `[batch, tokens]`, or `None` if the call says nothing about them.

    They count in keys, of which the tokens are the last. The first token's may have begun among the keys before it, as
    its position says, or before them.
    """
    batch, _, tokens, _ = query.shape
    documents = None
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
            raise ValueError(
                f"position_ids must be [{batch}, {tokens}] or [1, {tokens}], but they are {list(position_ids.shape)}"
            )
        documents = doc_start_from_position_ids(position_ids)
        if keys > tokens:
            began = (keys - tokens - position_ids[:, :1]).clamp(max=keys - tokens).to(torch.int32)
            documents = torch.where(documents == 0, began, documents + (keys - tokens))
        documents = documents.expand(batch, -1)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, but the batch has {batch}")
        packed = doc_start_from_cu_seqlens(cu_seqlens, tokens).to(query.device)
        documents = packed if documents is None else torch.maximum(packed, documents)
    return documents


AttentionInterface.register(NAME, s2attn_forward)
AttentionMaskInterface.register(NAME, s2attn_mask)
torch.nn.modules.module.register_module_module_registration_hook(check_masks_of)
torch.nn.modules.module.register_module_module_registration_hook(check_class_of)
