"""What GPUs that share a sequence send each other: bytes of a layer and of a pass, by three ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from transformers import PreTrainedConfig

from app.models.windows import own_windows
from app.planning.planner import Plan, PlannedRun, Way
from app.planning.shared_sequences import layout_of
from longlora_ext._fields import kv_heads
from longlora_ext.config import context_length
from longlora_ext.parallel._layout import Layout

#: GB that a GPU sends in a second, assumed: an H100's NVLink has 450, a 400 Gb/s network card 50.
LINK = 50.0
#: A group size that does not grow with the context, for comparison.
FIXED_GROUP = 8192

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
    size = (getattr(config, "head_dim", None) or config.hidden_size // heads) * itemsize
    part = tokens // gpus
    if way == "halo":
        return _sent_by_halo(
            Counter(own_windows(config)), size, partial(layout_of, config, part * gpus, gpus, batch, group)
        )
    elif way == "ulysses":
        forward = backward = size * batch * (2 * heads + 2 * max(kv_heads(config), gpus)) * part * (gpus - 1) // gpus
    else:
        forward = size * batch * 2 * kv_heads(config) * part * (gpus - 1)
        backward = 2 * forward  # keys and values once more, and their gradients
    return Sent(forward, backward, config.num_hidden_layers * (2 * forward + backward))


def _sent_by_halo(layers: Counter[int | None], size: int, layout_of_window: Callable[..., Layout]) -> Sent:
    """Of the kind of layers that sends most, and of all. `layers` are how many have each window of their own."""
    kinds = []
    for window, count in layers.items():
        layout = layout_of_window(own_window=window)
        gpus = range(layout.ranks)
        pairs = [[layout.numbers_sent(one, other) for other in gpus] for one in gpus]
        forward = size * max(map(sum, pairs))
        backward = size * max(sum(row[gpu] for row in pairs) for gpu in gpus)  # what came goes back as gradients
        kinds.append((forward, backward, count * (2 * forward + backward)))
    forward, backward, _ = max(kinds)
    return Sent(forward, backward, sum(total for *_, total in kinds))


def sending(plan: Plan) -> dict[str, dict[str, int]]:
    """What is sent by each way, in bytes, of a plan."""
    run, config = plan.run, plan.config
    gpus, size = run.sequence_parallel_size, run.dtype.itemsize
    return {way: asdict(sent(config, plan.tokens, gpus, way, batch=run.batch, itemsize=size)) for way in WAYS}


def sent_lines(found: dict[str, dict[str, int]], link: float) -> list[str]:
    """That, to read; `link` in bytes a second."""
    rows = (
        ("forward of a layer", lambda way: f"{found[way]['forward'] / 1e9:,.3f}"),
        ("backward of a layer", lambda way: f"{found[way]['backward'] / 1e9:,.3f}"),
        ("a pass, activations anew", lambda way: f"{found[way]['all'] / 1e9:,.2f}"),
        (f"its seconds at {link / 1e9:g} GB/s", lambda way: f"{found[way]['all'] / link:,.2f}"),
    )
    head = f"{'GB that a GPU sends':<32}" + "".join(f"{way:>16}" for way in WAYS)
    return [head, *(f"{name:<32}" + "".join(f"{text(way):>16}" for way in WAYS) for name, text in rows)]


def context_table(
    config: PreTrainedConfig, run: PlannedRun, contexts: Sequence[int], link: float, memory: float
) -> str:
    """For each context what a GPU sends in a layer's forward pass, how long a pass sends, and what a GPU holds.

    Args:
        config: The base model's.
        run: How it is trained.
        contexts: Tokens of a sequence.
        link: Bytes that a GPU sends in a second.
        memory: Bytes of a GPU.

    Raises:
        ValueError: A context is shorter than the model's own.
    """
    gpus, size, kinds = run.sequence_parallel_size, run.dtype.itemsize, Plan(config, context_length(config), run).kinds
    ways: tuple[tuple[str, str, int | None], ...] = (
        ("halo", "halo", None),
        (f"halo, G={FIXED_GROUP}", "halo", FIXED_GROUP),
        ("Ulysses", "ulysses", None),
        ("ring", "ring", None),
    )
    lines = [
        f"GB that each of {gpus} GPUs sends in a layer's forward, seconds that a pass sends at {link / 1e9:g} GB/s,",
        "and GB that it holds",
        f"{'context':>12}" + "".join(f"{name:>14}{'s':>8}" for name, _, _ in ways) + f"{'GB held':>10}{'fits':>6}",
    ]
    for tokens in contexts:
        if tokens < context_length(config):
            raise ValueError(f"--contexts: {tokens} is shorter than the model's own context, {context_length(config)}")
        plan = Plan(config, tokens, run, kinds)
        row = f"{tokens:>12,}"
        for _, way, group in ways:
            found = sent(plan.config, tokens, gpus, way, batch=run.batch, itemsize=size, group=group)
            row += f"{found.forward / 1e9:>14.3f}{found.all / link:>8.2f}"
        total = sum(plan.memory(Way()).values())
        lines.append(f"{row}{total / 1e9:>10.1f}{'yes' if total <= memory else 'no':>6}")
    return "\n".join(lines)
