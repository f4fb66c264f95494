"""From files of text to training sequences of one length, with the documents in them kept apart.

Three steps, each a function: `load_documents` reads files (or a hub dataset) into documents, `tokenise`
turns the documents into token ids, and `PackedSequences` lays the documents end to end and cuts the result
every `context_length` tokens. What the cut makes of a document is called a piece here.

- A document that does not fit is continued in the next sequence as a piece of its own, not dropped.
- Position ids restart at every piece, which is how the attention knows the pieces apart.
- The first token of a piece has the label -100: nothing of its own document stands before it to predict it
  from.
- The last sequence is filled up with padding, itself one piece with no labels, so that no token is lost. Only if it
  would hold a single token it is left out: there is nothing to learn in it, and it would cost a step all the same.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.compute
import torch
from datasets.data_files import DataFilesList
from transformers import PreTrainedTokenizerBase

from longlora_ext.loss import IGNORED_LABEL

#: The file formats, by suffix: which reader of `datasets` takes them.
READERS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Tokenised:
    """Tokenised documents, and what was read to get them.

    Attributes:
        input_ids: One row a document, column `input_ids`: its token ids (int32).
        empty: How many documents had no text and were left out.
    """

    input_ids: datasets.Dataset
    empty: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        column = _arrow_column(self.input_ids)
        return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents, -1 if there is none."""
        largest = (pyarrow.compute.max(chunk.flatten()).as_py() for chunk in _arrow_column(self.input_ids).chunks)
        return max((token for token in largest if token is not None), default=-1)

    def ids(self, document: int) -> np.ndarray:
        """The token ids of one document, int64 [length]."""
        return np.asarray(self.input_ids[document]["input_ids"], dtype=np.int64)


SomeTokenised = TypeVar("SomeTokenised", bound=Tokenised)


def find_files(source: str) -> list[str]:
    """The files that one `--train_file` names.

    Args:
        source: A file, a folder (searched with its subfolders), or a glob pattern.

    Returns:
        Paths in sorted order; none when `source` looks like a dataset on the hub.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A file of a format that cannot be read.
    """
    path = Path(source).expanduser()
    known = ", ".join(sorted(READERS))
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and file.suffix in READERS)
        if not files:
            raise FileNotFoundError(f"the folder {source} holds no file to train on; looked for {known}")
        return files
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [file for file in files if Path(file).is_file()]
    if not files:
        if HUB_NAME.fullmatch(source) and Path(source).suffix not in READERS:
            return []
        raise FileNotFoundError(
            f"{source}: no such file, folder or glob pattern, nor a dataset name of the form "
            "OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG:SPLIT"
        )
    for file in files:
        if Path(file).suffix not in READERS:
            raise ValueError(f"{file}: cannot read files ending in {Path(file).suffix!r}; can read {known}")
    return files


def load_documents(sources: Sequence[str], text_column: str = "text") -> datasets.Dataset:
    """Read documents from files or from the hub.

    Args:
        sources: Files, folders, glob patterns, or hub datasets (`OWNER/NAME[:CONFIG[:SPLIT]]`). A text file
            is one document; JSON Lines, JSON and Parquet hold one document a row.
        text_column: The column that holds the text of JSON, Parquet and hub datasets.

    Returns:
        A dataset with the one column `text`, in the order of the sources, files sorted within each.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: A file that cannot be read, or a dataset without that column.
    """
    parts = []
    for source in sources:
        files = find_files(source)
        if not files:
            parts.append(_select_text(source, _from_hub(source), text_column))
        for reader, group in groupby(files, key=lambda file: READERS[Path(file).suffix]):
            if reader == "text":
                parts.append(_select_text(source, _from_files(reader, list(group)), "text"))
            else:  # one by one: their other columns may differ
                parts += [_select_text(file, _from_files(reader, [file]), text_column) for file in group]
    if any(part.features != parts[0].features for part in parts):  # readers have two types of strings
        parts = [part.cast_column("text", datasets.Value("large_string")) for part in parts]
    return datasets.concatenate_datasets(parts)


