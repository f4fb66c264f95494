"""Perplexity by position of one text, read as one window."""

from __future__ import annotations

import numpy as np

from app.evaluation.perplexity import Window, losses_by_position, perplexity_of
from app.models.use_model import OpenedModel


def perplexity_of_text(opened: OpenedModel, ids: np.ndarray, parts: int = 8) -> list[tuple[int, int, float]]:
    """How well the model predicts a text, with little before a token and with much.

    Args:
        opened: The model.
        ids: The text, integers [tokens], as long as the model may read or shorter.
        parts: Of equal length, in which the losses are averaged; as many as there are tokens to score at most.

    Returns:
        For each part its first position, the position behind its last one, and the perplexity of its tokens.

    Raises:
        ValueError: The text has fewer than 2 tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} token(s), and 2 are needed to score one")
    opened.forget_length()
    window = Window(0, 0, len(ids), len(ids) - 1)
    losses = losses_by_position(opened.model, [ids], window, device=opened.model.device)
    # The first token is predicted by nothing: losses[i] is that of position i + 1.
    split = np.array_split(losses, min(parts, len(losses)))
    edges = np.cumsum([1, *map(len, split)]).tolist()
    return [
        (begin, end, perplexity_of(float(part.sum()), len(part)))
        for begin, end, part in zip(edges, edges[1:], split, strict=False)
    ]
