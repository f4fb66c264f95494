"""What a run trains on, and what it holds out to measure on: read, tokenised and cut into rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from app.inputs.corpus import stdlib_documents
from app.inputs.document_lengths import Lengths
from app.inputs.files import check_named_once, load_documents
from app.inputs.mixture import Share, mix
from app.inputs.samples import read_samples
from app.inputs.sources import read_sources
from app.inputs.tokenised import Tokenised, joined
from app.inputs.tokens import tokenise
from app.models.suitable import check_tokens, padding_token
from app.runs.run import Run
from app.training.options import DataOptions
from app.training.template_date import SETTING, template_date
from longlora_ext._processes import first_process_first
from longlora_ext.config import context_length
from longlora_ext.data import PackedSequences, SampleRows


@dataclass(frozen=True)
class Choice:
    """Which documents of the text are trained on.

    Attributes:
        lengths: How long they are.
        short, long: How many were left out because they are shorter, or longer.
        shares: What each source gives, where they have weights.
    """

    lengths: Lengths
    short: int = 0
    long: int = 0
    shares: tuple[Share, ...] = ()

    def describe(self, noun: str) -> dict[str, str]:
        """Lines of the banner by their titles, as far as there was a choice."""
        left_out = self.lengths.describe(noun, self.short, self.long)
        mixture = "\n".join(share.describe(noun) for share in self.shares)
        return {title: lines for title, lines in (("left out", left_out), ("mixture", mixture)) if lines}

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked, without the paths, which may differ in a run that goes on elsewhere."""
        return {
            "train_weights": [round(share.asked, 9) for share in self.shares] or None,
            "min_document_tokens": self.lengths.least,
            "max_document_tokens": self.lengths.most,
        }


@dataclass(frozen=True)
class TrainingData:
    """A text and the rows made of it.

    Attributes:
        train, held_out: What to train on and what is held out, as tokens.
        rows, eval_rows: The same in rows of the new context.
        pad_token_id: What rows are filled up with.
        choice: What of the text is trained on.
        day: What the chat template takes for today, if it prints that.
    """

    train: Tokenised
    held_out: Tokenised
    rows: PackedSequences | SampleRows
    eval_rows: PackedSequences | SampleRows
    pad_token_id: int
    choice: Choice
    day: date | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the losses depend on of all this."""
        return self.rows.fingerprint() | self.choice.settings | ({SETTING: self.day.isoformat()} if self.day else {})


def read_data(
    text: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    base_config: PreTrainedConfig,
    config: PreTrainedConfig,
    run: Run,
    seed: int,
) -> TrainingData:
    """Read what the options name. Collective.

    Args:
        text: The options.
        tokenizer: The model's; for `--task sft` it has a chat template.
        base_config: The model's config.
        config: The same for the new context.
        run: It may go on with an earlier run, on whose day the chat template was used.
        seed: What documents of a mixture are chosen by.

    Raises:
        FileNotFoundError, ValueError, OSError: What is not there, cannot be read, or does not fit the model.
    """
    day = template_date(tokenizer, run) if text.task == "sft" else None
    context, packed = context_length(config), text.rows == "packed"
    train, held_out, choice = first_process_first(lambda: _read(text, tokenizer, context, day, seed))  # fills the cache
    padding = padding_token(tokenizer, base_config)
    rows, eval_rows = (part.rows(context, padding, packed) for part in (train, held_out))
    check_tokens(base_config, train, held_out)
    return TrainingData(train, held_out, rows, eval_rows, padding, choice, day)


def _read(
    text: DataOptions, tokenizer: PreTrainedTokenizerBase, context: int, day: date | None, seed: int
) -> tuple[Tokenised, Tokenised, Choice]:
    """What to train on, what is held out, and how that was chosen."""

    def tokens_of(names: list[str], option: str) -> Tokenised:
        if text.task == "sft":
            return read_samples(names, tokenizer, context, day)
        documents = tokenise(load_documents(names, text.text_column), tokenizer)
        if documents.tokens < 2:
            raise ValueError(f"--{option} {' '.join(names)} holds no text")
        return documents

    train: Tokenised
    held_out: Tokenised
    lengths = Lengths(text.min_document_tokens, text.max_document_tokens)
    if text.train_file is None:
        train, held_out = (tokenise(part, tokenizer) for part in stdlib_documents())
        train, short, long = lengths.keep(train, "Python's standard library")
        return train, held_out, Choice(lengths, short, long)

    sources = read_sources(text.train_file)
    mixed = sources[0].weight is not None
    names = [source.name for source in sources]
    if mixed or text.eval_file:  # what is trained on is not held out
        check_named_once([*names, *(text.eval_file or [])])
    parts, shorter, longer = [], 0, 0
    for part_of in [[name] for name in names] if mixed else [names]:
        part, short, long = lengths.keep(tokens_of(part_of, "train_file"), f"--train_file {' '.join(part_of)}")
        parts.append(part)
        shorter, longer = shorter + short, longer + long
    if text.eval_file is None:
        parts, aside = (list(halves) for halves in zip(*(part.hold_out() for part in parts), strict=True))
        held_out = joined(aside)
    else:
        held_out = tokens_of(text.eval_file, "eval_file")
    if not mixed:
        return parts[0], held_out, Choice(lengths, shorter, longer)
    train, shares = mix(parts, sources, seed)
    return train, held_out, Choice(lengths, shorter, longer, tuple(shares))