def read_tables(sources: Sequence[str]) -> Iterator[tuple[str, datasets.Dataset]]:
    """Read files of rows, or hub datasets, one by one and with all their columns.

    Args:
        sources: As for `load_documents`; of a folder or a glob pattern the text files are left alone.

    Returns:
        The name of each file or hub dataset, and what it holds.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: A source without files of rows, or one that cannot be read.
    """
    for source in sources:
        files = find_files(source)
        tables = [file for file in files if READERS[Path(file).suffix] != "text"]
        if files and not tables:
            raise ValueError(f"{source} is text; rows are read from .json, .jsonl and .parquet files")
        for file in tables:
            yield file, _from_files(READERS[Path(file).suffix], [file])
        if not files:
            yield source, _from_hub(source)


def tokenise(documents: datasets.Dataset | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tokenised:
    """Turn documents into token ids.

    Each document gets the special tokens that the tokenizer adds by itself and ends with the
    end-of-sequence token where the tokenizer has one.

    Args:
        documents: A dataset with a column `text`, or a list of texts.
        tokenizer: The model's tokenizer.

    Returns:
        The documents in the same order, less those without text (they are counted).
    """
    if not isinstance(documents, datasets.Dataset):
        documents = datasets.Dataset.from_dict({"text": list(documents)})
    eos = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch["text"] if text]
        if not texts:
            return {"input_ids": []}
        rows = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        return {"input_ids": [row if eos is None or row[-1:] == [eos] else [*row, eos] for row in rows]}

    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    rows = documents.map(
        encode, batched=True, batch_size=64, remove_columns=["text"], features=features, desc="tokenising"
    )
    return Tokenised(rows, empty=len(documents) - len(rows))


