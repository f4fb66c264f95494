"""`evaluate.py perplexity --by_position`: against the losses of a plain forward pass."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.inputs.files import load_documents
from app.inputs.tokens import tokenise
from evaluate_runs import make_books, refusal, run
from finetune_runs import make_model


@pytest.fixture(autouse=True)
def inputs(alone: None, tmp_path: Path) -> None:
    """A model and four documents of 15, 51, 71 and 141 tokens."""
    make_model(tmp_path / "tiny")
    (tmp_path / "books").mkdir()
    make_books(tmp_path / "books")


def test_each_position_has_the_losses_of_its_tokens() -> None:
    done = run("perplexity", "--model", "tiny", "--text", "books", "--lengths", 30, "--by_position", 4)
    model = AutoModelForCausalLM.from_pretrained("tiny").double().eval()
    tokenised = tokenise(load_documents(["books"]), AutoTokenizer.from_pretrained("tiny"))
    columns: list[list[float]] = [[] for _ in range(30)]
    for number in range(len(tokenised.lengths)):
        ids = torch.as_tensor(tokenised.ids(number).astype("int64"))
        for row in ids[: len(ids) // 30 * 30].view(-1, 30):
            losses = torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
            for position, loss in enumerate(losses.tolist(), 1):
                columns[position].append(loss)
    windows = 51 // 30 + 71 // 30 + 141 // 30
    assert len(columns[1]) == windows == done["summary"]["windows"]
    edges = {"0-8": (1, 8), "8-15": (8, 15), "15-22": (15, 22), "22-30": (22, 30)}
    for name, (begin, end) in edges.items():
        flat = [loss for column in columns[begin:end] for loss in column]
        assert done["summary"]["perplexity"][name] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
        assert done["summary"]["scored"][name] == len(flat)
    assert list(done["summary"]["perplexity"]) == list(edges)
    assert matplotlib.image.imread("out/by_position.png").ndim == 3
    table = Path("out/results.txt").read_text().splitlines()
    assert table[0] == "perplexity by position in 7 windows of 30 tokens" and table[3].split()[0] == "0-8"


def test_the_parts_are_all_of_what_a_window_scores() -> None:
    """Their sum is what `--score all` makes of the same windows."""
    one = run("perplexity", "--model", "tiny", "--text", "books", "--lengths", 32, "--by_position", output="one")
    assert len(one["summary"]["perplexity"]) == 8
    for cell in one["cells"].values():
        assert sum(cell["by_position"]) == pytest.approx(cell["negative_log_likelihood"]) and cell["scored"] == 31


def test_as_many_parts_as_are_allowed_have_a_token_each() -> None:
    """Of one more, the first part would be the first token alone, which nothing predicts."""
    done = run("perplexity", "--model", "tiny", "--text", "books", "--lengths", 12, "--by_position", 8)
    assert len(done["summary"]["scored"]) == 8 and min(done["summary"]["scored"].values()) >= 1


def test_a_loss_that_is_no_number_is_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file it is the text "nan", from which the same command makes its table."""
    words = ("perplexity", "--model", "tiny", "--text", "books", "--lengths", 30, "--by_position", 2)
    monkeypatch.setattr("app.evaluation.position_task.losses_by_position", lambda *_, **__: np.full(29, np.nan))
    first = run(*words)
    shutil.rmtree("out/results.txt", ignore_errors=True)
    again = run(*words)
    assert set(map(str, first["summary"]["perplexity"].values())) == {"nan"}
    assert again["summary"] == first["summary"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", 16, 32], "--by_position reads windows of one length: give one --lengths"),
        (["--stride", 8], "--stride has no effect with --by_position"),
        (["--score", "all"], "--score has no effect with --by_position"),
        (["--keep_short"], "--keep_short has no effect with --by_position"),
        (["--batch_tokens", 8192], "--batch_tokens has no effect with --by_position"),
        (["--lengths", 8], "--by_position 8 is too many parts for windows of 8 tokens: at most 5"),
        (["--lengths", 11], "--by_position 8 is too many parts for windows of 11 tokens: at most 7"),
    ],
)
def test_what_does_not_go_together_is_an_error(words: list, message: str, capsys) -> None:
    given = ["perplexity", "--model", "tiny", "--text", "books", "--by_position", 8]
    assert message in refusal(capsys, *given, *words)
    assert "--by_position must be 1 or more, got 0" in refusal(capsys, *given[:-1], 0)


def test_documents_that_fill_no_window_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Which proposes nothing that --by_position does not take."""
    given = ["--model", "tiny", "--text", "books", "--lengths", 200, "--beyond_trained_length", "--by_position"]
    said = refusal(capsys, "perplexity", *given)
    assert said.endswith("the longest of 4 has 141: give other --text or smaller --lengths")
