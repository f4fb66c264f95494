"""Samples of conversations in rows, and training on them (examples/app/inputs/samples.py, `--task sft`)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from transformers import AutoTokenizer

import finetune_llama
from app.evaluation.perplexity import sliding_window_perplexity
from app.inputs.chat import LLAMA_2
from app.inputs.samples import FEATURES, Samples, read_samples
from byte_tokens import ASKED, FORGETFUL, PLAIN, byte_tokenizer
from finetune_runs import ROOT, losses, make_model, small_run
from longlora_ext.data import pad_rows
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("own_cache")

PAD = 0


def samples(*lengths: int) -> Samples:
    """Samples whose tokens tell where they are from, `10 * sample + place`, the last two of each an answer."""
    ids = [[10 * (sample + 1) + place for place in range(length)] for sample, length in enumerate(lengths)]
    labels = [[-100] * (len(row) - 2) + row[-2:] for row in ids]
    columns = {"input_ids": ids, "labels": labels, "learned": [2] * len(ids), "lost": [0] * len(ids)}
    columns |= {"conversation": list(range(len(ids))), "ends": [[]] * len(ids), "unread": [[]] * len(ids)}
    return Samples(datasets.Dataset.from_dict(columns, features=FEATURES))


def test_a_sample_that_is_too_long_to_measure_hides_no_others() -> None:
    assert [len(ids) for ids in samples(90, 5, 7, 4).to_measure(13, longest=100)[0]] == [5, 7]
    assert samples(90, 50).to_measure(13, longest=100)[0] == []


# --- rows -------------------------------------------------------------------------------------------------------


def test_packed_rows_by_hand() -> None:
    rows = samples(3, 6, 4).rows(8, PAD, packed=True)
    assert [{name: values.tolist() for name, values in rows[i].items()} for i in range(len(rows))] == [
        {
            "input_ids": [20, 21, 22, 23, 24, 25, PAD, PAD],
            "labels": [-100, -100, -100, -100, 24, 25, -100, -100],
            "position_ids": [0, 1, 2, 3, 4, 5, 0, 1],
        },
        {
            "input_ids": [30, 31, 32, 33, 10, 11, 12, PAD],
            "labels": [-100, -100, 32, 33, -100, 11, 12, -100],
            "position_ids": [0, 1, 2, 3, 0, 1, 2, 0],
        },
    ]
    assert (rows.padding, rows.targets, rows.tokens) == (3, 6, 13)


def test_padded_rows_by_hand() -> None:
    rows = samples(3, 5).rows(8, PAD, packed=False)
    batch = pad_rows([rows[0], rows[1]], PAD)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[10, 11, 12, PAD, PAD], [20, 21, 22, 23, 24]],
        "labels": [[-100, 11, 12, -100, -100], [-100, -100, -100, 23, 24]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]],
    }


def test_samples_learn_the_same_in_any_row() -> None:
    """Packed, padded or alone: the losses of a sample's answers do not depend on what else is in the batch."""
    model, few = tiny_model().train(), samples(5, 9, 4, 7)
    totals = []
    for packed in (True, False):
        rows = few.rows(16, PAD, packed=packed)
        batch = pad_rows([rows[i] for i in range(len(rows))], PAD)
        labels = batch.pop("labels")
        assert (labels != -100).sum() == 8
        logits = model(**batch, use_cache=False).logits[:, :-1]
        totals.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
    alone = torch.zeros((), dtype=torch.float64)
    for sample in range(4):
        ids = torch.from_numpy(few.ids(sample))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, -3:-1]
        alone += torch.nn.functional.cross_entropy(logits, ids[0, -2:], reduction="sum")
    torch.testing.assert_close(totals[0], alone)
    torch.testing.assert_close(totals[1], alone)


def test_fingerprint_sees_labels_and_rows() -> None:
    few = samples(5, 9)
    other = few.dataset.map(lambda row: {"labels": [-100, *row["labels"][1:-1], -100]}, features=FEATURES)
    prints = [
        few.rows(16, PAD, packed=True).fingerprint(),
        few.rows(16, PAD, packed=False).fingerprint(),
        Samples(other).rows(16, PAD, packed=True).fingerprint(),
    ]
    assert prints[0]["train_sha256"] == prints[1]["train_sha256"] != prints[2]["train_sha256"]
    assert [found["rows"] for found in prints] == ["packed", "padded", "packed"]


