"""S2-Attn in plain torch: the definition that every kernel is tested against. Slow, O(N^2) memory, tests only."""

import torch
from torch import Tensor


def s2attn_mask(
    seqlen: int,
    group_size: int,
    shifted: bool,
    doc_start: Tensor | None = None,
    device: torch.device | None = None,
    *,
    sink: bool = False,
    window: int | None = None,
    seqlen_k: int | None = None,
) -> Tensor:
    """Which keys each query row of a head sees: bool [seqlen, seqlen_k], [B, seqlen, seqlen_k] with `doc_start`.

    The queries are the last of the keys' tokens, so that row i is token i + seqlen_k - seqlen. It sees itself and what
    precedes it in its group, `window` tokens at most. Groups are cut every `group_size` tokens from the start of the
    document; in a shifted head the first cut comes after half a group. With `sink` it sees the first token of its
    document as well.
    """
    seqlen_k = seqlen if seqlen_k is None else seqlen_k
    i = torch.arange(seqlen_k - seqlen, seqlen_k, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    start = torch.zeros_like(i) if doc_start is None else doc_start.long()[..., None]
    half = group_size // 2 if shifted else 0
    same_group = (i - start + half) // group_size == (j - start + half) // group_size
    seen = same_group & (j >= start) & (j <= i)
    if window is not None:
        seen &= j > i - window
    return seen | (j == start) if sink else seen


def s2attn_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    doc_start: Tensor | None = None,
    *,
    first_shifted_head: int | None = None,
    scale: float | None = None,
    sink: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and log-sum-exp [B, H, N] of S2-Attn, computed in the dtype of `q`."""
    seqlen, heads, head_dim = q.shape[1:]
    first_shifted_head = heads // 2 if first_shifted_head is None else first_shifted_head
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))

    def mask(shifted: bool) -> Tensor:
        seqlen_k = k.shape[2]
        return s2attn_mask(
            seqlen, group_size, shifted, doc_start, q.device, sink=sink, window=window, seqlen_k=seqlen_k
        )

    masks = torch.stack([mask(head >= first_shifted_head) for head in range(heads)], dim=-3)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~masks, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2), scores.logsumexp(dim=-1)
