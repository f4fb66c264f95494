"""S2-Attn by torch's own attention, for devices, dtypes and head dims that have no kernel of ours.

Groups alone are causal calls of `scaled_dot_product_attention` on views (`_groups.py`); everything else is computed in
tiles of rows, with masks (`_tiles.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longlora_ext._arguments import Arguments
from longlora_ext._strided._calls import is_fused
from longlora_ext._strided._groups import by_groups
from longlora_ext._strided._tiles import by_tiles

__all__ = ["strided"]


def strided(
    q: Tensor, k: Tensor, v: Tensor, pattern: Arguments, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """S2-Attn with `torch.nn.functional.scaled_dot_product_attention`, on any device.

    Args:
        q: [B, N, H, D] of any floating dtype and any D.
        k: [B, Nk, Hkv, D], Nk >= N and Hkv divides H. The queries are the last of the keys' tokens.
        v: Like `k`.
        pattern: What a row sees, as in `longlora_ext.s2attn`.
        with_lse: The log-sum-exp of each row's scores is wanted, too.

    Returns:
        [B, N, H, D] contiguous, and the log-sum-exp [B, H, N] or `None`. Both can be differentiated.
    """
    plain = pattern.doc_start is None and pattern.window is None and q.shape[1] == k.shape[1]
    forms_scores = with_lse or not is_fused(q)
    if plain and not forms_scores:
        if pattern.scale < torch.finfo(torch.float32).tiny:  # with which torch multiplies its mask: -inf * 0 is NaN
            q, pattern = q * pattern.scale, pattern._replace(scale=1.0)
        return by_groups(q, k, v, pattern), None
    out, lse = by_tiles(q, k, v, pattern, forms_scores)
    return out, lse if with_lse else None