def test_held_out_samples() -> None:
    train, held_out = samples(*[4] * 40).hold_out()
    assert (len(train.dataset), len(held_out.dataset)) == (38, 2)
    assert held_out.ids(0)[0] == 200 and held_out.labels(0).tolist()[:2] == [-100, -100]
    train, held_out = samples(4).hold_out()
    assert (len(train.dataset), len(held_out.dataset)) == (1, 0)


def test_a_conversation_is_held_out_as_a_whole(tmp_path: Path) -> None:
    """Of a template that makes two samples of each, and in two files: their rows are numbered apart."""
    tokenizer = byte_tokenizer(FORGETFUL, eos_token="<eos>")
    files = [write(tmp_path / f"{name}.jsonl", *[{"messages": ASKED}] * 2) for name in "ab"]
    read = read_samples(files, tokenizer, 128)
    assert read.column("conversation").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    train, held_out = read.hold_out()
    assert train.column("conversation").tolist() == [0, 0, 1, 1, 2, 2]
    assert held_out.column("conversation").tolist() == [3, 3]
    train, held_out = read_samples([write(tmp_path / "c.jsonl", {"messages": ASKED})], tokenizer, 128).hold_out()
    assert (len(train.dataset), len(held_out.dataset)) == (2, 0)


@pytest.mark.parametrize(
    ("window", "parts"), [(16, ((0, 9, 2), (0, 5, 2))), (4, ((4, 8, 1), (6, 9, 1), (0, 4, 1), (2, 5, 1)))]
)
def test_perplexity_of_answers_alone(window: int, parts: tuple[tuple[int, int, int], ...]) -> None:
    """As summed by hand over the labelled tokens: `parts` of the two samples, and of how many the last are scored."""
    model, few = tiny_model(), samples(9, 5)
    documents, labels = ([few.ids(i) for i in range(2)], [few.labels(i) for i in range(2)])
    losses = []
    for number, (begin, end, scored) in enumerate(parts):
        ids = torch.from_numpy(documents[2 * number // len(parts)][begin:end])
        logits = model(input_ids=ids[None]).logits[0, -scored - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, ids[-scored:], reduction="none").tolist()
    found = sliding_window_perplexity(model, documents, window, window // 2, labels=labels)
    assert found == pytest.approx(math.exp(np.mean(losses)))


# --- files ------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alpaca(words: int, answer: str = "yes") -> dict[str, str]:
    return {"instruction": "x" * words, "output": answer}


def test_both_forms_in_each_format_are_the_same_samples(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(LLAMA_2, eos_token="<eos>")
    instruction = {"instruction": "do it", "input": "with this", "output": "done", "file": "kept by LongAlpaca"}
    messages = {
        "messages": [{"role": "user", "content": "do it\n\nwith this"}, {"role": "assistant", "content": "done"}]
    }
    (tmp_path / "long.json").write_text(json.dumps([instruction]))
    pandas.DataFrame([messages]).to_parquet(tmp_path / "chat.parquet")
    files = [
        str(tmp_path / "long.json"), write(tmp_path / "long.jsonl", instruction),
        write(tmp_path / "chat.jsonl", messages), str(tmp_path / "chat.parquet"),
    ]  # fmt: skip
    read = read_samples(files, tokenizer, 64)
    assert len(read.dataset) == 4
    assert all(read.ids(i).tolist() == read.ids(0).tolist() for i in range(4))
    assert tokenizer.decode(read.ids(0)) == "[INST] do it\n\nwith this [/INST] done <eos>"
    assert tokenizer.decode(read.labels(0)[read.labels(0) != -100]) == " done <eos>"


def test_long_samples_are_truncated_or_dropped_and_counted(tmp_path: Path) -> None:
    """Of 20 tokens: one that fits, one whose answer is cut, one without any of its answer left."""
    tokenizer = byte_tokenizer(PLAIN.replace("<|{{ message.role }}|>", "").replace("<|assistant|>", ""), eos_token="!")
    rows = [alpaca(10, "a" * 6), alpaca(10, "b" * 30), alpaca(30, "c")]
    read = read_samples([write(tmp_path / "x.jsonl", *rows)], tokenizer, 20)
    assert read.lengths.tolist() == [20, 20] and read.dropped == 1
    assert read.column("learned").tolist() == [8, 8]
    assert read.column("lost").tolist() == [0, 24]
    with pytest.raises(ValueError, match="no answer begins within the context of 12 tokens"):
        read_samples([write(tmp_path / "y.jsonl", *rows)], tokenizer, 12)


def test_the_first_token_is_not_learned(tmp_path: Path) -> None:
    """Nothing stands before it, or in a packed row another sample does."""
    answer = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    tokenizer = byte_tokenizer(answer + " answers {{ messages[0].content }}", eos_token="!")
    read = read_samples([write(tmp_path / "x.jsonl", alpaca(3, "abc"))], tokenizer, 20)
    assert tokenizer.decode(read.ids(0)) == "abc answers xxx!"
    assert read.labels(0).tolist() == [-100, *read.ids(0)[1:3], *[-100] * 12, read.ids(0)[-1]]


def test_shipped_questions() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_llama")
    tokenizer.chat_template = LLAMA_2
    read = read_samples([str(ROOT / "examples" / "data" / "questions.jsonl")], tokenizer, 256)
    assert len(read.dataset) == 20 and read.dropped == 0 and not read.column("lost").any()


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("inputs") / "model")


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_a_run_learns_answers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str) -> None:
    """Answers that the question names, among questions that nothing can be learned of."""
    draw = np.random.default_rng(0)
    noise = ["".join(map(chr, draw.integers(97, 123, 20))) for _ in range(60)]
    data = [{"instruction": f"{text} say {'ab'[n % 2] * 8}", "output": "ab"[n % 2] * 8} for n, text in enumerate(noise)]
    data.append({"instruction": "y" * 200, "output": "never"})
    data = [{**row, "source": "made up"} for row in data]
    text = write(tmp_path / "data.jsonl", *data)
    finetune_llama.main([*small_run(model, Path(text), tmp_path / "out"), "--task", "sft", "--rows", rows])
    said = capsys.readouterr().out
    assert re.search(r"samples: +57 with [\d,]+ tokens, 627 of them in answers", said)
    assert "0 truncated to 128 tokens, 0 tokens lost; 1 dropped, their answers begin beyond that" in said
    assert ("samples packed whole" in said) == (rows == "packed")
    assert "not read:  columns source\n" in said
    assert "perplexity of the answers in 3 held-out samples" in said
    found = losses(tmp_path / "out")
    assert found[6] < found[1] - 0.2
    table = json.loads((tmp_path / "out" / "perplexity.json").read_text())["perplexity"]
    assert table["after"]["128"] < 0.8 * table["before"]["128"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter").chat_template == LLAMA_2

    sft = ["--task", "sft", "--rows", rows, "--resume_from_checkpoint", "latest"]
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    finetune_llama.main([*small_run(model, Path(text), tmp_path / "out"), *sft])
    assert "going on from checkpoint-4" in capsys.readouterr().out
    assert losses(tmp_path / "out") == found

    changed = write(tmp_path / "changed.jsonl", *data[1:], data[0])
    with pytest.raises(SystemExit):
        finetune_llama.main([*small_run(model, Path(changed), tmp_path / "out", steps=8), *sft])
    assert "checkpoint-6 belongs to another run: train_sha256 was" in capsys.readouterr().err


#: What stands in the file, and what is said of it.
BAD = {
    "columns": (
        [{"text": "x", "answer": "y"}],
        "data.jsonl, row 1: it has the columns text, answer; --task sft takes rows of",
    ),
    "role": (
        [{"messages": ASKED}, {"messages": [{"role": "bot", "content": "x"}]}],
        "data.jsonl, row 2: message 1 has the role 'bot'; known are system, developer, user",
    ),
    "keys": ([{"messages": [{"by": "human", "text": "x"}]}], "data.jsonl, row 1: message 1 is {'by': 'human',"),
    "answer": ([alpaca(1), alpaca(1, "")], "data.jsonl, row 2: its output is empty: there is no answer to learn"),
    "number": ([{"instruction": "x", "output": 5}], "data.jsonl, row 1: its output is 5, not text"),
    "turns": ([{"messages": [ASKED[1], *ASKED[1:3]]}], "data.jsonl, row 1: the model's chat template refuses it: "),
    "long": ([alpaca(500)], "data.jsonl: no answer begins within the context of 128 tokens (--context_length)"),
    "lines": (b'{"instruction": "x"\n', "cannot read "),
    "nothing": (b"", "data.jsonl as json: it has no rows"),
    "list": (b"[]", "data.jsonl as json: it has no rows"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_conversations_are_one_clear_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    content, message = BAD[what]
    text = tmp_path / "data.jsonl"
    text.write_bytes(content) if isinstance(content, bytes) else write(text, *content)
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main([*small_run(model, text, tmp_path / "out"), "--task", "sft"])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_llama.py: error: ")]
    assert len(said) == 1 and message in said[0]
    assert os.listdir(tmp_path / "out") == [".lock"]
