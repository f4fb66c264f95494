"""The synthetic tasks of RULER (arXiv 2404.06654), by its definitions: what is hidden in a text, asked for, and right.

    niah_single      one key with one value                 niah_multivalue  one key with four, all asked for
    niah_multikey    four keys, one of them asked for       niah_multiquery  four keys, all asked for
    vt   variable tracking: a chain of assignments, VAR B = VAR A, and all names that come to one value
    cwe  common words: the ten words of a list that are there 30 times, the others 3 times
    fwe  frequent words: the three most frequent words of a coded text, whose frequencies fall by Zipf's law

Prompts, answer prefixes, needles and counts are RULER's. Other than there: words are made up, not of an English
dictionary, the list's own vocabulary grows with its length without an example before it, and vt has no example either.
Where nothing else is given, all needles lie in noise, as RULER's first single one; most of its others lie in essays.
Its two tasks of questions about documents need data sets and are left out; lm-eval has them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.evaluation.prompts import hidden

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLES = 4  # keys of multikey and multiquery, values of multivalue
HOPS = 4  # of a chain
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
FREQUENT, ALPHA = 3, 2.0  # words that are asked for, and the exponent of the frequencies
_LONGEST = 400  # letters of a sentence
_PIECE = re.compile(rf"(?s).{{1,{_LONGEST}}}(?:\n|$)|.{{1,{_LONGEST}}}(?:\s|$)|.{{1,{_LONGEST}}}")
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@dataclass(frozen=True)
class Question:
    """A task with its text left open.

    Attributes:
        prompt: The whole prompt, given how long its text shall be, in the task's own units.
        prefix: With which the answer begins.
        answers: What is to be in the answer.
    """

    prompt: Callable[[int], str]
    prefix: str
    answers: tuple[str, ...]


Haystack = Callable[[int], list[str]]


def noise(sentences: int) -> list[str]:
    """RULER's haystack of noise: the same sentences again and again."""
    return [NOISE] * sentences


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in scripts with white space behind them and in those without.

    A part that is longer than any sentence, as of a text without such marks, is cut: at the last line end, or else
    white space, or else letter that makes it short enough.
    """
    parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])(?![”’」』])", text)]  # noqa: RUF001
    return [piece.strip() for part in parts for piece in _PIECE.findall(part) if piece.strip()]


def of_text(sentences: Sequence[str]) -> Haystack:
    """A haystack of a text's sentences, from its beginning, and again where it is not long enough."""
    return lambda count: [sentences[i % len(sentences)] for i in range(count)]


def niah(rng: random.Random, haystack: Haystack, keys: int, values: int, queries: int) -> Question:
    """Needles in a haystack: `keys` of `values` each, of which `queries` are asked for."""
    names = _different(rng, keys, lambda: f"{_word(rng)}-{_word(rng)}")
    numbers = _different(rng, keys * values, lambda: str(rng.randrange(10**6, 10**7)))
    held = {name: numbers[i * values : (i + 1) * values] for i, name in enumerate(names)}
    needles = [
        f"One of the special magic numbers for {name} is: {value}." for name, some in held.items() for value in some
    ]
    rng.shuffle(needles)
    places = [rng.random() for _ in needles]
    asked = rng.sample(names, queries)
    of_what = asked[0] if queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    one = queries * values == 1
    some, kind, are, what = ("A", "number", "is", "What is") if one else ("Some", "numbers", "are", "What are all")
    between = "\n" if haystack is noise else " "

    def prompt(sentences: int) -> str:
        text = between.join(hidden(haystack(sentences), needles, places))
        return (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n{text}\n{what} the special magic {kind} for {of_what} mentioned "
            "in the provided text?"
        )

    prefix = f" The special magic {kind} for {of_what} mentioned in the provided text {are}"
    return Question(prompt, prefix, tuple(value for name in asked for value in held[name]))


