"""Documents in sequences of one length (examples/app/inputs/packed.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import longlora_ext.attention  # noqa: F401
from app.inputs.packed import PackedSequences
from app.training.report import _material
from tiny_texts import PAD, tokenised


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


def test_rows_of_their_own_by_hand() -> None:
    text = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35], [40, 41, 42, 43, 44], []]
    own = PackedSequences(tokenised(text), 4, PAD, own_rows=True)
    rows = [{name: values.tolist() for name, values in own[i].items()} for i in range(len(own))]
    assert rows == [
        {"input_ids": [10, 11, 12], "position_ids": [0, 1, 2], "labels": [-100, 11, 12]},
        {"input_ids": [30, 31, 32, 33], "position_ids": [0, 1, 2, 3], "labels": [-100, 31, 32, 33]},
        {"input_ids": [34, 35], "position_ids": [0, 1], "labels": [-100, 35]},
        {"input_ids": [40, 41, 42, 43], "position_ids": [0, 1, 2, 3], "labels": [-100, 41, 42, 43]},
    ]
    assert (own.tokens, own.targets, own.padding) == (13, 9, 0)  # 20 and 44 would be alone
    packed = PackedSequences(tokenised(text), 4, PAD)
    assert own.fingerprint() == packed.fingerprint() | {"rows": "padded"}


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    context=st.integers(2, 48),
    chunks=st.integers(1, 3),
)
def test_rows_of_their_own_teach_what_packed_pieces_teach(lengths: list[int], context: int, chunks: int) -> None:
    documents = tokenised([[1000 * (d + 1) + p for p in range(n)] for d, n in enumerate(lengths)], chunks)
    own = PackedSequences(documents, context, PAD, own_rows=True)
    rows = [own[i] for i in range(len(own))]
    learned = [label for row in rows for label in row["labels"].tolist() if label != -100]
    expected = [token for d in range(len(lengths)) for p, token in enumerate(documents.ids(d)) if p % context]
    assert learned == expected and own.targets == len(learned)
    assert own.tokens == sum(len(row["input_ids"]) for row in rows)
    for row in rows:
        ids = row["input_ids"]
        assert len(ids) <= context and torch.equal(ids, ids[0] + torch.arange(len(ids)))
        assert torch.equal(row["position_ids"], torch.arange(len(ids))) and row["labels"][0] == -100
