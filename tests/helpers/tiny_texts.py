"""Texts of a few tokens, and a tokenizer of letters."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import longlora_ext.attention  # noqa: F401
from app.inputs.tokens import FEATURES, Documents

PAD = 1


def tokenised(documents: list[list[int]], chunks: int = 1) -> Documents:
    """Documents in `chunks` Arrow chunks, as a large corpus has."""
    parts = [documents[i::chunks] for i in range(chunks)]
    rows = [datasets.Dataset.from_dict({"input_ids": part}, features=FEATURES) for part in parts]
    return Documents(datasets.concatenate_datasets(rows))


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(97 + i): 3 + i for i in range(26)} | {" ": 29}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def write_document(path: Path, text: str) -> None:
    if path.suffix == ".parquet":
        pandas.DataFrame({"text": [text]}).to_parquet(path)
    else:
        path.write_text(text if path.suffix == ".txt" else json.dumps({"text": text}) + "\n")


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
