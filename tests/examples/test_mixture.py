"""Sources with weights, and documents left out by their length (examples/app/inputs/mixture.py and its neighbours)."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inputs.document_lengths import Lengths
from app.inputs.mixture import mix
from app.inputs.sources import Source, read_sources
from tiny_texts import tokenised

pytestmark = pytest.mark.usefixtures("alone")


def test_weights_stand_behind_names() -> None:
    Path("books").mkdir()
    Path("chat.jsonl").touch()
    for words, expected in {
        ("books/:0.7", "chat.jsonl:0.3"): [("books/", 7), ("chat.jsonl", 3)],
        ("books:7", "*.jsonl:3"): [("books", 70), ("*.jsonl", 30)],
        ("books/:1e-1", "o/n:c:s:0.1", "o/n:0.1"): [("books/", 1), ("o/n:c:s", 1), ("o/n", 1)],
        ("not/there:2.5", "nor/this:2.5"): [("not/there", 25), ("nor/this", 25)],
    }.items():
        found = read_sources(words)
        assert [(source.name, source.weight * 10) for source in found if source.weight] == [
            (name, Fraction(weight)) for name, weight in expected
        ]
    for name in ("books", "chat.jsonl", "*.jsonl", "o/n:c:s", "o/n:2024", "o/n:train", "not/there"):
        assert read_sources([name]) == [Source(name)]


def test_a_name_with_a_colon_that_is_there_is_a_name() -> None:
    for name in ("a:0.5.txt", "b:0.5", "c:nan"):
        Path(name).touch()
    Path("d:1").mkdir()
    (Path("d:1") / "x.txt").touch()
    for name in ("a:0.5.txt", "b:0.5", "c:nan", "d:1", "d:1/x.txt", "*:0.5"):
        assert read_sources([name, "other"]) == [Source(name), Source("other")]
    assert [source.name for source in read_sources(["a:0.5.txt:1", "d:1:0.5", "?:0.5:2"])] == [
        "a:0.5.txt", "d:1", "?:0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["books/:0"], "books/:0: a weight must be a number above 0, as in books/:0.7, and this one is '0'"),
        (["books/:-1"], "this one is '-1'"),
        (["books/:nan", "x:1"], "this one is 'nan'"),
        (["books/:inf", "x:1"], "this one is 'inf'"),
        (["books/:", "x:1"], "this one is ''"),
        (["books/:70%"], "this one is '70%'"),
        (["books:0,7"], "this one is '0,7'"),
        (["books/:half", "x:1"], "this one is 'half'"),
        (["o/n:-0.5", "x:1"], "this one is '-0.5'"),
        (["books/:0.5"], "there is one source alone: leave the weight out"),
        (["books/:0.5", "x"], "books/ has a weight and x has none: give every source one, or none"),
        (["x", "books/:0.5"], "books/ has a weight and x has none: give every source one, or none"),
    ],
)
def test_what_is_no_weight_is_refused(words: list[str], message: str) -> None:
    Path("books").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)):
        read_sources(words)


def counting(lengths: list[int], first: int) -> list[list[int]]:
    """Documents of these lengths, each of a token of its own."""
    return [[first + number] * length for number, length in enumerate(lengths)]


def mixed(lengths: list[list[int]], weights: list[str], seed: int = 1) -> tuple[list[list[int]], list]:
    parts = [tokenised(counting(part, 1000 * number)) for number, part in enumerate(lengths)]
    sources = [Source(f"s{number}", Fraction(weight)) for number, weight in enumerate(weights)]
    text, shares = mix(parts, sources, seed)
    return [text.ids(n).tolist() for n in range(len(text.dataset))], shares


def test_shares_are_of_tokens_and_not_of_documents() -> None:
    books, chat = [1000] * 40, [10] * 3000
    texts, shares = mixed([books, chat], ["0.7", "0.3"])
    assert sum(len(text) for text in texts if text[0] < 1000) == 40_000  # the fewest for its weight: whole
    assert sum(len(text) for text in texts if text[0] >= 1000) == 17_140
    assert [share.describe("document") for share in shares] == [
        "s0 70.0% of the tokens, 70.0% asked: 40,000 of 40,000 tokens, 40 of 40 documents",
        "s1 30.0% of the tokens, 30.0% asked: 17,140 of 30,000 tokens, 1,714 of 3,000 documents",
    ]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=60), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from(["0.1", "0.3", "1", "7", "1e-1"]), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_documents_once_and_up_to_the_share(lengths: list[list[int]], weights: list[str], seed: int) -> None:
    weights = weights[: len(lengths)]
    unit = min(sum(part) / Fraction(weight) for part, weight in zip(lengths, weights, strict=True))
    budgets = [unit * Fraction(weight) for weight in weights]
    if any(budget < min(part) for budget, part in zip(budgets, lengths, strict=True)):
        with pytest.raises(ValueError, match="give it more weight, or split it"):
            mixed(lengths, weights, seed)
        return
    texts, shares = mixed(lengths, weights, seed)
    assert texts == sorted(texts) and len({text[0] for text in texts}) == len(texts)  # in their order, none twice
    for number, (part, budget, share) in enumerate(zip(lengths, budgets, shares, strict=True)):
        taken = [text[0] % 1000 for text in texts if text[0] // 1000 == number]
        assert all(len(text) == part[text[0] % 1000] for text in texts if text[0] // 1000 == number)
        left = [length for document, length in enumerate(part) if document not in taken]
        tokens = sum(part[document] for document in taken)
        assert tokens == share.tokens <= budget and all(tokens + length > budget for length in left)
        assert share.obtained == tokens / sum(map(len, texts))
    assert any(share.tokens == share.of_tokens for share in shares)  # the one with the fewest
    assert mixed(lengths, weights, seed)[0] == texts


def test_the_seed_chooses() -> None:
    lengths = [[10] * 10, [10] * 100]
    first, again, other = (mixed(lengths, ["1", "1"], seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_a_source_that_has_nothing_so_small_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="s0: its share of the mixture is 14 tokens, and its shortest document has 500"
    ):
        mixed([[500, 600], [10, 10]], ["0.7", "1"])


def test_lengths() -> None:
    text = tokenised(counting([3, 10, 5, 20, 10], 0))
    for least, most, kept, short, long in [
        (None, None, [3, 10, 5, 20, 10], 0, 0),
        (10, None, [10, 20, 10], 2, 0),
        (None, 9, [3, 5], 0, 3),
        (5, 10, [10, 5, 10], 1, 1),
    ]:
        found = Lengths(least, most).keep(text, "x")
        assert (found[0].lengths.tolist(), *found[1:]) == (kept, short, long)
    with pytest.raises(ValueError, match=r"x: no document has at least 6 and at most 9 tokens .* they have 3 to 20$"):
        Lengths(6, 9).keep(text, "x")
