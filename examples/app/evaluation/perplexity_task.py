"""Perplexity by a sliding window over documents, at several window lengths.

A cell is some windows of one document at one length. All lengths score the very same tokens, so that what differs is
the context alone: a document shorter than the longest length is left out, or kept at all lengths (`--keep_short`).

`--score all` is for the paper's numbers: it scores each window as a whole, as the program that they were made with.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from app.evaluation.perplexity import Window, fingerprint, perplexity_of, windows, windows_loss
from app.inputs.corpus import stdlib_documents
from app.inputs.files import load_documents, matching, search
from app.inputs.reading import KNOWN, format_of
from app.inputs.tokens import FEATURES, Documents, tokenise
from app.models.suitable import check_tokens
from app.models.use_model import OpenedModel
from app.runs.launch import say
from app.runs.wording import counted
from longlora_ext._processes import first_process_first

PAPERS_STRIDE = 256
BATCH_TOKENS = 8192
TOKEN_IDS = ".bin"
PART_TOKENS = 2**20  # to read for one cell, about
SCORES = {"last": "each token once, with the most context", "all": "all tokens of each window"}


class PerplexityTask:
    """Perplexity of a text.

    Args:
        options: `text`, `text_column`, `lengths`, `stride`, `score`, `max_documents`, `max_tokens`, `keep_short`,
            `batch_tokens`, `by_position`.
        opened: The model.

    Attributes:
        settings: What the numbers depend on beside the model.
        cells: What there is to compute: windows by name.

    Raises:
        ValueError, OSError: No text to measure on, or a length beyond what the model was trained on.
    """

    unit = " tokens"
    numbers = ("negative_log_likelihood", "scored")  # that a cell's result has

    def __init__(self, options: argparse.Namespace, opened: OpenedModel) -> None:
        self.opened = opened
        self.lengths: list[int] = options.lengths or [opened.trained_length]
        longest = self.lengths[-1]
        opened.check_length(longest, options.beyond_trained_length, f"a length of {longest:,} tokens is asked for")
        self.stride: int = options.stride or min(PAPERS_STRIDE, self.lengths[0] // 2)
        if self.stride >= self.lengths[0]:
            raise ValueError(f"--stride must be less than the shortest length of {self.lengths[0]}, got {self.stride}")
        if options.max_tokens is not None and options.max_tokens < longest:
            raise ValueError(f"--max_tokens {options.max_tokens} is less than the longest length of {longest}")
        self.batch_tokens: int = options.batch_tokens or BATCH_TOKENS
        self.sources = [file for source in options.text or () for file in _expanded(source)]
        self.has_ids = any(source.lower().endswith(TOKEN_IDS) for source in self.sources)
        self.documents, left_out = self._read(options)
        self.settings = {
            "task": "perplexity",
            "lengths": self.lengths,
            "stride": self.stride,
            "score": SCORES[options.score],
            "text": " ".join(options.text or ["the held-out part of Python's standard library"]),
            "documents": len(self.documents),
            "tokens": sum(map(len, self.documents)),
            "shorter_documents": f"{left_out} left out" if left_out else "kept" if options.keep_short else "none",
            "special_tokens": "as in the file" if self.has_ids else "the tokenizer's own, end-of-sequence behind",
            "sha256": fingerprint(self.documents),
        }
        self.cells: dict[str, list[Window]] = {}
        self.length_of: dict[str, int] = {}
        sizes = [len(document) for document in self.documents]
        for length in self.lengths:
            all_windows = windows(sizes, length, self.stride, score_all=options.score == "all")
            for number, of_document in groupby(all_windows, key=lambda window: window.document):
                for some in _parts(list(of_document), max(1, PART_TOKENS // length)):
                    cell = f"length-{length}-document-{number}-tokens-{some[0].begin}-{some[-1].end}"
                    self.cells[cell], self.length_of[cell] = some, length

    def _read(self, options: argparse.Namespace) -> tuple[list[np.ndarray], int]:
        """The documents to measure on, and how many were too short."""
        longest = self.lengths[-1]
        found = first_process_first(lambda: self._tokens(options.text_column))
        check_tokens(self.opened.model.config, found)
        lengths = found.lengths.tolist()
        enough = 2 if options.keep_short else longest
        chosen = [number for number, length in enumerate(lengths) if length >= enough]
        short = len(lengths) - len(chosen) + found.empty
        if not chosen:
            longest_there = max(lengths, default=0)
            keep_short = ", or --keep_short to measure shorter ones with what context they have"
            raise ValueError(
                f"no document of {enough:,} tokens is there, the longest of {len(lengths)} has {longest_there:,}: give "
                f"other --text or smaller --lengths{'' if options.by_position else keep_short}"
            )
        if short:
            say(f"note: {short} of {len(lengths) + found.empty} documents are shorter than {enough:,} tokens: left out")
        documents = [found.ids(number)[: options.max_tokens] for number in chosen[: options.max_documents]]
        return documents, short

    def _tokens(self, column: str) -> Documents:
        if not self.sources:
            return tokenise(stdlib_documents()[1], self.opened.tokenizer)
        if not self.has_ids:
            return tokenise(load_documents(self.sources, column), self.opened.tokenizer)
        if not all(source.lower().endswith(TOKEN_IDS) for source in self.sources):
            raise ValueError(f"--text: files of token ids ({TOKEN_IDS}) and of text cannot be mixed")
        file, times = Counter(map(os.path.realpath, self.sources)).most_common(1)[0]
        if times > 1:
            raise ValueError(f"--text names {file} {times} times")
        ids = list(map(_read_ids, self.sources))
        return Documents(datasets.Dataset.from_dict({"input_ids": ids}, features=FEATURES))

    def cost(self, cell: str) -> int:
        """Tokens that are scored in a cell."""
        return sum(window.scored for window in self.cells[cell])

    def compute(self, cell: str, progress: Callable[[int], object]) -> dict[str, Any]:
        """Score the windows of a cell."""
        model = self.opened.model
        options: dict[str, Any] = {"device": model.device, "batch_tokens": self.batch_tokens, "progress": progress}
        loss, tokens = windows_loss(model, self.documents, self.cells[cell], **options)
        return {"negative_log_likelihood": loss, "scored": tokens}

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """By length, perplexity and how many tokens were scored."""
        of_length: dict[int, list[dict[str, Any]]] = {length: [] for length in self.lengths}
        for cell, result in results.items():
            of_length[self.length_of[cell]].append(result)
        scored = {length: sum(part["scored"] for part in parts) for length, parts in of_length.items()}
        loss = {
            length: math.fsum(float(p["negative_log_likelihood"]) for p in parts) for length, parts in of_length.items()
        }
        return {
            "perplexity": {str(length): perplexity_of(loss[length], scored[length]) for length in self.lengths},
            "scored": {str(length): scored[length] for length in self.lengths},
        }

    def table(self, results: dict[str, dict[str, Any]]) -> str:
        """The results as text."""
        summary = self.summary(results)
        tokens, documents = sum(map(len, self.documents)), counted(len(self.documents), "document")
        title = f"perplexity of {tokens:,} tokens in {documents} (scored: {self.settings['score']})"
        rows = {
            "window": "".join(f"{length:>12,}" for length in self.lengths),
            "scored": "".join(f"{scored:>12,}" for scored in summary["scored"].values()),
            "perplexity": "".join(f"{value:>12.3f}" for value in summary["perplexity"].values()),
        }
        return "\n".join([title, "", *(f"{name:<12}{row}" for name, row in rows.items())]) + "\n"

    def draw(self, results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
        """Nothing: a row of numbers needs no picture."""
        return []


def _parts(items: list[Window], size: int) -> list[list[Window]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _expanded(source: str) -> list[str]:
    """The files of token ids that a source names, with the source itself if it names others.

    Raises:
        FileNotFoundError: A folder without any file that can be read.
    """
    path = Path(source).expanduser()
    found = search(path)[0] if path.is_dir() else [str(path)] if path.exists() else matching(path)
    files = [file for file in found if Path(file).is_file()]
    ids = sorted(file for file in files if file.lower().endswith(TOKEN_IDS))
    texts = any(map(format_of, files))
    if path.is_dir() and not ids and not texts:
        known = f"{TOKEN_IDS}, {KNOWN}"
        raise FileNotFoundError(f"--text {source}: the folder holds no file to measure on; looked for {known}")
    return [*ids, source] if texts or not ids else ids


def _read_ids(file: str) -> np.ndarray:
    """Token ids as the original project publishes its evaluation data: 16 bits each and nothing else."""
    if Path(file).stat().st_size % 2:
        raise ValueError(f"{file} is no file of token ids of 16 bits: it has an odd number of bytes")
    ids = np.fromfile(file, dtype="<u2")
    low, high = ids[::2], ids[1::2]
    # No vocabulary has more than 2^18 tokens, so the upper halves of wider ids are at most 3.
    if high.size and high.max() <= 3 < low.max():
        raise ValueError(
            f"{file} has token ids of 32 or 64 bits, it seems: every second number of 16 bits is at most 3. Write "
            "them as numpy.uint16, or give the text itself, if the vocabulary has more than 65,536 tokens"
        )
    return ids
