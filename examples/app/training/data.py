"""What a run trains on, and what it holds out to measure on: read, tokenised and cut into rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from app.inputs.corpus import stdlib_documents
from app.inputs.files import load_documents
from app.inputs.samples import read_samples
from app.inputs.tokenised import Tokenised
from app.inputs.tokens import tokenise
from app.models.suitable import check_tokens, padding_token
from app.runs.run import Run
from app.training.options import DataOptions
from app.training.template_date import SETTING, template_date
from longlora_ext._processes import first_process_first
from longlora_ext.config import context_length
from longlora_ext.data import PackedSequences, SampleRows


@dataclass(frozen=True)
class TrainingData:
    """A text and the rows made of it.

    Attributes:
        train, held_out: What to train on and what is held out, as tokens.
        rows, eval_rows: The same in rows of the new context.
        pad_token_id: What rows are filled up with.
        day: What the chat template takes for today, if it prints that.
    """

    train: Tokenised
    held_out: Tokenised
    rows: PackedSequences | SampleRows
    eval_rows: PackedSequences | SampleRows
    pad_token_id: int
    day: date | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the losses depend on of all this."""
        return self.rows.fingerprint() | ({SETTING: self.day.isoformat()} if self.day else {})


def read_data(
    text: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    base_config: PreTrainedConfig,
    config: PreTrainedConfig,
    run: Run,
) -> TrainingData:
    """Read what the options name. Collective.

    Args:
        text: The options.
        tokenizer: The model's; for `--task sft` it has a chat template.
        base_config: The model's config.
        config: The same for the new context.
        run: It may go on with an earlier run, on whose day the chat template was used.

    Raises:
        FileNotFoundError, ValueError, OSError: What is not there, cannot be read, or does not fit the model.
    """
    day = template_date(tokenizer, run) if text.task == "sft" else None
    context, packed = context_length(config), text.rows == "packed"
    train, held_out = first_process_first(lambda: _both(text, tokenizer, context, day))  # who fills the cache
    padding = padding_token(tokenizer, base_config)
    rows, eval_rows = (part.rows(context, padding, packed) for part in (train, held_out))
    check_tokens(base_config, train, held_out)
    return TrainingData(train, held_out, rows, eval_rows, padding, day)


def _both(
    text: DataOptions, tokenizer: PreTrainedTokenizerBase, context: int, day: date | None
) -> tuple[Tokenised, Tokenised]:
    """What to train on and what is held out."""

    def tokens_of(sources: list[str], option: str) -> Tokenised:
        if text.task == "sft":
            return read_samples(sources, tokenizer, context, day)
        documents = tokenise(load_documents(sources, text.text_column), tokenizer)
        if documents.tokens < 2:
            raise ValueError(f"--{option} {' '.join(sources)} holds no text")
        return documents

    if text.train_file is None:
        train, held_out = (tokenise(part, tokenizer) for part in stdlib_documents())
        return train, held_out
    train_text = tokens_of(text.train_file, "train_file")
    if text.eval_file is None:
        return train_text.hold_out()
    return train_text, tokens_of(text.eval_file, "eval_file")
