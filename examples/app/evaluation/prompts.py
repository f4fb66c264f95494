"""The prompts that test whether a model finds something in a long text.

A prompt is an instruction, filler sentences with what is to be found among them, and a question that ends where the
answer begins, so that a base model answers as well as a chat model. The filler says nothing and repeats itself; only
the place of the needle makes the task easy or hard.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FILLER = (
    "The river runs past the old mill. ",
    "There is mist over the fields in the morning. ",
    "A cart stands in front of the barn. ",
    "The bells ring at noon. ",
    "Nobody is in a hurry today. ",
)

ADJECTIVES = ("amber", "brass", "copper", "green", "hollow", "ivory", "narrow", "round", "silver", "velvet")
NOUNS = ("anchor", "basket", "candle", "drum", "flute", "kettle", "ladder", "lantern", "mirror", "wheel")
DIGITS = 5
#: Where the pass key stands that `--check_retrieval` and the experiment ask for, as a share of the filler.
DEPTHS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Retrieval:
    """Something to find in a text.

    Attributes:
        instruction: What stands before the text.
        needles: The sentences to hide, the one that is asked for first.
        question: What stands behind the text.
        answer: The digits that are to be found.
    """

    instruction: str
    needles: tuple[str, ...]
    question: str
    answer: str

    def prompt(self, fillers: int, places: Sequence[float]) -> str:
        """The whole prompt.

        Args:
            fillers: How many sentences of filler.
            places: Where each needle goes, as a share of the filler that is before it: 0 is the start, 1 the end.
        """
        sentences = [FILLER[i % len(FILLER)] for i in range(fillers)]
        return self.instruction + "".join(hidden(sentences, self.needles, places)) + self.question


def hidden(sentences: Sequence[str], needles: Sequence[str], places: Sequence[float]) -> list[str]:
    """Sentences with needles among them, each behind its share of the sentences."""
    found, before = list(sentences), [round(place * len(sentences)) for place in places]
    # From the last place to the first, so that what is inserted moves none of the places to come.
    for i in sorted(range(len(places)), key=lambda i: (before[i], i), reverse=True):
        found.insert(before[i], needles[i])
    return found


def passkey(rng: random.Random) -> Retrieval:
    """One pass key in the text."""
    key = _digits(rng)
    return Retrieval(
        "A pass key is hidden in this text. Find it and remember it. Nothing else matters.\n\n",
        (f"The pass key is {key}. Remember it: {key} is the pass key. ",),
        "\n\nWhat is the pass key? The pass key is",
        key,
    )


def needles(rng: random.Random, count: int) -> Retrieval:
    """Codes of several things in the text, one of which is asked for."""
    names = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], count)
    codes: list[str] = []
    while len(codes) < count:
        code = _digits(rng)
        if code not in codes:
            codes.append(code)
    return Retrieval(
        "Codes are hidden in this text. Find them and remember which code belongs to what.\n\n",
        tuple(f"The code of the {name} is {code}. " for name, code in zip(names, codes, strict=True)),
        f"\n\nWhat is the code of the {names[0]}? The code of the {names[0]} is",
        codes[0],
    )


def _digits(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
