"""Perplexity by a sliding window over documents, at several window lengths.

A cell is one document at one length. All lengths score the very same tokens, so that what differs is the context alone:
a document shorter than the longest length is left out, or kept at all lengths (`--keep_short`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpus import stdlib_documents
from data import load_documents, tokenise
from launch import say
from perplexity import document_loss, fingerprint
from processes import first_process_first
from suitable import check_tokens
from use_model import OpenedModel

PAPERS_STRIDE = 256


class PerplexityTask:
    """Perplexity of a text.

    Args:
        options: `text`, `text_column`, `lengths`, `stride`, `max_documents`, `max_tokens`, `keep_short`,
            `batch_tokens`.
        opened: The model.

    Attributes:
        settings: What the numbers depend on beside the model.
        cells: What there is to compute: a length and the number of a document by name.

    Raises:
        ValueError, OSError: No text to measure on, or a length beyond what the model was trained on.
    """

    unit = " tokens"

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
        self.batch_tokens: int = options.batch_tokens
        self.documents, left_out = self._read(options)
        self.settings = {
            "task": "perplexity",
            "lengths": self.lengths,
            "stride": self.stride,
            "text": " ".join(options.text or ["the held-out part of Python's standard library"]),
            "documents": len(self.documents),
            "tokens": sum(map(len, self.documents)),
            "shorter_documents": f"{left_out} left out" if left_out else "kept" if options.keep_short else "none",
            "special_tokens": "those that the tokenizer adds to a document, and its end-of-sequence token behind",
            "sha256": fingerprint(self.documents),
        }
        self.cells = {
            f"length-{length}-document-{number}": (length, number)
            for length in self.lengths
            for number in range(len(self.documents))
        }

    def _read(self, options: argparse.Namespace) -> tuple[list[np.ndarray], int]:
        """The documents to measure on, and how many were too short."""
        tokenizer, longest = self.opened.tokenizer, self.lengths[-1]
        texts = (lambda: load_documents(options.text, options.text_column)) if options.text else lambda: _held_out()
        found = first_process_first(lambda: tokenise(texts(), tokenizer))
        check_tokens(self.opened.model.config, found)
        lengths = found.lengths.tolist()
        enough = 2 if options.keep_short else longest
        chosen = [number for number, length in enumerate(lengths) if length >= enough]
        short = len(lengths) - len(chosen) + found.empty
        if not chosen:
            longest_there = max(lengths, default=0)
            raise ValueError(
                f"no document of {enough:,} tokens is there, the longest of {len(lengths)} has {longest_there:,}: give "
                "other --text, smaller --lengths, or --keep_short to measure shorter ones with what context they have"
            )
        if short:
            say(f"note: {short} of {len(lengths) + found.empty} documents are shorter than {enough:,} tokens: left out")
        documents = [found.ids(number)[: options.max_tokens] for number in chosen[: options.max_documents]]
        return documents, short

    def cost(self, cell: str) -> int:
        """Tokens that are scored in a cell."""
        return len(self.documents[self.cells[cell][1]]) - 1

    def compute(self, cell: str, progress: Callable[[int], object]) -> dict[str, Any]:
        """Score one document at one length."""
        length, number = self.cells[cell]
        self.opened.forget_length()
        loss, tokens = document_loss(
            self.opened.model,
            self.documents[number],
            length,
            self.stride,
            device=self.opened.model.device,
            batch_tokens=self.batch_tokens,
            progress=progress,
        )
        return {"negative_log_likelihood": loss, "tokens": tokens, "perplexity": math.exp(loss / tokens)}

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Perplexity by length over all tokens."""
        return {
            "perplexity": {str(length): self._perplexity(results, length) for length in self.lengths},
            "scored_tokens": sum(result["tokens"] for result in results.values()) // len(self.lengths),
        }

    def _perplexity(self, results: dict[str, dict[str, Any]], length: int) -> float:
        of_length = [results[cell] for cell, (its_length, _) in self.cells.items() if its_length == length]
        loss = math.fsum(result["negative_log_likelihood"] for result in of_length)
        return math.exp(loss / sum(result["tokens"] for result in of_length))

    def table(self, results: dict[str, dict[str, Any]]) -> str:
        """The results as text."""
        summary = self.summary(results)
        title = f"perplexity of {summary['scored_tokens']:,} tokens in {len(self.documents)} documents"
        values = "".join(f"{value:>10.3f}" for value in summary["perplexity"].values())
        lengths = "".join(f"{length:>10,}" for length in self.lengths)
        return f"{title}\n\n{'window':<12}{lengths}\n{'perplexity':<12}{values}\n"

    def draw(self, results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
        """Nothing: a row of numbers needs no picture."""
        return []


def _held_out() -> list[str]:
    return stdlib_documents()[1]
