"""The attention of a sequence that several GPUs share, as one of them has it, without the others.

It is that of `longlora_ext.parallel`, where nothing travels: what the others would send has the size that it has, which
is enough for a model without numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from longlora_ext._fields import kv_heads
from longlora_ext._mask import s2attn_mask
from longlora_ext._pattern import clipped, is_dense_layer, of_layer
from longlora_ext.config import attention_mode, group_size
from longlora_ext.parallel._exchange import Exchange
from longlora_ext.parallel._halo import HaloAttention
from longlora_ext.parallel._layers import by_halo
from longlora_ext.parallel._layout import Layout
from longlora_ext.parallel._ulysses import attend_by_heads

NAME = "s2attn_of_one_gpu"


class Nowhere:
    """Numbers that do not travel: room for what is sent and for what is received."""

    def __init__(self, sent: Sequence[Sequence[torch.Tensor]], counts: list[int], like: torch.Tensor, _: Any) -> None:
        flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
        self.sent = torch.cat(flat) if flat else like.new_empty(0)
        self.received, self.counts = like.new_empty(sum(counts)), counts

    def wait(self) -> list[torch.Tensor]:
        return list(self.received.split(self.counts))


class Alone(Exchange):
    """What one GPU sends and receives, by itself."""

    pending = Nowhere


class Swap(torch.autograd.Function):
    """What is received is of the size of what is sent, both ways."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(sent.contiguous())

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(sent[0].contiguous())


def layout_of(
    config: PreTrainedConfig,
    tokens: int,
    gpus: int,
    batch: int = 1,
    group: int | None = None,
    own_window: int | None = None,
) -> Layout:
    """Who lacks what of a sequence that is one document, in a layer with this sliding window of its own, or without.

    Its groups have the config's size or another.
    """
    heads = config.num_attention_heads
    part = tokens // gpus
    return Layout(
        ranks=gpus,
        length=part,
        positions=tuple((gpu * part,) * batch for gpu in range(gpus)),
        heads=heads,
        kv_heads=kv_heads(config),
        group_size=group or group_size(config),
        first_shifted_head=heads // 2,
        **of_layer(config, own_window, tokens),
    )


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [batch, heads, tokens of this GPU, head_dim], out [batch, tokens, heads, ...].

    `config.sequence_parallel_size` GPUs share a sequence by `config.sequence_parallel`.
    """
    config, gpus, by = module.config, module.config.sequence_parallel_size, module.config.sequence_parallel
    dense = attention_mode(config) == "dense" or is_dense_layer(module)
    tensors = tuple(x.transpose(1, 2) for x in (query, key, value))
    batch, part, heads, head_dim = tensors[0].shape
    tokens = gpus * part
    own_window = kwargs.get("sliding_window")
    window = clipped(own_window, tokens)
    if by_halo(by, heads, tensors[1].shape[2], gpus, short=not dense or window is not None):
        layout = layout_of(config, tokens, gpus, batch, own_window=own_window)
        if dense:
            whole = tokens + tokens % 2
            layout = replace(layout, group_size=whole, first_shifted_head=heads, window=window, sink=False)
        most = max(range(gpus), key=lambda gpu: sum(block.numbers for block in layout.lacking(gpu)))
        places = torch.empty(batch, part, dtype=torch.long, device=query.device)
        # The rows of sinks are not made: which there are is nothing that a shape says.
        layout = replace(layout, sink=False)
        exchange = Alone(layout, most, None)
        return HaloAttention.apply(*tensors, places, exchange, 1 / math.sqrt(head_dim), False), None
    first, size = (heads, tokens + tokens % 2) if dense else (heads // 2, group_size(config))
    pattern: Any = {"window": window} if dense else of_layer(config, own_window, tokens)
    q, k, v = tensors
    out = attend_by_heads((q, k, v), 0, gpus, Swap.apply, group_size=size, first_shifted_head=first, **pattern)
    return out, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, s2attn_mask)
