"""S2-Attn in plain torch: the definition that every kernel is tested against. Slow, O(N^2) memory, tests only."""

import torch
from torch import Tensor


def s2attn_mask(
    seqlen: int,
    group_size: int,
    shifted: bool,
    doc_start: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query row of a head sees: bool [seqlen, seqlen], [B, seqlen, seqlen] with `doc_start`.

    Row i sees itself and what precedes it in its group. Groups are cut every `group_size` tokens from the start of
    the document; in a shifted head the first cut comes after half a group.
    """
    i = torch.arange(seqlen, device=device)
    start = torch.zeros_like(i) if doc_start is None else doc_start.long()
    group = (i - start + (group_size // 2 if shifted else 0)) // group_size
    same_document = start[..., :, None] == start[..., None, :]
    same_group = group[..., :, None] == group[..., None, :]
    return same_document & same_group & (i[:, None] >= i[None, :])


def s2attn_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    doc_start: Tensor | None = None,
    *,
    first_shifted_head: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, D] and log-sum-exp [B, H, N] of S2-Attn, computed in the dtype of `q`."""
    seqlen, heads, head_dim = q.shape[1:]
    first_shifted_head = heads // 2 if first_shifted_head is None else first_shifted_head
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    masks = [s2attn_mask(seqlen, group_size, h >= first_shifted_head, doc_start, q.device) for h in range(heads)]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~torch.stack(masks, dim=-3), float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2), scores.logsumexp(dim=-1)
