"""What `--train_file` names, each perhaps with the weight that it has in a mixture: `books/:0.7 chat.jsonl:0.3`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from app.inputs.files import HUB_NAME, is_there


@dataclass(frozen=True)
class Source:
    """Files, a folder, a glob pattern or a hub dataset.

    Attributes:
        name: As `load_documents` takes it.
        weight: Its share of the tokens, beside the weights of the others; None: all of it is taken.
    """

    name: str
    weight: Fraction | None = None


def read_sources(words: Sequence[str]) -> list[Source]:
    """Tell names from weights.

    What is there under a name with a colon is taken as it stands, and so is `OWNER/NAME:CONFIG` of the hub: a weight
    behind such a name has a decimal point.

    Raises:
        ValueError: A weight that is no number above 0, a single source with one, or weights for some sources only.
    """
    sources = [read_source(word) for word in words]
    weighted = [source for source in sources if source.weight is not None]
    if len(sources) == 1 and weighted:
        raise ValueError(
            f"{words[0]}: a weight is a share beside other sources, and there is one source alone: leave the weight out"
        )
    if plain := [source for source in sources if weighted and source.weight is None]:
        raise ValueError(
            f"{weighted[0].name} has a weight and {plain[0].name} has none: give every source one, or none"
        )
    return sources


def read_source(word: str) -> Source:
    """Tell the name of one source from its weight.

    Raises:
        ValueError: The weight is no number above 0.
    """
    name, _, number = word.rpartition(":")
    if not name or is_there(word):
        return Source(word)
    hub = HUB_NAME.fullmatch(word) and not is_there(name)
    try:
        weight = float(number)
    except ValueError:
        if HUB_NAME.fullmatch(word) or not is_there(name):
            return Source(word)
        weight = math.nan
    if hub and "." not in number:
        return Source(word)
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"{word}: a weight must be a number above 0, as in {name}:0.7, and this one is {number!r}")
    return Source(name, Fraction(str(weight)))
