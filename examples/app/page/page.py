"""What examples/demo.py does, without its looks: count, answer, measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from app.evaluation.one_text import perplexity_of_text
from app.inputs.prompt import prompt_ids
from app.inputs.reading import decoded
from app.models.answer import generation_config, room_for, stream, tokens
from app.models.suitable import check_largest_token
from app.models.use_model import OpenedModel


class Page:
    """A model and what the page asks of it. What cannot be done is a `ValueError`, which the page shows.

    Args:
        opened: The model.
        beyond: Allow more tokens than the model was trained on.
    """

    def __init__(self, opened: OpenedModel, beyond: bool = False) -> None:
        self.opened, self.beyond = opened, beyond

    def read(self, file: str) -> str:
        """The text of a file, which must be UTF-8."""
        try:
            return decoded(Path(file).read_bytes())
        except ValueError as error:
            raise ValueError(f"{Path(file).name} {error}") from error

    def prompt(self, text: str, question: str) -> torch.Tensor:
        """The tokens of what is asked, int64 [1, tokens]."""
        if not text.strip():
            raise ValueError("there is no text: paste one, or open a file")
        ids = tokens(self.opened.tokenizer, text, question.strip() or None)
        check_largest_token(self.opened.base.config, int(ids.max()))
        return ids

    def count(self, text: str, question: str) -> str:
        """How many tokens that is, of how many."""
        read = self.prompt(text, question).shape[1] if text.strip() else 0
        left = self.opened.trained_length - read
        long = "" if left > 0 else " · **longer than the model's context**"
        return f"{read:,} of {self.opened.trained_length:,} tokens{long}"

    def answer(self, text: str, question: str, new: float, temperature: float) -> Iterator[tuple[str, str]]:
        """What is going on, and the answer so far; a piece more each time."""
        ids = self.prompt(text, question)
        left = max(1, self.opened.trained_length - ids.shape[1])
        room = room_for(self.opened, ids.shape[1], int(new) if self.beyond else min(int(new), left), self.beyond)
        config = generation_config(self.opened, room, bool(question.strip()), temperature=temperature)
        said, reads = "", f"{ids.shape[1]:,} tokens read, at most {room:,} to come"
        yield f"{reads} …", said
        for piece in stream(self.opened, ids, config):
            said += piece
            yield f"{reads} …", said
        yield f"{ids.shape[1]:,} tokens read", said

    def curve(self, text: str) -> list[tuple[int, int, float]]:
        """Perplexity by position of the text."""
        if not text.strip():
            raise ValueError("there is no text: paste one, or open a file")
        ids = prompt_ids(self.opened.tokenizer, text)
        check_largest_token(self.opened.base.config, max(ids, default=0))
        self.opened.check_length(len(ids), self.beyond, f"the text has {len(ids):,} tokens")
        return perplexity_of_text(self.opened, np.array(ids))
