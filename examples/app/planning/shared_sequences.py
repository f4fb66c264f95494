"""The attention of a sequence that several GPUs share (DeepSpeed's Ulysses), as one of them has it, without the others.

It makes the copies that DeepSpeed makes, and takes its own for what the others would send: enough for a model without
numbers, of which only shapes are asked.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from longlora_ext._mask import s2attn_mask
from longlora_ext._pattern import is_dense_layer, sink, window
from longlora_ext.config import attention_mode, group_size
from longlora_ext.ops import s2attn

NAME = "s2attn_of_one_gpu"


class Exchange(torch.autograd.Function):
    """What is received is of the size of what is sent, both ways."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(sent)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(sent[0].contiguous())


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [batch, heads, tokens of this GPU, head_dim], out [batch, tokens, heads, ...].

    `config.sequence_parallel_size` GPUs share a sequence.
    """
    config, gpus = module.config, module.config.sequence_parallel_size
    batch, heads, part, head_dim = query.shape
    key, value = (_repeated(states, gpus) for states in (key, value))
    q, k, v = (_heads_for_tokens(states, gpus) for states in (query, key, value))
    dense = attention_mode(config) == "dense" or is_dense_layer(module)
    tokens = gpus * part
    size, first = (tokens + tokens % 2, heads // gpus) if dense else (group_size(config), heads // gpus // 2)
    pattern: Any = {} if dense else {"sink": sink(config), "window": window(config)}
    out = s2attn(q, k, v, size, first_shifted_head=first, **pattern)
    sent = out.transpose(0, 1).reshape(gpus, part, batch, -1).contiguous()
    return Exchange.apply(sent).permute(2, 1, 0, 3).reshape(batch, part, heads, head_dim).contiguous(), None


def _repeated(states: torch.Tensor, gpus: int) -> torch.Tensor:
    """Fewer heads of keys and values than GPUs: several GPUs get the same."""
    return states.repeat_interleave(gpus // states.shape[1], dim=1) if states.shape[1] < gpus else states


def _heads_for_tokens(states: torch.Tensor, gpus: int) -> torch.Tensor:
    """A part of the tokens with all heads to all tokens with a part of the heads, [batch, tokens, heads, head_dim]."""
    batch, heads, part, head_dim = states.shape
    by_gpu = states.permute(2, 0, 1, 3).reshape(part, batch, gpus, heads // gpus, head_dim)
    received = Exchange.apply(by_gpu.permute(2, 0, 1, 3, 4).contiguous()).reshape(gpus * part, batch, -1, head_dim)
    return received.permute(1, 2, 0, 3).contiguous().transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, s2attn_mask)
