"""A mixture of sources, each with a share of the tokens.

The source that has the fewest tokens for its weight is used whole, once, and that says how many tokens the others give.
Their documents are drawn in a random order that follows from the seed, and each that still fits is taken, whole. So
nothing is repeated, and no source gives more than its share. What was chosen stays in the order of the text.

`datasets.interleave_datasets(probabilities=...)` draws by number of documents, not of tokens: of a source of books and
one of short answers with equal probabilities, nearly all tokens would be those of the books.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.inputs.sources import Source
from app.inputs.tokenised import Tokenised, joined


@dataclass(frozen=True)
class Share:
    """What a source gives to a mixture.

    Attributes:
        name: Of the source.
        asked, obtained: Its share of all tokens.
        tokens, of_tokens: Tokens that are taken, of how many.
        documents, of_documents: Documents or samples that are taken, of how many.
    """

    name: str
    asked: float
    obtained: float
    tokens: int
    of_tokens: int
    documents: int
    of_documents: int

    def describe(self, noun: str) -> str:
        """A line of the banner."""
        return (
            f"{self.name} {self.obtained:.1%} of the tokens, {self.asked:.1%} asked: {self.tokens:,} of "
            f"{self.of_tokens:,} tokens, {self.documents:,} of {self.of_documents:,} {noun}s"
        )


def mix(parts: Sequence[Tokenised], sources: Sequence[Source], seed: int) -> tuple[Tokenised, list[Share]]:
    """Choose documents so that each source has its share of the tokens.

    Args:
        parts: The documents of each source, all with tokens.
        sources: Their names and weights.
        seed: What the choice follows from.

    Returns:
        The chosen documents of all sources, and what each gives.

    Raises:
        ValueError: A source has no document that fits into its share.
    """
    weights = [source.weight or 0 for source in sources]
    # As fractions: the source that is used whole gets exactly the tokens that it has.
    unit = min(part.tokens / weight for part, weight in zip(parts, weights, strict=True))
    chosen = []
    for number, (part, source, weight) in enumerate(zip(parts, sources, weights, strict=True)):
        budget = math.floor(unit * weight)
        which = _fill(part.lengths, budget, np.random.default_rng([seed, number]))
        if not len(which):
            raise ValueError(
                f"{source.name}: its share of the mixture is {budget:,} tokens, and its shortest {part.noun} has "
                f"{part.lengths.min():,}: give it more weight, or split it"
            )
        chosen.append(part.select(which))
    total = sum(part.tokens for part in chosen)
    shares = [
        Share(
            name=source.name,
            asked=float(weight / sum(weights)),
            obtained=taken.tokens / total,
            tokens=taken.tokens,
            of_tokens=part.tokens,
            documents=len(taken.dataset),
            of_documents=len(part.dataset),
        )
        for source, weight, part, taken in zip(sources, weights, parts, chosen, strict=True)
    ]
    return joined(chosen), shares


def _fill(lengths: np.ndarray, budget: int, random: np.random.Generator) -> np.ndarray:
    """Which documents are taken, sorted: in a random order each that still fits."""
    taken = []
    for document in random.permutation(len(lengths)).tolist():
        if lengths[document] <= budget:
            budget -= int(lengths[document])
            taken.append(document)
    return np.sort(np.asarray(taken, dtype=np.int64))