def variable_tracking(rng: random.Random, haystack: Haystack) -> Question:
    """A chain of assignments in a haystack: which variables have the value that its first one is given?"""
    names = _different(rng, HOPS + 1, lambda: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)))
    value = str(rng.randrange(10**4, 10**5))
    links = [f"VAR {names[0]} = {value}"]
    links += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]  # noqa: RUF007
    places = sorted(rng.random() for _ in links)  # in their order

    def prompt(sentences: int) -> str:
        text = "\n".join(hidden(haystack(sentences), links, places))
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )

    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assgined the value {value}, they are: "
    )
    return Question(prompt, prefix, tuple(names))


def common_words(rng: random.Random) -> Question:
    """A numbered list: ten words are in it `COMMON_TIMES` times each, the others `RARE_TIMES` times."""
    seed = rng.random()
    common = _different(rng, COMMON, lambda: _word(rng))

    def prompt(rare: int) -> str:
        own = random.Random(seed)
        others = _different(own, rare, lambda: _word(own), common)
        words = common * COMMON_TIMES + others * RARE_TIMES
        own.shuffle(words)
        text = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{text}\nQuestion: What are the {COMMON} most common words in the above list?"
        )

    prefix = f" Answer: The top {COMMON} words that appear most often in the list are:"
    return Question(prompt, prefix, tuple(common))


def frequent_words(rng: random.Random) -> Question:
    """A coded text: the word of rank k is there in proportion to `k ** -ALPHA`; the first rank is dots."""
    seed = rng.random()
    words = _different(rng, FREQUENT, lambda: _coded(rng))

    def prompt(length: int) -> str:
        own = random.Random(seed)
        ranks = zipf_counts(length)
        others = _different(own, max(0, len(ranks) - FREQUENT - 1), lambda: _coded(own), words)
        text = [word for word, count in zip(["...", *words, *others], ranks, strict=False) for _ in range(count)]
        own.shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text?"
        )

    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Question(prompt, prefix, tuple(words))


def zipf_counts(length: int) -> list[int]:
    """How often the words of each rank are in a text of about so many words; none is there less than once."""
    first = length / 1.6449340668  # zeta(2), the sum of all k ** -2
    counts: list[int] = []
    while (count := int(first * (len(counts) + 1) ** -ALPHA)) >= 1:
        counts.append(count)
    return counts


def recall(answer: str, wanted: Sequence[str]) -> float:
    """The share of what is wanted that the answer holds, in whatever case: RULER's `string_match_all`."""
    said = answer.lower()
    return sum(word.lower() in said for word in wanted) / len(wanted)


@dataclass(frozen=True)
class Task:
    """How a question of a task is made with a haystack, how many tokens its answer may have, and how long its text is
    at least, in its own units (sentences, rare words, words)."""

    make: Callable[[random.Random, Haystack], Question]
    room: int
    least: int = HOPS


TASKS = {
    "niah_single": Task(lambda rng, haystack: niah(rng, haystack, 1, 1, 1), 128),
    "niah_multikey": Task(lambda rng, haystack: niah(rng, haystack, NEEDLES, 1, 1), 128),
    "niah_multivalue": Task(lambda rng, haystack: niah(rng, haystack, 1, NEEDLES, 1), 128),
    "niah_multiquery": Task(lambda rng, haystack: niah(rng, haystack, NEEDLES, 1, NEEDLES), 128),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(lambda rng, haystack: common_words(rng), 120, COMMON),
    "fwe": Task(lambda rng, haystack: frequent_words(rng), 50, 64),  # from which on the third word is a clear one
}


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 4)))


def _coded(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))


def _different(rng: random.Random, count: int, make: Callable[[], str], but: Sequence[str] = ()) -> list[str]:
    """So many different ones, none of them part of another, which would make it right in its place."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = make()
        others = [*but, *found] if count < 100 else but  # of many, those that are asked for are enough
        if word not in found and not any(word in other or other in word for other in others):
            found[word] = None
    return list(found)
