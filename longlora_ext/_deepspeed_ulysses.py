"""What the attention has to know of DeepSpeed's Ulysses sequence parallelism.

There, each of several processes holds a part of every sequence. For the attention they exchange tokens for heads: each
gets all tokens, but only some of the heads, in order of the processes.
"""

from __future__ import annotations

import sys


def sequence_parallel() -> tuple[int, int]:
    """The rank of this process among those that share its sequences, and how many they are: 0 and 1 by itself."""
    state = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if state is None:
        return 0, 1
    try:
        return state.get_sequence_parallel_rank(), state.get_sequence_parallel_world_size()
    except AssertionError:  # how it says that there is no such group
        return 0, 1


def first_shifted_head(heads: int, local_heads: int) -> int:
    """Which of the `local_heads` query heads of this process is the first of the shifted half of all `heads`.

    Raises:
        ValueError: They are not this process's share under Ulysses.
    """
    if local_heads == heads:
        return heads // 2
    rank, ranks = sequence_parallel()
    if local_heads * ranks != heads:
        raise ValueError(
            f"config.num_attention_heads is {heads}, but this layer has {local_heads} heads: which of them are "
            "shifted is not known when heads are split over ranks in any way but DeepSpeed's Ulysses"
        )
    return min(max(heads // 2 - rank * local_heads, 0), local_heads)
