"""Documents in sequences of one length (longlora_ext/data.py)."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import longlora_ext.attention  # noqa: F401
from longlora_ext.data import PackedSequences, SampleRows, pack, pad_rows
from tiny_texts import PAD, tokenised


def test_packing_by_hand() -> None:
    packed = PackedSequences(tokenised([[10, 11, 12], [20], [30, 31, 32, 33, 34, 35]]).arrow_ids, 4, PAD)
    rows = [{name: values.tolist() for name, values in packed[i].items()} for i in range(len(packed))]
    assert rows == [
        {"input_ids": [10, 11, 12, 20], "position_ids": [0, 1, 2, 0], "labels": [-100, 11, 12, -100]},
        {"input_ids": [30, 31, 32, 33], "position_ids": [0, 1, 2, 3], "labels": [-100, 31, 32, 33]},
        {"input_ids": [34, 35, PAD, PAD], "position_ids": [0, 1, 0, 1], "labels": [-100, 35, -100, -100]},
    ]
    assert packed.padding == 2
    with pytest.raises(IndexError):
        packed[3]


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    context=st.integers(2, 48),
    chunks=st.integers(1, 3),
)
def test_packing_loses_nothing_and_keeps_documents_apart(lengths: list[int], context: int, chunks: int) -> None:
    # Token 1000 * d + p is token p of document d, so what a sequence holds tells where it is from.
    documents = tokenised([[1000 * (d + 1) + p for p in range(n)] for d, n in enumerate(lengths)], chunks)
    order = [documents.ids(d) for d in range(len(lengths))]
    packed = PackedSequences(documents.arrow_ids, context, PAD)
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
    packed = PackedSequences(text.arrow_ids, 4, PAD)
    assert (
        text.describe(packed)["sequences"] == "1 of 4 tokens, 0 of them padding; the last token of the text is left out"
    )
    assert (len(packed), packed.tokens, packed.targets, packed.padding) == (1, 4, 2, 0)
    assert packed.fingerprint()["train_tokens"] == 5
    assert packed[0]["input_ids"].tolist() == [10, 11, 12, 20]
    whole = PackedSequences(tokenised([[10, 11, 12], [20, 21, 22]]).arrow_ids, 4, PAD)
    assert (len(whole), whole.tokens, whole.padding) == (2, 6, 2)
    alone = PackedSequences(tokenised([[10]]).arrow_ids, 4, PAD)
    assert (len(alone), alone.tokens, alone.targets) == (1, 1, 0)


def test_context_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length must be 2 or more, got 1"):
        PackedSequences(tokenised([[1, 2]]).arrow_ids, 1, PAD)


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
        packed = PackedSequences(tokenised([[token + changed for token in first], second]).arrow_ids, 32, PAD)
        batch = {name: values[None] for name, values in packed[0].items()}
        logits.append(model(**batch, use_cache=False).logits[0])
    assert not torch.equal(logits[0][: len(first)], logits[1][: len(first)])
    start, end = len(first), len(first) + len(second)
    torch.testing.assert_close(logits[0][start:end], logits[1][start:end], rtol=0, atol=0)


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(0, 12), max_size=12), context=st.integers(2, 9))
def test_targets_are_the_labels(lengths: list[int], context: int) -> None:
    packed = PackedSequences(tokenised([[5] * n for n in lengths]).arrow_ids, context, PAD)
    assert packed.targets == sum(
        int((item["labels"] != -100).sum()) for item in map(packed.__getitem__, range(len(packed)))
    )


def test_fingerprint_sees_tokens_order_and_borders() -> None:
    texts = ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]], [[1, 2], [4]])
    prints = [PackedSequences(tokenised(text).arrow_ids, 4, PAD).fingerprint() for text in texts]
    assert len({found["train_sha256"] for found in prints}) == 5
    assert prints[0] == PackedSequences(tokenised(texts[0]).arrow_ids, 8, PAD).fingerprint()
    assert prints[0]["train_documents"] == 2 and prints[0]["train_tokens"] == 3


def test_rows_of_their_own_by_hand() -> None:
    text = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35], [40, 41, 42, 43, 44], []]
    own = PackedSequences(tokenised(text).arrow_ids, 4, PAD, own_rows=True)
    rows = [{name: values.tolist() for name, values in own[i].items()} for i in range(len(own))]
    assert rows == [
        {"input_ids": [10, 11, 12], "position_ids": [0, 1, 2], "labels": [-100, 11, 12]},
        {"input_ids": [30, 31, 32, 33], "position_ids": [0, 1, 2, 3], "labels": [-100, 31, 32, 33]},
        {"input_ids": [34, 35], "position_ids": [0, 1], "labels": [-100, 35]},
        {"input_ids": [40, 41, 42, 43], "position_ids": [0, 1, 2, 3], "labels": [-100, 41, 42, 43]},
    ]
    assert (own.tokens, own.targets, own.padding) == (13, 9, 0)  # 20 and 44 would be alone
    packed = PackedSequences(tokenised(text).arrow_ids, 4, PAD)
    assert own.fingerprint() == packed.fingerprint() | {"rows": "padded"}


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    context=st.integers(2, 48),
    chunks=st.integers(1, 3),
)
def test_rows_of_their_own_teach_what_packed_pieces_teach(lengths: list[int], context: int, chunks: int) -> None:
    documents = tokenised([[1000 * (d + 1) + p for p in range(n)] for d, n in enumerate(lengths)], chunks)
    own = PackedSequences(documents.arrow_ids, context, PAD, own_rows=True)
    rows = [own[i] for i in range(len(own))]
    learned = [label for row in rows for label in row["labels"].tolist() if label != -100]
    expected = [token for d in range(len(lengths)) for p, token in enumerate(documents.ids(d)) if p % context]
    assert learned == expected and own.targets == len(learned)
    assert own.tokens == sum(len(row["input_ids"]) for row in rows)
    for row in rows:
        ids = row["input_ids"]
        assert len(ids) <= context and torch.equal(ids, ids[0] + torch.arange(len(ids)))
        assert torch.equal(row["position_ids"], torch.arange(len(ids))) and row["labels"][0] == -100


DOCUMENTS = [[10, 11, 12], [], [20], [30, 31, 32, 33, 34, 35]]


def test_documents_of_any_kind_make_the_same_sequences(tmp_path: Path) -> None:
    """Lists, arrays, tensors, Arrow in one array or several, and arrays on the disk, which are not read up front."""
    arrow = pyarrow.array([*DOCUMENTS, [7]])[:-1]  # a part of an array
    on_disk = np.lib.format.open_memmap(tmp_path / "ids.npy", mode="w+", dtype=np.uint16, shape=(10,))
    on_disk[:] = [token for document in DOCUMENTS for token in document]
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    kinds = {
        "lists": DOCUMENTS,
        "arrays": [np.array(document, np.uint16) for document in DOCUMENTS],
        "tensors": [torch.tensor(document, dtype=torch.int64) for document in DOCUMENTS],
        "arrow": arrow,
        "large lists": arrow.cast(pyarrow.large_list(pyarrow.int32())),
        "chunks": tokenised(DOCUMENTS[:2] + DOCUMENTS[2:]).arrow_ids,
        "on the disk": np.split(on_disk, ends[:-1]),
    }
    for own_rows in (False, True):
        rows = {kind: PackedSequences(documents, 4, PAD, own_rows) for kind, documents in kinds.items()}
        assert len({packed.fingerprint()["train_sha256"] for packed in rows.values()}) == 1
        items = [
            [{k: v.tolist() for k, v in row.items()} for row in map(p.__getitem__, range(len(p)))]
            for p in rows.values()
        ]
        assert all(item == items[0] for item in items) and items[0]
    assert all(np.shares_memory(chunk, on_disk) for chunk in rows["on the disk"].chunks if len(chunk))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([1, 2, 3], "document 0 must be a sequence of integers, but it is int"),
        (["text"], "document 0 must be a sequence of integers, but it is str"),
        ([[1, 2], [1.5]], "document 1 .* dtype float64"),
        ([[1], {"input_ids": [1]}], "document 1 .* but it is dict"),
        ([[[1, 2], [3]]], "document 0 must be a sequence of integers"),
        ([torch.ones(1, 2, dtype=torch.int64)], "document 0 .* shape \\[1, 2\\]"),
        (pyarrow.array([[1.5]]), "documents must be a sequence of integers"),
    ],
)
def test_what_are_no_token_ids_is_refused(documents: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedSequences(documents, 4, PAD)


@pytest.mark.parametrize("token", [None, -1, 1.0, True])
def test_padding_must_be_a_token(token: object) -> None:
    for rows, of in ((PackedSequences, [[1, 2]]), (partial(SampleRows, packed=True), [])):
        with pytest.raises(ValueError, match=f"pad_token_id must be a token id, got {token}"):
            rows(of, 4, token)


def sample(*ids: int, learned: int) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "labels": [-100] * (len(ids) - learned) + list(ids[len(ids) - learned :])}


def test_samples_are_a_list_of_dicts() -> None:
    """And a first token is not learned, whatever its label: another sample stands before it in a packed row."""
    few = [sample(2, 3, learned=1), sample(4, 5, 6, learned=3)]
    rows = SampleRows(few, 6, PAD, packed=True)
    assert {name: values.tolist() for name, values in rows[0].items()} == {
        "input_ids": [4, 5, 6, 2, 3, PAD],
        "labels": [-100, 5, 6, -100, 3, -100],
        "position_ids": [0, 1, 2, 0, 1, 0],
    }
    assert (rows.targets, rows.tokens, rows.padding, few[1]["labels"][0]) == (3, 5, 1, 4)
    single = SampleRows(few, 6, PAD, packed=False)
    batch = next(
        iter(torch.utils.data.DataLoader(single, batch_size=2, collate_fn=partial(pad_rows, pad_token_id=PAD)))
    )
    assert batch["labels"].tolist() == [[-100, 3, -100], [-100, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    "wrong", [sample(1, 2, 3, 4, 5, learned=1), {"input_ids": [1, 2], "labels": [2]}, {"input_ids": [], "labels": []}]
)
@pytest.mark.parametrize("packed", [True, False])
def test_samples_that_do_not_fit_are_refused(wrong: dict, packed: bool) -> None:
    with pytest.raises(ValueError, match=r"sample 1 has \d token ids .* from 1 to the 4 of a row"):
        SampleRows([sample(1, 2, learned=1), wrong], 4, PAD, packed)


def test_they_need_no_datasets() -> None:
    without = "import sys; sys.modules.update(datasets=None, pyarrow=None)"
    code = (
        f"{without}; from longlora_ext.data import PackedSequences; assert len(PackedSequences([[1, 2, 3]], 2, 0)) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_every_sample_is_packed_once_and_rows_are_few(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert all(0 < tokens <= 20 for tokens in filled)
    assert sum(tokens <= 10 for tokens in filled) <= 1  # or two of them would have been one
    assert len(rows) <= math.ceil(1.5 * sum(lengths) / 20) + 1
