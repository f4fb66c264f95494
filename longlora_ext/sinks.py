"""More keys for rows whose attention is done: a key and its value, or a logit that has none.

Attention is a mean of values, and the log-sum-exp of a row's scores is the weight it stands for. So a further key needs
only that weight, not the keys before it. Any part of a row's keys can be merged so, on any device.
"""

import torch
from torch import Tensor

__all__ = ["add_key", "add_learned_sink"]


def add_key(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    where: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lets each query row see one more key.

    With the first token of its document as the key, for the rows that do not see it, this is what `sink=True` of
    `longlora_ext.s2attn` does.

    Args:
        out: [B, N, H, D], what the rows have seen so far.
        lse: [B, H, N], the log-sum-exp of their scores, of `return_lse=True`.
        q: [B, N, H, D].
        k: [B, N, Hkv, D], for each row its own, or [B, 1, Hkv, D] for all; Hkv divides H.
        v: Like `k`.
        scale: Factor of q k^T.
        where: bool, broadcast to [B, H, N]: the rows that see it; all by default.

    Returns:
        `out` and `lse` with the key. Both can be differentiated.
    """
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    score = scale * (q.to(lse.dtype) * k.to(lse.dtype)).sum(-1).transpose(1, 2)
    if where is not None:
        score = score.masked_fill(~where, float("-inf"))
    merged = torch.logaddexp(lse, score)
    old, new = ((x - merged).exp().transpose(1, 2)[..., None] for x in (lse, score))
    # Not 0 * v: where the key is not seen, what it holds must not show, were it NaN.
    return (old * out + torch.where(new > 0, new * v, 0)).to(out.dtype), merged


def add_learned_sink(out: Tensor, lse: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Lets each query row see one more score that has no value, as gpt-oss does with a learned logit a head.

    Args:
        out: [B, N, H, D].
        lse: [B, H, N], of `return_lse=True`.
        logits: [H], the score, which `scale` does not multiply.

    Returns:
        `out` and `lse` with it. Both can be differentiated.
    """
    merged = torch.logaddexp(lse, logits.to(lse.dtype)[None, :, None].expand_as(lse))
    return ((lse - merged).exp().transpose(1, 2)[..., None] * out).to(out.dtype), merged
