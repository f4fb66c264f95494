"""Attention on sequences that several processes share, for any trainer.

Each process holds a part of every sequence. Two ways to attend to all of it, over a `torch.distributed` group:

    out = halo_s2attn(q, k, v, group_size, position_ids, group=group)      # S2-Attn: only neighbours' rows travel
    out = ulysses_s2attn(q, k, v, group_size, position_ids, group=group)   # any attention: tokens for heads

`halo_s2attn` moves what a rank's rows see beyond it, which does not grow with the sequence. `ulysses_s2attn` moves all
of q, k, v and the result, and wants the heads to divide; dense attention is better off with it.

A transformers model with `attn_implementation="s2attn"` takes either, told by a keyword of its forward pass:

    model(input_ids=part, position_ids=places, sequence_group=SequenceGroup(group))

and `longlora_ext.parallel.SequenceParallelTrainer` cuts the rows of a data set, and adds up loss and gradients.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longlora_ext.parallel._halo import halo_s2attn
from longlora_ext.parallel._ulysses import ulysses_s2attn

if TYPE_CHECKING:
    from longlora_ext.parallel._layers import SequenceGroup
    from longlora_ext.parallel._trainer import Cut, SequenceParallelTrainer, check_sequence_parallel

#: Where names are that need transformers.
_HOMES = {
    "SequenceGroup": "_layers",
    "Cut": "_trainer",
    "SequenceParallelTrainer": "_trainer",
    "check_sequence_parallel": "_trainer",
}

__all__ = [
    "Cut",
    "SequenceGroup",
    "SequenceParallelTrainer",
    "check_sequence_parallel",
    "halo_s2attn",
    "ulysses_s2attn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
