"""Documents as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from app.inputs.cache import cache_named
from app.inputs.tokenised import HELD_OUT_EVERY, Tokenised
from app.runs.launch import say
from app.runs.wording import counted
from longlora_ext.data import PackedSequences

BATCH_BYTES = 2**24  # of text that is tokenised at once, about
FEATURES = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})


@dataclass(frozen=True)
class Documents(Tokenised[PackedSequences]):
    """Tokenised documents.

    Attributes:
        empty: How many had no text, or white space alone, and were left out.
    """

    empty: int = 0
    noun = "document"

    def hold_out(self) -> tuple[Documents, Documents]:
        """Set every 20th document aside, and never none.

        Where these are more than a fifth of the text, as one of a few long documents may be, only their ends are set
        aside, a tenth of the text.

        Returns:
            `(train, held_out)`.
        """
        count, lengths = len(self.dataset), self.lengths
        chosen = np.arange(min(HELD_OUT_EVERY, count) - 1, count, HELD_OUT_EVERY)
        train = self.dataset.select(np.setdiff1d(np.arange(count), chosen))
        tokens = int(lengths[chosen].sum())
        if tokens <= self.tokens / 5:
            return replace(self, dataset=train), replace(self, dataset=self.dataset.select(chosen))
        heads, tails = [], []
        for document in chosen:
            ids = self.ids(int(document)).tolist()
            cut = len(ids) - max(1, int(len(ids) * self.tokens / 10 / tokens))
            heads.append(ids[:cut])
            tails.append(ids[cut:])
        begun, held_out = (
            datasets.Dataset.from_dict({"input_ids": parts}, features=self.dataset.features) for parts in (heads, tails)
        )
        train = datasets.concatenate_datasets([train, begun])
        return replace(self, dataset=train), replace(self, dataset=held_out)

    def rows(self, context_length: int, pad_token_id: int, packed: bool) -> PackedSequences:
        """Documents laid end to end and cut into rows, or the pieces of each in rows of their own."""
        return PackedSequences(self.arrow_ids, context_length, pad_token_id, own_rows=not packed)

    def check_rows(self, rows: PackedSequences) -> None:
        """Raise `ValueError` if there is nothing to learn, or nothing as long as the context."""
        super().check_rows(rows)
        if rows.tokens < rows.context_length:
            raise ValueError(
                f"the context of {rows.context_length:,} tokens is longer than the whole text of {rows.tokens:,}: "
                "there is nothing so long to learn from"
            )

    def describe(self, rows: PackedSequences) -> dict[str, str]:
        dropped = f"; {counted(self.empty, 'empty document')} dropped" if self.empty else ""
        return {
            "text": f"{self.tokens:,} tokens in {counted(len(self.dataset), 'document')}{dropped}",
            "sequences": _sequences(rows, left_out=self.tokens - rows.tokens),
        }

    def to_measure(self, tokens: int, longest: int) -> tuple[list[np.ndarray], None]:
        """Choose documents, those of `longest` tokens or more first, in their order.

        They are cut so that there are about eight, or as many as have `longest` tokens, or all there are. All of their
        tokens are scored.
        """
        lengths: list[int] = self.lengths.tolist()
        order = sorted(range(len(lengths)), key=lambda document: (-min(lengths[document], longest), document))
        share = max(longest, tokens // min(8, max(1, len(order))))
        chosen: list[np.ndarray] = []
        for document in order:
            take = min(share, lengths[document], tokens)
            if take < 2:
                break
            chosen.append(self.ids(document)[:take])
            tokens -= take
        if not chosen and tokens:
            say("no held-out document is long enough to measure perplexity on")
        elif chosen and len(chosen[0]) < longest:
            why = "--eval_tokens is less" if max(lengths) >= longest else "no held-out document is so long"
            say(f"note: the context of {longest:,} tokens is not put to the test: {why}")
        return chosen, None


def _sequences(rows: PackedSequences, left_out: int) -> str:
    """How many rows of which length, and which tokens are in none."""
    count, length = len(rows), rows.context_length
    if rows.own_rows:
        alone = f"; {counted(left_out, 'token')} that would be alone in a row left out" if left_out else ""
        return f"{count:,} of up to {length:,} tokens, a document or a piece of one in each{alone}"
    last = "; the last token of the text is left out" if left_out else ""
    return f"{count:,} of {length:,} tokens, {rows.padding:,} of them padding{last}"


@cache_named()
def tokenise(documents: datasets.Dataset | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Turn documents into token ids.

    Each document gets the special tokens that the tokenizer adds by itself and ends with the
    end-of-sequence token where the tokenizer has one.

    Args:
        documents: A dataset with a column `text`, or a list of texts.
        tokenizer: The model's tokenizer.

    Returns:
        The documents in the same order, less those without text, which are counted. White space alone is none.

    Raises:
        OSError: The cache cannot be written to.
    """
    if not isinstance(documents, datasets.Dataset):
        documents = datasets.Dataset.from_dict({"text": list(documents)})
    eos = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch["text"] if text and not text.isspace()]
        if not texts:
            return {"input_ids": []}
        rows = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        return {"input_ids": [row if eos is None or row[-1:] == [eos] else [*row, eos] for row in rows]}

    size = documents.data.nbytes // max(1, len(documents))
    batch_size = min(64, max(1, BATCH_BYTES // max(1, size)))
    rows = documents.map(
        encode, batched=True, batch_size=batch_size, remove_columns=["text"], features=FEATURES, desc="tokenising"
    )
    return Documents(rows, empty=len(documents) - len(rows))
