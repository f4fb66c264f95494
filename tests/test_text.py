"""Reading text, tokenising it, and packing it into sequences (examples/inputs/text.py)."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import longlora_ext.attention  # noqa: F401
from inputs.text import PackedSequences, Tokenised, find_files, hold_out, load_documents, tokenise
from training.report import _material

FEATURES = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
PAD = 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenised(documents: list[list[int]], chunks: int = 1) -> Tokenised:
    """Documents in `chunks` Arrow chunks, as a large corpus has."""
    parts = [documents[i::chunks] for i in range(chunks)]
    rows = [datasets.Dataset.from_dict({"input_ids": part}, features=FEATURES) for part in parts]
    return Tokenised(datasets.concatenate_datasets(rows))


def character_tokenizer(add_eos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(97 + i): 3 + i for i in range(26)} | {" ": 29}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


# --- packing ----------------------------------------------------------------------------------------------------


def test_packing_by_hand() -> None:
    packed = PackedSequences(tokenised([[10, 11, 12], [20], [30, 31, 32, 33, 34, 35]]), 4, PAD)
    rows = [{name: values.tolist() for name, values in packed[i].items()} for i in range(len(packed))]
    assert rows == [
        {"input_ids": [10, 11, 12, 20], "position_ids": [0, 1, 2, 0], "labels": [-100, 11, 12, -100]},
        {"input_ids": [30, 31, 32, 33], "position_ids": [0, 1, 2, 3], "labels": [-100, 31, 32, 33]},
        {"input_ids": [34, 35, PAD, PAD], "position_ids": [0, 1, 0, 1], "labels": [-100, 35, -100, -100]},
    ]
    assert packed.padding == 2
    with pytest.raises(IndexError):
        packed[3]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    context=st.integers(2, 48),
    chunks=st.integers(1, 3),
)
def test_packing_loses_nothing_and_keeps_documents_apart(lengths: list[int], context: int, chunks: int) -> None:
    # Token 1000 * d + p is token p of document d, so what a sequence holds tells where it is from.
    documents = tokenised([[1000 * (d + 1) + p for p in range(n)] for d, n in enumerate(lengths)], chunks)
    order = [documents.ids(d) for d in range(len(lengths))]
    packed = PackedSequences(documents, context, PAD)
    sequences = [packed[i] for i in range(len(packed))]

    assert all(v.shape == (context,) and v.dtype == torch.int64 for s in sequences for v in s.values())
    stream = np.concatenate([s["input_ids"].numpy() for s in sequences] or [np.empty(0)])
    total = packed.tokens
    assert total == sum(lengths) or (total == sum(lengths) - 1 and total % context == 0 and total > 0)
    assert stream[:total].tolist() == [token for ids in order for token in ids.tolist()][:total]
    assert stream[total:].tolist() == [PAD] * packed.padding
    assert packed.padding < context

    for index, sequence in enumerate(sequences):
        ids, positions, labels = (sequence[k].tolist() for k in ("input_ids", "position_ids", "labels"))
        for place, token in enumerate(ids):
            is_padding = index * context + place >= total
            continues = place > 0 and not is_padding and token == ids[place - 1] + 1
            if is_padding:
                continues = place > 0 and index * context + place - 1 >= total
            assert positions[place] == (positions[place - 1] + 1 if continues else 0)
            assert labels[place] == (-100 if is_padding or positions[place] == 0 else token)


def test_no_sequence_is_a_single_token() -> None:
    """Which has no target; but for a text of one token, that its lack of targets be told."""
    text = tokenised([[10, 11, 12], [20, 21]])
    packed = PackedSequences(text, 4, PAD)
    assert (
        _material(text, packed)["sequences"]
        == "1 of 4 tokens, 0 of them padding; the last token of the text is left out"
    )
    assert (len(packed), packed.tokens, packed.targets, packed.padding) == (1, 4, 2, 0)
    assert packed.fingerprint()["train_tokens"] == 5
    assert packed[0]["input_ids"].tolist() == [10, 11, 12, 20]
    whole = PackedSequences(tokenised([[10, 11, 12], [20, 21, 22]]), 4, PAD)
    assert (len(whole), whole.tokens, whole.padding) == (2, 6, 2)
    alone = PackedSequences(tokenised([[10]]), 4, PAD)
    assert (len(alone), alone.tokens, alone.targets) == (1, 1, 0)


def test_context_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length must be 2 or more, got 1"):
        PackedSequences(tokenised([[1, 2]]), 1, PAD)


def test_packed_documents_do_not_see_each_other_in_training() -> None:
    """What the position ids are for: in training, a document's losses do not depend on its neighbours."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, s2attn_group_size=8,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="s2attn").double().train()
    first, second = list(range(2, 13)), list(range(20, 39))
    logits = []
    for changed in (0, 1):
        packed = PackedSequences(tokenised([[token + changed for token in first], second]), 32, PAD)
        batch = {name: values[None] for name, values in packed[0].items()}
        logits.append(model(**batch, use_cache=False).logits[0])
    assert not torch.equal(logits[0][: len(first)], logits[1][: len(first)])
    start, end = len(first), len(first) + len(second)
    torch.testing.assert_close(logits[0][start:end], logits[1][start:end], rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=12), context=st.integers(2, 9))
