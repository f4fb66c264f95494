"""Leaving documents out by their length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.inputs.tokenised import Tokenised
from app.runs.wording import counted


@dataclass(frozen=True)
class Lengths:
    """Which documents, or samples, are trained on.

    Attributes:
        least, most: Tokens that one must have, and may have; None: any number. A sample counts as long as it was
            before it was cut to the context.
    """

    least: int | None = None
    most: int | None = None

    def keep(self, text: Tokenised, name: str) -> tuple[Tokenised, int, int]:
        """Leave out what is too short or too long.

        Args:
            text: The documents.
            name: Of where they are from, for errors.

        Returns:
            The others, how many were too short, and how many too long.

        Raises:
            ValueError: None is left.
        """
        if self.least is None and self.most is None:
            return text, 0, 0
        lengths = text.whole_lengths
        short = lengths < (self.least or 0)
        long = lengths > (np.inf if self.most is None else self.most)
        if (short | long).all():
            asked = [
                f"{bound} {tokens:,}"
                for bound, tokens in (("at least", self.least), ("at most", self.most))
                if tokens is not None
            ]
            raise ValueError(
                f"{name}: no {text.noun} has {' and '.join(asked)} tokens (--min_document_tokens, "
                f"--max_document_tokens); they have {lengths.min():,} to {lengths.max():,}"
            )
        return text.select(np.flatnonzero(~(short | long))), int(short.sum()), int(long.sum())

    def describe(self, noun: str, short: int, long: int) -> str:
        """What was left out, in words."""
        parts = []
        if self.least is not None:
            parts.append(f"{counted(short, noun)} of fewer than {self.least:,} tokens")
        if self.most is not None:
            parts.append(f"{counted(long, noun)} of more than {self.most:,} tokens")
        return " and ".join(parts)
