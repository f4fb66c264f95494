"""Sources with weights, and documents left out by their length (examples/app/inputs/mixture.py and its neighbours)."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_llama
from app.inputs.document_lengths import Lengths
from app.inputs.mixture import mix
from app.inputs.sources import Source, read_sources
from app.runs.json_files import read_json
from finetune_runs import losses, make_model, run, small_run
from same_run import assert_same_run
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


# Runs of the program


def write(path: Path, lengths: list[int], letter: str) -> Path:
    """JSON Lines of documents of these lengths less the end-of-sequence token, each with its number."""
    rows = [{"text": f"{letter}{number} ".ljust(length - 1, letter)} for number, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def material(tmp_path: Path) -> list[str]:
    """Arguments of a run on a mixture: of 20 documents of 400 tokens and of 200 of 50."""
    make_model(tmp_path / "model")
    write(tmp_path / "long.jsonl", [400] * 20, "a")
    write(tmp_path / "short.jsonl", [50] * 200, "b")
    words = small_run(Path("model"), Path("unused"), Path("out"), steps=4)
    place = words.index("--train_file")
    return [*words[:place], *words[place + 2 :]]


MIXED = ["--train_file", "long.jsonl:0.6", "short.jsonl:0.4"]


def banner(printed: str) -> dict[str, str]:
    lines = printed[printed.index("model:  ") :].splitlines()
    return {title.strip(): value.strip() for title, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_a_run_on_a_mixture(material: list[str], rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    finetune_llama.main([*material, *MIXED, "--rows", rows])
    said = banner(capsys.readouterr().out)
    # Every 20th document of each is held out: 19 of 400 are left, and 190 of 50.
    assert said["mixture"] == "long.jsonl 60.1% of the tokens, 60.0% asked: 7,600 of 7,600 tokens, 19 of 19 documents"
    assert said["short.jsonl 39.9% of the tokens, 40.0% asked"] == "5,050 of 9,500 tokens, 101 of 190 documents"
    assert said["text"] == "12,650 tokens in 120 documents" and "left out" not in said
    assert len(losses(Path("out"))) == 4
    kept = read_json(Path("out/run.json"))["settings"]
    assert (kept["train_weights"], kept["train_tokens"]) == ([0.6, 0.4], 12650)


def other(arguments: list[str], words: list[str]) -> list[str]:
    """With these in place of their like: a list is given once."""
    place = arguments.index("--train_file")
    rest = [*arguments[:place], *arguments[place + 3 :]] if "--train_file" in words else arguments
    return [*rest, *words]


def test_a_run_goes_on_with_its_mixture_alone(material: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    finetune_llama.main([*material, *MIXED])
    Path("undisturbed").symlink_to("out")
    begin = [*material, *MIXED, "--max_steps", "2"]
    begin[begin.index("out")] = "again"
    finetune_llama.main(begin)
    go_on = [*begin[:-1], "4", "--resume_from_checkpoint", "latest"]
    for words, message in [
        (["--train_file", "long.jsonl:0.5", "short.jsonl:0.5"], "train_weights was [0.6, 0.4] and is [0.5, 0.5]"),
        (["--train_file", "long.jsonl", "short.jsonl"], "train_weights was [0.6, 0.4] and is None"),
        (["--min_document_tokens", "10"], "min_document_tokens was None and is 10"),
        (["--max_document_tokens", "4000"], "max_document_tokens was None and is 4000"),
        (["--seed", "8"], "seed was 7 and is 8"),
    ]:
        with pytest.raises(SystemExit):
            finetune_llama.main(other(go_on, words))
        assert message in capsys.readouterr().err
    finetune_llama.main(other(go_on, ["--train_file", "long.jsonl:6", "short.jsonl:4"]))  # the same shares
    assert_same_run(Path("again"), Path("undisturbed"))


def test_a_mixture_is_repeated_from_another_folder(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune_llama.main([*material, *MIXED])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    finetune_llama.main(["--from_manifest", str(tmp_path / "out" / "run.json"), "--output_dir", "again"])
    assert losses(Path("again")) == pytest.approx(losses(tmp_path / "out"), abs=1e-6)


def test_conversations_are_mixed_too(material: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By samples, which count as long as they were before they were cut to the context."""
    for name, number, words in (("a.jsonl", 20, 40), ("b.jsonl", 60, 5)):
        draw = random.Random(number)
        rows = [{"instruction": f"Say {draw.random()}", "output": f"{n % 10} " * words} for n in range(number)]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune_llama.main([*material, "--task", "sft", "--train_file", "a.jsonl:1", "b.jsonl:1"])
    said = banner(capsys.readouterr().out)
    # 19 samples of about 120 tokens, and as many tokens of the short ones.
    assert re.fullmatch(r"a.jsonl 5\d.\d% of .* 50.0% asked: 2,263 of 2,263 tokens, 19 of 19 samples", said["mixture"])
    (short,) = (value for title, value in said.items() if title.startswith("b.jsonl "))
    tokens, samples = re.fullmatch(r"([\d,]+) of 2,\d+ tokens, (\d+) of 57 samples", short).groups()
    assert 2200 < int(tokens.replace(",", "")) <= 2263
    assert said["samples"].startswith(f"{19 + int(samples)} with ")
    material[material.index("out")] = "again"
    words = ["--task", "sft", "--train_file", "a.jsonl", "b.jsonl", "--max_document_tokens", "100"]
    finetune_llama.main([*material, *words, "--context_length", "64"])
    said = banner(capsys.readouterr().out)
    assert said["left out"] == "20 samples of more than 100 tokens"
    assert said["too long"].startswith("0 truncated")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "long.jsonl:nan", "short.jsonl:1"], "--train_file long.jsonl:nan: a weight must be"),
        (["--train_file", "long.jsonl:0.5", "short.jsonl"], "long.jsonl has a weight and short.jsonl has none"),
        (
            ["--train_file", "long.jsonl:1", "long.jsonl:1"],
            "long.jsonl is named twice: by long.jsonl and by long.jsonl",
        ),
        (["--train_file", "long.jsonl:1", "*.jsonl:1"], "long.jsonl is named twice: by long.jsonl and by *.jsonl"),
        (["--train_file", "long.jsonl:1", "gone.txt:1"], "gone.txt: no such file"),
        (["--train_file", "long.jsonl", "--eval_file", "short.jsonl:1"], "--eval_file short.jsonl:1 has a weight"),
        ([*MIXED, "--min_document_tokens", "100"], "short.jsonl: no document has at least 100 tokens"),
        (["--train_file", "long.jsonl:1e-9", "short.jsonl:1"], "its shortest document has 400"),
        ([*MIXED, "--min_document_tokens", "0"], "--min_document_tokens must be 1 or more, got 0"),
        ([*MIXED, "--max_document_tokens", "-3"], "--max_document_tokens must be 1 or more, got -3"),
        (
            [*MIXED, "--min_document_tokens", "9", "--max_document_tokens", "8"],
            "--min_document_tokens 9 is more than --max_document_tokens 8",
        ),
    ],
)
def test_a_run_that_cannot_be_mixed_is_refused(
    material: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main([*material, *words])
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "finetune_llama.py: error: " in line)
    assert message in line and "LONGLORA_TRACEBACK" not in line


@pytest.mark.full
def test_several_processes_choose_the_same(material: list[str], tmp_path: Path) -> None:
    """Two processes see in each step what one does: the same losses."""
    finetune_llama.main([*material, *MIXED])
    words = [*material, *MIXED]
    words[words.index("out")] = "two"
    words[words.index("--gradient_accumulation_steps") + 1] = "1"
    done = run(*words, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (read_json(Path(name, "run.json"))["settings"] for name in ("out", "two"))
    assert ours["train_sha256"] == theirs["train_sha256"]
    assert losses(Path("two")) == pytest.approx(losses(Path("out")), abs=2e-3)