def test_targets_are_the_labels(lengths: list[int], context: int) -> None:
    packed = PackedSequences(tokenised([[5] * n for n in lengths]), context, PAD)
    assert packed.targets == sum(
        int((item["labels"] != -100).sum()) for item in map(packed.__getitem__, range(len(packed)))
    )


def test_fingerprint_sees_tokens_order_and_borders() -> None:
    texts = ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]], [[1, 2], [4]])
    prints = [PackedSequences(tokenised(text), 4, PAD).fingerprint() for text in texts]
    assert len({found["train_sha256"] for found in prints}) == 5
    assert prints[0] == PackedSequences(tokenised(texts[0]), 8, PAD).fingerprint()
    assert prints[0]["train_documents"] == 2 and prints[0]["train_tokens"] == 3


def test_largest_id() -> None:
    assert tokenised([[1, 9], [], [3]]).largest_id == 9
    assert tokenised([[1, 9], [3]]).input_ids.select([1]).num_rows == 1
    assert tokenised([]).largest_id == -1


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n\nstill first\n")
    (folder / "more" / "b.md").write_text("second")
    (folder / "c.jsonl").write_text('{"text": "third"}\n{"text": null, "id": 1}\n{"text": "fourth"}\n')
    (folder / "d.json").write_text(json.dumps([{"text": "fifth", "body": "sixth"}]))
    pandas.DataFrame({"text": ["seventh", ""], "n": [1, 2]}).to_parquet(folder / "e.parquet")
    (folder / "ignored.bin").write_bytes(b"\0")
    return folder


def test_each_format_and_each_way_to_name_files(files: Path) -> None:
    def read(*sources: Path | str, column: str = "text") -> list[str | None]:
        return load_documents([str(source) for source in sources], column)["text"][:]

    assert read(files / "a.txt") == ["first\n\nstill first\n"]
    assert read(files / "c.jsonl") == ["third", None, "fourth"]
    assert read(files / "d.json") == ["fifth"]
    assert read(files / "d.json", column="body") == ["sixth"]
    assert read(files / "e.parquet") == ["seventh", ""]
    assert read(files / "e.parquet", files / "a.txt")[0] == "seventh"
    assert read(files / "*.txt", files / "more" / "b.md") == ["first\n\nstill first\n", "second"]
    assert read(files / "**" / "*.md") == ["second"]
    assert sorted(filter(None, read(files))) == sorted(
        ["first\n\nstill first\n", "second", "third", "fourth", "fifth", "seventh"]
    )


