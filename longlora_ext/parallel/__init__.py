"""Attention on sequences that several processes share, for any trainer.

Each process holds a part of every sequence. Two ways to attend to all of it, over a `torch.distributed` group:

    out = halo_s2attn(q, k, v, group_size, position_ids, group=group)      # S2-Attn: only neighbours' rows travel
    out = ulysses_s2attn(q, k, v, group_size, position_ids, group=group)   # any attention: tokens for heads

`halo_s2attn` moves what a rank's rows see beyond it, which does not grow with the sequence. `ulysses_s2attn` moves all
of q, k, v and the result, and wants the heads to divide; dense attention is better off with it.
"""

from longlora_ext.parallel._halo import halo_s2attn
from longlora_ext.parallel._ulysses import ulysses_s2attn

__all__ = ["halo_s2attn", "ulysses_s2attn"]