def hold_out(documents: SomeTokenised, every: int = 20) -> tuple[SomeTokenised, SomeTokenised]:
    """Set documents aside to measure on.

    Args:
        documents: What there is, at least one document.
        every: One document in this many is held out, and never none. A single document gives up its last
            tenth.

    Returns:
        `(train, held_out)`.
    """
    rows = documents.input_ids
    if len(rows) == 1:
        ids = documents.ids(0).tolist()
        cut = len(ids) - max(1, len(ids) // 10)
        head, tail = (
            datasets.Dataset.from_dict({"input_ids": [part]}, features=rows.features) for part in (ids[:cut], ids[cut:])
        )
        return replace(documents, input_ids=head), replace(documents, input_ids=tail)
    held_out = np.arange(min(every, len(rows)) - 1, len(rows), every)
    train = np.setdiff1d(np.arange(len(rows)), held_out)
    return replace(documents, input_ids=rows.select(train)), replace(documents, input_ids=rows.select(held_out))


class PackedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Tokenised documents, laid end to end and cut into sequences of one length.

    Nothing is copied up front: a sequence is put together when it is asked for.

    Args:
        documents: The tokenised documents.
        context_length: Tokens of a sequence.
        pad_token_id: What fills the last sequence up.

    Item `i` holds `input_ids`, `position_ids` and `labels`, int64 [context_length] each. `tokens` are in the sequences:
    all, or all but the last, if that would be alone in a sequence and is not the only one.
    """

    def __init__(self, documents: Tokenised, context_length: int, pad_token_id: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be 2 or more, got {context_length}")
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.chunks = [chunk.flatten().to_numpy() for chunk in _arrow_column(documents.input_ids).chunks]
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])
        self.document_starts = np.cumsum([0, *documents.lengths])
        total = int(self.document_starts[-1])
        self.tokens = total - 1 if total > context_length and total % context_length == 1 else total

    def __len__(self) -> int:
        return -(-self.tokens // self.context_length)

    @property
    def padding(self) -> int:
        """Padding tokens at the end of the last sequence."""
        return len(self) * self.context_length - self.tokens

    @property
    def targets(self) -> int:
        """Tokens that are learned from: all but the first of each piece."""
        cuts = np.arange(0, self.tokens, self.context_length)
        starts = self.document_starts[self.document_starts < self.tokens]
        return self.tokens - len(np.union1d(cuts, starts))

    def fingerprint(self) -> dict[str, Any]:
        """What tells the text from any other text, as JSON."""
        digest = hashlib.sha256(self.document_starts.astype("<i8").tobytes())
        for chunk in self.chunks:
            digest.update(chunk.astype("<i4").tobytes())
        return {
            "train_documents": len(self.document_starts) - 1,
            "train_tokens": int(self.document_starts[-1]),
            "train_sha256": digest.hexdigest(),
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin = index * self.context_length
        end = min(begin + self.context_length, self.tokens)

        input_ids = np.full(self.context_length, self.pad_token_id, dtype=np.int64)
        input_ids[: end - begin] = self._read(begin, end)

        first, last = np.searchsorted(self.document_starts, (begin, end))
        inner_starts = self.document_starts[first:last] - begin
        if end - begin < self.context_length:
            inner_starts = np.append(inner_starts, end - begin)  # the padding is a piece too
        place = np.arange(self.context_length)
        piece_start = np.zeros_like(place)
        piece_start[inner_starts] = inner_starts
        position_ids = place - np.maximum.accumulate(piece_start)

        labels = np.where(position_ids == 0, IGNORED_LABEL, input_ids)
        labels[end - begin :] = IGNORED_LABEL
        items = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in items.items()}

    def _read(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of all documents laid end to end."""
        first = int(np.searchsorted(self.chunk_starts, begin, side="right")) - 1
        parts = []
        while begin < end:
            offset = begin - self.chunk_starts[first]
            parts.append(self.chunks[first][offset : offset + end - begin])
            begin += len(parts[-1])
            first += 1
        return np.concatenate(parts)


def _arrow_column(rows: datasets.Dataset) -> pyarrow.ChunkedArray:
    return rows.with_format("arrow")[:]["input_ids"]


def _from_files(reader: str, files: list[str]) -> datasets.Dataset:
    options = {"sample_by": "document"} if reader == "text" else {}
    nothing = [file for file in files if reader != "text" and Path(file).stat().st_size == 0]
    if nothing:
        raise ValueError(f"{nothing[0]} is empty")
    data_files = {"train": _as_they_are(files)}
    try:
        return datasets.load_dataset(reader, data_files=data_files, split="train", **options)
    except Exception as error:  # datasets wraps what went wrong in errors of its own, several deep
        cause = error.__cause__ or error
        reason = "it has no rows" if "corresponds to no data" in str(cause) else _in_short(cause)
        raise ValueError(f"cannot read {', '.join(files[:3])} as {reader}: {reason}") from error


def _as_they_are(files: list[str]) -> DataFilesList:
    """Files by their names, which `datasets` would else take for glob patterns, each with what tells that it changed.

    `datasets` itself goes by the time of the last change alone, and `cp -p` and `rsync -t` copy that along.
    """
    paths = [str(Path(file).absolute()) for file in files]
    for path in paths:
        if "::" in path:  # to `datasets` it is a file within another
            raise ValueError(f"{path}: files with '::' in their path cannot be read; rename what has it")
    stats = [Path(path).stat() for path in paths]
    return DataFilesList(
        paths, [(f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}",) for found in stats]
    )


def _from_hub(source: str) -> datasets.Dataset:
    name, config, split = (*source.split(":"), None, None)[:3]
    try:
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # offline, unknown, gated, no such config or split: as many types as causes
        raise ValueError(
            f"{source} is no local file or folder, and as a dataset of the hub it cannot be loaded: {_in_short(error)}"
        ) from error


def _select_text(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows.column_names)} (--text_column)")
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{source}: column {column!r} holds {rows.features[column]}, not text (--text_column)")
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    return rows


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