def test_text_column_does_not_concern_text_files(files: Path) -> None:
    assert load_documents([str(files / "d.json"), str(files / "a.txt")], "body")["text"][:] == [
        "sixth",
        "first\n\nstill first\n",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.txt", "no such file, folder or glob pattern"),
        (lambda folder: folder / "*.tsv", "no such file, folder or glob pattern"),
        (lambda folder: folder / "ignored.bin", r"cannot read files ending in '.bin'; can read .json, "),
        (lambda folder: _touch(folder / "empty"), "holds no file to train on"),
        (lambda folder: _write(folder / "x.jsonl", b'{"body": "x"}\n'), "no column 'text'; it has body"),
        (lambda folder: _write(folder / "x.jsonl", b'{"text": [1, 2]}\n'), "not text"),
        (lambda folder: _write(folder / "x.jsonl", b'{"text": "x\n'), "cannot read .*x.jsonl as json"),
        (lambda folder: _write(folder / "x.jsonl", b""), "x.jsonl is empty"),
        (lambda folder: _write(folder / "x.json", b"[]"), "x.json as json: it has no rows"),
        (lambda folder: _write(folder / "x.txt", b"\xff\xfe\xfa"), "cannot read .*x.txt as text: .*utf-8"),
        (lambda folder: _write(folder / "x.parquet", b"nothing"), "cannot read .*x.parquet as parquet"),
    ],
)
def test_what_cannot_be_read_is_named(files: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_documents([str(make(files))])


def _write_document(path: Path, text: str) -> None:
    if path.suffix == ".parquet":
        pandas.DataFrame({"text": [text]}).to_parquet(path)
    else:
        path.write_text(text if path.suffix == ".txt" else json.dumps({"text": text}) + "\n")


def _touch(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_name_is_no_pattern(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "g[1]"
    folder.mkdir()
    for name in ("a[1]", "a1", "b*", "b2", "c:d"):
        _write_document(folder / f"{name}{suffix}", name)
    assert load_documents([str(folder / f"a[1]{suffix}")])["text"][:] == ["a[1]"]
    assert sorted(load_documents([str(folder)])["text"]) == ["a1", "a[1]", "b*", "b2", "c:d"]


def test_a_relative_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file:x.txt").write_text("x")
    assert load_documents(["file:x.txt"])["text"][:] == ["x"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_two_colons_are_refused(tmp_path: Path, suffix: str) -> None:
    _write_document(tmp_path / f"a::b{suffix}", "x")
    with pytest.raises(ValueError, match=f"^/.*/a::b{suffix}: files with '::' in their path cannot be read"):
        load_documents([str(tmp_path)])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("how", ["written over", "moved there"])
def test_another_text_with_the_same_time_is_read_anew(tmp_path: Path, suffix: str, how: str) -> None:
    text, other = tmp_path / f"text{suffix}", tmp_path / f"other{suffix}"
    for path, content in ((text, "aaa"), (other, "bbb")):
        _write_document(path, content)
        os.utime(path, (1e9, 1e9))
    tokenizer = character_tokenizer()
    assert tokenise(load_documents([str(text)]), tokenizer).ids(0).tolist() == [3, 3, 3, 1]
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    shutil.copy2(other, text) if how == "written over" else other.replace(text)
    assert text.stat().st_mtime == 1e9
    assert tokenise(load_documents([str(text)]), tokenizer).ids(0).tolist() == [4, 4, 4, 1]


def test_the_same_text_comes_from_the_cache(tmp_path: Path) -> None:
    text = _write(tmp_path / "x.txt", b"abc")
    first, again = (load_documents([str(text)]) for _ in range(2))
    assert first.cache_files == again.cache_files and len(list((tmp_path / "cache").glob("text/*"))) == 1


def test_hub_names_are_recognised() -> None:
    for name in ("owner/name", "owner/name:config", "owner/name:config:validation"):
        assert find_files(name) == []
    for name in ("name", "owner/name.txt", "a/b/c", "owner/name:a:b:c"):
        with pytest.raises(FileNotFoundError):
            find_files(name)


def test_hub_dataset_that_cannot_be_loaded_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="owner/name is no local file or folder, and as a dataset of the hub"):
        load_documents(["owner/name"])


def test_hub_dataset_is_loaded_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: str | None, **kwargs: str) -> datasets.Dataset:
        asked.append((*args, kwargs))
        return datasets.Dataset.from_dict({"text": ["from the hub"]})

    monkeypatch.setattr("inputs.text.datasets.load_dataset", load_dataset)
    assert load_documents(["o/n", "o/n:c", "o/n:c:s"])["text"][:] == ["from the hub"] * 3
    assert asked == [
        ("o/n", None, {"split": "train"}),
        ("o/n", "c", {"split": "train"}),
        ("o/n", "c", {"split": "s"}),
    ]


# --- tokenising and holding out ---------------------------------------------------------------------------------


def test_documents_end_with_one_end_of_sequence_token() -> None:
    result = tokenise(["ab", "", "c<eos>", "d"], character_tokenizer())
    assert [result.ids(i).tolist() for i in range(3)] == [[3, 4, 1], [5, 1], [6, 1]]
    assert (result.empty, result.tokens, result.lengths.tolist()) == (1, 7, [3, 2, 2])


def test_long_documents_are_tokenised_whole() -> None:
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = 4
    assert tokenise(["a" * 5000], tokenizer).lengths.tolist() == [5001]


def test_text_without_any_document() -> None:
    result = tokenise(["", ""], character_tokenizer())
    assert (result.tokens, result.empty, len(PackedSequences(result, 8, PAD))) == (0, 2, 0)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=70))
def test_held_out_documents_are_not_trained_on(lengths: list[int]) -> None:
    documents = tokenised([[100 * d + p for p in range(n)] for d, n in enumerate(lengths)])
    train, held_out = hold_out(documents)
    tokens = [np.concatenate([part.ids(d) for d in range(len(part.lengths))]) for part in (train, held_out)]
    assert min(map(len, tokens)) > 0
    assert sorted(np.concatenate(tokens).tolist()) == sorted(
        np.concatenate([documents.ids(d) for d in range(len(lengths))]).tolist()
    )
    if len(lengths) > 1:
        assert len(held_out.lengths) == max(1, len(lengths) // 20)
    PackedSequences(held_out, 8, PAD)[0]  # a selection of rows packs like any other
