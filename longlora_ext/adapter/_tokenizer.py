"""The tokenizer of a model with a longer context: it must not say that a text may be no longer than before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_LENGTH = "model_max_length"


def plain_tokenizer(tokenizer: Any, source: str, **hub_arguments: Any) -> Any:
    """A tokenizer that `AutoTokenizer` has read from `source`, or transformers' own in place of mistral-common's.

    Where that package is installed, as vLLM asks for it, models with a `tekken.json` get its tokenizer, which takes no
    chat template and other arguments.
    """
    if type(tokenizer).__name__ != "MistralCommonBackend":
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(source, **hub_arguments)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, context: int) -> None:
    """Save a tokenizer beside a model that reads `context` tokens.

    With the base model's `model_max_length`, `truncation=True` would cut texts to the old context.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(said.get(_LENGTH), (int, float)) and said[_LENGTH] < context:
        said[_LENGTH] = context
        path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
