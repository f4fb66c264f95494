"""What is measured of a model: perplexity by position, at short windows, pass keys, and copying over distance.

Attention is dense, as a model is used. Each measure is a forward pass or some, with nothing generated: the mean nats
(negative log-likelihood) per token of what is right move long before the number of right answers does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from app.evaluation.answer_nats import answer_ids, answer_losses
from app.evaluation.prompts import DEPTHS, passkey
from app.runs.precision import machine_dtype

SHORT_WINDOWS = 4  # of each document
PAIRS = 4  # of a span and its repetition, for each distance and row
ROWS = 2  # that hold such
LOGITS = 1024  # tokens whose logits exist at once


@contextmanager
def measuring(model: Any) -> Iterator[Any]:
    """Dense attention, no gradients. On a CPU by the operator, which is faster there than torch's."""
    config, training, dtype = model.config, model.training, machine_dtype()
    mode = getattr(config, "s2attn_mode", "auto")
    config.s2attn_mode = "dense"
    model.train(model.device.type == "cpu")
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            yield model
    finally:
        config.s2attn_mode = mode
        model.train(training)


def edges(context: int) -> list[int]:
    """The positions between which losses are averaged."""
    return [0, *(context * part // 8 for part in (1, 2, 4, 6, 8))]


def by_position(model: Any, documents: dict[str, list[int]], context: int) -> dict[str, Any]:
    """Mean nats per token of the first `context` tokens of each document, by position."""
    bounds, found = edges(context), {}
    for name, ids in documents.items():
        row = torch.tensor([ids[: context + 1]], device=model.device)
        losses = losses_of(model, hidden_states(model, row[:, :-1])[0], row[0, 1:])
        found[name] = [float(losses[begin:end].mean()) for begin, end in pairwise(bounds)]
    return {"edges": bounds, "nats": found}


def short_windows(model: Any, documents: dict[str, list[int]], length: int) -> dict[str, Any]:
    """Mean nats per token of windows of `length` tokens, each read by itself: what the short context has lost."""
    rows = [
        ids[begin : begin + length + 1]
        for ids in documents.values()
        for begin in range(0, length * SHORT_WINDOWS, length)
        if begin + length < len(ids)
    ]
    losses = []
    for row in rows:
        window = torch.tensor([row], device=model.device)
        losses.append(float(losses_of(model, hidden_states(model, window[:, :-1])[0], window[0, 1:]).mean()))
    return {"window": length, "nats": sum(losses) / len(losses)}


def pass_keys(model: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Any]:
    """The pass key at several depths of a text: mean nats per token of the right answer, and whether it is found.

    It is found if each of its tokens is the likeliest one, which is what greedy decoding writes.
    """
    nats, found = [], []
    for depth in DEPTHS:
        asked = passkey(random.Random(f"pass key {length} {depth}"))

        def tokens_of(fillers: int, asked: Any = asked, depth: float = depth) -> tuple[list[int], list[int]]:
            return answer_ids(tokenizer, asked.prompt(fillers, [depth]), f" {asked.answer}")

        # Not quite the most that fits: of 16,000 tokens 50 are left. All results so far are of these prompts.
        sentence = len(tokens_of(1000)[0]) / 1000
        fillers = int(length / sentence)
        while sum(map(len, tokens_of(fillers))) > length:
            fillers -= 1
        losses, likeliest = answer_losses(model, *tokens_of(fillers))
        nats.append(float(losses.mean()))
        found.append(likeliest)
    return {"length": length, "depths": list(DEPTHS), "nats": nats, "found": found}


def distances(context: int) -> list[int]:
    """How far a span is from its repetition."""
    return [distance for distance in (256, 1024, 4096) if distance < context // 2] + [context // 2, context * 7 // 8]


def span_of(context: int) -> int:
    """How many tokens are repeated."""
    return min(64, context // 64)


def copying(model: Any, documents: dict[str, list[int]], context: int) -> dict[str, Any]:
    """Random tokens in a text, which come again: mean nats per token of the repetition, by distance.

    The first eighth of it is left out, in which a model sees that it is one. Beside it stand the nats of the same
    tokens at their first place.
    """
    span = span_of(context)
    known = span // 8
    of_each: dict[int, list[float]] = {distance: [] for distance in distances(context)}
    first: list[float] = []
    words = sorted({token for ids in documents.values() for token in ids})
    for number, ids in enumerate(list(documents.values())[:ROWS]):
        rng = random.Random(f"copying {number} {context}")
        row = list(ids[:context])
        placed = places(rng, context)
        for begin, distance in placed:
            again = begin + distance
            row[begin : begin + span] = row[again : again + span] = rng.choices(words, k=span)
        tensor = torch.tensor([row], device=model.device)
        losses = losses_of(model, hidden_states(model, tensor[:, :-1])[0], tensor[0, 1:])
        for begin, distance in placed:
            # losses[i] is that of token i + 1
            first.append(float(losses[begin + known - 1 : begin + span - 1].mean()))
            again = begin + distance
            of_each[distance].append(float(losses[again + known - 1 : again + span - 1].mean()))
    return {
        "span": span,
        "distances": list(of_each),
        "nats": [mean(values) for values in of_each.values()],
        "of_each": list(of_each.values()),
        "pairs": [len(values) for values in of_each.values()],
        "first_time": mean(first),
    }


def places(rng: random.Random, context: int) -> list[tuple[int, int]]:
    """Where spans begin and how far their repetitions are, none of them on another or on the first token."""
    span = span_of(context)
    taken: list[int] = []
    found: list[tuple[int, int]] = []

    def is_free(begin: int) -> bool:
        return all(abs(begin - other) >= span for other in taken)

    for distance in sorted(distances(context), reverse=True):
        for _ in range(1000):
            begin = rng.randrange(1, context - span - distance)
            if is_free(begin) and is_free(begin + distance):
                taken += [begin, begin + distance]
                found.append((begin, distance))
            if sum(placed == distance for _, placed in found) == PAIRS:
                break
    return found


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a model's output layer is given: [batch, tokens, width]."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    states: torch.Tensor = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def losses_of(model: Any, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token, given the states [tokens, width] that predict it: float32 [tokens].

    For models whose logits are their output layer's result, and nothing more.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    parts = zip(states.split(LOGITS), wanted.split(LOGITS), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(head(s).float(), w, reduction="none") for s, w in parts])
