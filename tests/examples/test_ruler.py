"""RULER's synthetic tasks (app/evaluation/ruler.py): definitions by hand."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from app.evaluation import ruler

NEEDLE = r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\."


def question(task: str, seed: int = 0, haystack: ruler.Haystack = ruler.noise) -> ruler.Question:
    return ruler.TASKS[task].make(random.Random(seed), haystack)


@pytest.mark.parametrize(
    ("task", "keys", "values", "asked"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_needles_are_as_many_as_the_task_says(task: str, keys: int, values: int, asked: int) -> None:
    for seed in range(5):
        made = question(task, seed)
        prompt = made.prompt(100)
        found = re.findall(NEEDLE, prompt)
        by_key: dict[str, set[str]] = {}
        for key, value in found:
            by_key.setdefault(key, set()).add(value)
        assert len(by_key) == keys and all(len(some) == values for some in by_key.values())
        last = prompt.splitlines()[-1]
        named = [key for key in by_key if key in last]
        assert len(named) == asked and set(made.answers) == set().union(*(by_key[key] for key in named))
        assert all(key in made.prefix for key in named) and prompt.count(ruler.NOISE) == 100
        one = asked * values == 1
        assert last.startswith("What is the special" if one else "What are all the special")
        assert made.prefix.endswith(" is" if one else " are")


def test_needles_are_anywhere_and_the_same_at_each_length() -> None:
    places = []
    for seed in range(200):
        made = question("niah_single", seed)
        assert re.findall(NEEDLE, made.prompt(10)) == re.findall(NEEDLE, made.prompt(50))
        places.append(made.prompt(50).split("One of")[0].count(ruler.NOISE))
    assert min(places) < 5 and max(places) > 45


def test_the_words_around_a_haystack_are_those_of_ruler() -> None:
    """One number is asked for in the singular. Noise has a line for each of its repetitions, a text has not."""
    one, many = question("niah_single").prompt(3), question("niah_multivalue").prompt(3)
    assert one.startswith("A special magic number is hidden within the following text. ")
    assert many.startswith("Some special magic numbers are hidden within the following text. ")
    _, *lines, last = one.splitlines()
    assert sorted(line == ruler.NOISE for line in lines) == [False, True, True, True] and last.startswith("What is")
    assert question("niah_single", haystack=ruler.of_text(["First."])).prompt(3).count("\n") == 2


def test_a_text_is_a_haystack_and_begins_again() -> None:
    haystack = ruler.of_text(["First.", "Second.", "Third."])
    assert haystack(5) == ["First.", "Second.", "Third.", "First.", "Second."]
    assert question("niah_single", haystack=haystack).prompt(7).count("First.") == 3


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two?\n\nThree!  Four", ["One.", "Two?", "Three!", "Four"]),
        ("One\nline. Two", ["One\nline.", "Two"]),
        ("鱼游。鸟飞！\n「谁？」「我。」", ["鱼游。", "鸟飞！", "「谁？」「我。」"]),  # noqa: RUF001
        ("a" * 900, ["a" * 400, "a" * 400, "a" * 100]),
        ("aaa " * 300, [("aaa " * 100).strip()] * 3),
        (f"{'a ' * 99}\n{'b ' * 100}\n{'c ' * 150}", [f"{'a ' * 99}\n{'b ' * 99}b", f"{'c ' * 149}c"]),
        (" \n ", []),
    ],
)
def test_the_sentences_of_a_text(text: str, sentences: list[str]) -> None:
    assert ruler.sentences_of(text) == sentences


def test_a_chain_of_variables_can_be_followed_by_hand() -> None:
    """Each name but the first is assigned the one before it, which stands earlier; no other name is there."""
    for seed in range(20):
        made = question("vt", seed)
        text = made.prompt(30)
        assignments = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
        assert len(assignments) == ruler.HOPS + 1 == len(made.answers)
        value = {}
        for name, source in assignments:
            value[name] = value.get(source, source)
        asked = re.search(r"assigned the value (\d{5}) in the text above\.$", text)
        assert asked and {name for name, known in value.items() if known == asked[1]} == set(made.answers)
        assert f"5 variables are assgined the value {asked[1]}, they are: " in made.prefix


def test_common_words_are_more_common() -> None:
    for seed in range(5):
        made = question("cwe", seed)
        numbered = re.findall(r"(\d+)\. ([a-z]+)", made.prompt(40).split("\nQuestion")[0])
        assert [int(number) for number, _ in numbered] == list(range(1, 10 * 30 + 40 * 3 + 1))
        counts = Counter(word for _, word in numbered)
        assert {word for word, count in counts.items() if count == 30} == set(made.answers)
        assert sorted(counts.values()) == [3] * 40 + [30] * 10
        assert not any(a in b for a in made.answers for b in counts if a != b)  # or a wrong word were right


def test_frequent_words_fall_by_zipf_s_law() -> None:
    """By hand: 1000 words and an exponent of 2, so 607.9 / k^2."""
    assert ruler.zipf_counts(1000)[:5] == [607, 151, 67, 37, 24]
    for length in (64, 100, 1000):
        made = question("fwe", length)
        coded = made.prompt(length).split("coded words. ", 1)[1].split("\nQuestion")[0].split()
        first, *ranked = Counter(coded).most_common()
        assert first[0] == "..." and [word for word, _ in ranked[:3]] == list(made.answers)
        assert ranked[2][1] > ranked[3][1]  # the third is a clear one
        assert 0.7 * length < len(coded) <= length


@pytest.mark.parametrize(
    ("answer", "score"),
    [("12 and 34", 1.0), ("34", 0.5), ("AbC", 0.0), ("", 0.0), ("1 2 3 4", 0.0), ("x12x34", 1.0)],
)
def test_recall_by_hand(answer: str, score: float) -> None:
    assert ruler.recall(answer, ["12", "34"]) == score
    assert ruler.recall("ABC", ["abc"]) == 1 and ruler.recall("abc", ["ABC", "d", "e"]) == pytest.approx(1 / 3)
