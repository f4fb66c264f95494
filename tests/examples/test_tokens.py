"""Tokenising, and holding documents out (examples/app/inputs/tokens.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longlora_ext.attention  # noqa: F401
from app.inputs.tokens import tokenise
from app.models import tokenizer
from app.runs.command_line import TINY_LLAMA
from longlora_ext.data import PackedSequences
from tiny_texts import PAD, character_tokenizer, tokenised

pytestmark = pytest.mark.usefixtures("own_cache")


def test_documents_end_with_one_end_of_sequence_token() -> None:
    result = tokenise(["ab", "", "c<eos>", "d"], character_tokenizer())
    assert [result.ids(i).tolist() for i in range(3)] == [[3, 4, 1], [5, 1], [6, 1]]
    assert (result.empty, result.tokens, result.lengths.tolist()) == (1, 7, [3, 2, 2])


def test_white_space_alone_is_no_text() -> None:
    result = tokenise([" \n\t ", "\u2003", "a ", " "], character_tokenizer())
    assert (result.empty, [result.ids(i).tolist() for i in range(len(result.lengths))]) == (3, [[3, 29, 1]])


def test_batches_of_long_documents_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which 64 at once would fill the memory."""
    monkeypatch.setattr("app.inputs.tokens.BATCH_BYTES", 3000)
    tokenizer, sizes = character_tokenizer(), []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: sizes.append(len(a[1])) or encode(*a, **k))
    assert tokenise(["a" * 990] * 7, tokenizer).lengths.tolist() == [991] * 7
    assert sizes == [3, 3, 1]


def test_long_documents_are_tokenised_whole() -> None:
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = 4
    assert tokenise(["a" * 5000], tokenizer).lengths.tolist() == [5001]


def test_text_without_any_document() -> None:
    result = tokenise(["", ""], character_tokenizer())
    assert (result.tokens, result.empty, len(PackedSequences(result.arrow_ids, 8, PAD))) == (0, 2, 0)


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=70))
def test_held_out_documents_are_not_trained_on(lengths: list[int]) -> None:
    documents = tokenised([[100 * d + p for p in range(n)] for d, n in enumerate(lengths)])
    train, held_out = documents.hold_out()
    tokens = [np.concatenate([part.ids(d) for d in range(len(part.lengths))]) for part in (train, held_out)]
    assert min(map(len, tokens)) > 0 and len(tokens[1]) <= max(1, documents.tokens / 5)
    assert sorted(np.concatenate(tokens).tolist()) == sorted(
        np.concatenate([documents.ids(d) for d in range(len(lengths))]).tolist()
    )
    if len(lengths) > 1:
        assert len(held_out.lengths) == max(1, len(lengths) // 20)
    PackedSequences(held_out.arrow_ids, 8, PAD)[0]  # a selection of rows packs like any other


def test_of_a_large_document_only_the_end_is_held_out() -> None:
    """It may be the 20th, or the last of two: it would be nearly all of the text."""
    train, held_out = tokenised([[1] * 20, [*range(1000)]]).hold_out()
    assert train.ids(0).tolist() == [1] * 20 and train.ids(1).tolist() == [*range(898)]
    assert held_out.ids(0).tolist() == [*range(898, 1000)]


def test_largest_id() -> None:
    assert tokenised([[1, 9], [], [3]]).largest_id == 9
    assert tokenised([[1, 9], [3]]).dataset.select([1]).num_rows == 1
    assert tokenised([]).largest_id == -1


def test_a_tokenizer_of_mistral_common_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that package is installed, AutoTokenizer prefers its own, which has no chat template."""

    class MistralCommonBackend:
        pass

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", lambda *_, **__: MistralCommonBackend())
    found = tokenizer.read_tokenizer(str(TINY_LLAMA))
    assert found.is_fast and found("def")["input_ids"]
