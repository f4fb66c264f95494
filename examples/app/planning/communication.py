"""What GPUs that share a sequence send each other: bytes of a layer and of a pass, by three ways."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from app.planning.shared_sequences import layout_of

#: The ways to attend to what others hold; a ring passes all keys and values around (Ring Attention), and is not ours.
WAYS = ("halo", "ulysses", "ring")


@dataclass(frozen=True)
class Sent:
    """Bytes that the GPU that sends most sends, in a layer's forward and in its backward pass, and in all layers'.

    Activation checkpointing does the forward pass twice.
    """

    forward: int
    backward: int
    all: int


def sent(
    config: PreTrainedConfig,
    tokens: int,
    gpus: int,
    way: str,
    *,
    batch: int = 1,
    itemsize: int = 2,
    group: int | None = None,
) -> Sent:
    """What a GPU sends of `batch` sequences that are one document each.

    Args:
        config: The model's, with the group size that it is trained with.
        tokens: Tokens of a sequence.
        gpus: How many share it.
        way: One of `WAYS`.
        batch: Sequences at a time.
        itemsize: Bytes of a number.
        group: Another group size.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = (getattr(config, "head_dim", None) or config.hidden_size // heads) * itemsize
    part = tokens // gpus
    if way == "halo":
        layout = layout_of(config, part * gpus, gpus, batch, group)
        pairs = [[layout.numbers_sent(one, other) for other in range(gpus)] for one in range(gpus)]
        forward = size * max(map(sum, pairs))
        backward = size * max(sum(row[gpu] for row in pairs) for gpu in range(gpus))  # what came goes back as gradients
    elif way == "ulysses":
        forward = backward = size * batch * (2 * heads + 2 * max(kv_heads, gpus)) * part * (gpus - 1) // gpus
    else:
        forward = size * batch * 2 * kv_heads * part * (gpus - 1)
        backward = 2 * forward  # keys and values once more, and their gradients
    return Sent(forward, backward, config.num_hidden_layers * (2 * forward + backward))
