"""The attention of a model's layers where processes share its sequences.

A model is told so by a keyword of its forward pass, which transformers hands down to every attention layer:

    model(input_ids=part, position_ids=places, sequence_group=SequenceGroup(group))

So nothing is global, and nothing is changed: the same model, called without, attends to what it is given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

import longlora_ext.ops  # noqa: F401  (loads the operator)
from longlora_ext import _pattern
from longlora_ext._kernels import why_unsupported
from longlora_ext._mask import attention_window, own_mask
from longlora_ext.config import group_size, rope_type_of
from longlora_ext.parallel._halo import halo_s2attn
from longlora_ext.parallel._ulysses import ulysses_s2attn, why_not_ulysses

__all__ = ["WAYS", "SequenceGroup", "attend"]

#: How ranks attend to what others hold: by the halo where attention is short, else by Ulysses; or by one of them alone.
WAYS = ("auto", "halo", "ulysses")


class SequenceGroup:
    """Processes that share sequences, as a model's layers are told: its forward's keyword `sequence_group`.

    Args:
        group: The processes, in the order of the sequence; all by default.
        by: `"halo"`, `"ulysses"` or `"auto"`, which takes the halo for S2-Attn and for a model's own sliding windows,
            and Ulysses for dense attention; the other one where heads do not divide, or where the device has no kernels
            for the halo.

    Attributes:
        layers: How many attention layers have been called with it. If these are not all of a model's, or the model
            passes something from token to token beside its attention (`check_documents_apart` finds that), its
            sequences cannot be shared: `SequenceParallelTrainer` refuses such models, and who calls the model looks
            for themselves.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, by: str = "auto") -> None:
        if by not in WAYS:
            raise ValueError(f"sequences are shared by one of {', '.join(map(repr, WAYS))}, but not by {by!r}")
        self.group = dist.group.WORLD if group is None else group
        self.by, self.layers = by, 0

    @property
    def ranks(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)


def attend(
    shared: SequenceGroup,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    scaling: float | None,
    s2: bool,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """One layer's attention, of transformers' shapes: [batch, heads, rows of this rank, head_dim].

    Args:
        shared: The processes.
        module: The layer.
        query: Its queries, like keys and values in the dtype to compute in.
        key: Its keys.
        value: Its values.
        attention_mask: What `longlora_ext._mask.s2attn_mask` made of this rank's rows. Documents come from positions.
        position_ids: The place of each row in its document.
        scaling: Factor of the scores.
        s2: Whether it is S2-Attn, or dense.
        kwargs: What else the layer says.

    Returns:
        [batch, rows, heads, head_dim], and no attention weights.

    Raises:
        ValueError: The call asks for what cannot be shared.
    """
    told = own_mask(attention_mask, query, key)
    config: Any = module.config
    if position_ids is None or told.padded or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"{type(module).__name__} shares its sequences, and learns of documents and padding by position_ids alone: "
            "pass these, and neither cu_seq_lens_q nor a mask with padding"
        )
    if shared.ranks > 1:
        check_rope(config)
    if query.shape[2] != key.shape[2]:
        raise ValueError("processes that share a sequence have no KV cache: pass use_cache=False")
    if attention_window(config) is not None and "sliding_window" not in kwargs:
        raise ValueError(
            f"{type(module).__name__} does not tell its attention of the model's sliding window, so that it cannot be "
            "kept when processes share sequences"
        )
    shared.layers += 1
    heads, seqlen = query.shape[1], query.shape[2] * shared.ranks
    window = _pattern.smaller(told.window, kwargs.get("sliding_window"))
    pattern: dict[str, Any] = {"first_shifted_head": heads, "window": _pattern.clipped(window, seqlen)}
    size = seqlen + seqlen % 2
    if s2:
        size = group_size(config)
        pattern = {"first_shifted_head": heads // 2, **_pattern.of_layer(config, window, seqlen)}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    short = (s2 or pattern["window"] is not None) and why_unsupported(q.device, q.dtype, q.shape[3]) is None
    call = halo_s2attn if by_halo(shared.by, heads, k.shape[2], shared.ranks, short) else ulysses_s2attn
    return call(q, k, v, size, position_ids, group=shared.group, scale=scaling, **pattern), None


def check_rope(config: PreTrainedConfig) -> None:
    """Raise `ValueError` if the model rotates by the length of a sequence."""
    if (rope := rope_type_of(config)) in ("dynamic", "longrope"):
        raise ValueError(
            f"processes cannot share sequences with rope_type {rope!r}: it depends on a sequence's length, of which "
            "each sees a part"
        )


def by_halo(by: str, heads: int, kv_heads: int, ranks: int, short: bool) -> bool:
    """Whether a layer attends by the halo, or else by Ulysses.

    Args:
        by: One of `WAYS`.
        heads: Query heads.
        kv_heads: Key and value heads.
        ranks: How many share a sequence.
        short: Whether rows see few others (S2-Attn, a sliding window), and there are kernels for the halo.
    """
    if by != "auto":
        return by == "halo"
    return short or why_not_ulysses(heads, kv_heads, ranks) is not None
