"""A model's tokenizer. Out of a GGUF file it splits text as the file says, which transformers does not always do."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from app.models.gguf_rope import read_gguf
from app.runs.launch import say
from longlora_ext.adapter._tokenizer import plain_tokenizer

#: Names in `tokenizer.ggml.pre` of GPT-2's way to split text. It is what transformers does with names it does not know.
AS_GPT2 = {"exaone4", "gpt-2", "granite-docling", "jais", "mpt", "olmo", "phi-2", "trillion"}
#: And of GPT-2's way after each digit was put by itself, whereby all spaces before a digit stay together.
DIGITS_FIRST = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
#: And of the ways of Llama 3, Tekken and Chameleon: llama.cpp begins a text with BOS there, unless the file says no.
WITH_BOS = {
    "chameleon", "falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0",
    "pixtral", "tekken",
}  # fmt: skip


def read_tokenizer(source: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model folder, of a name on a hub, or of a GGUF file.

    Text that is split otherwise than in the model's training becomes other tokens, without an error. A GGUF file names
    its way; llama.cpp knows all names (src/llama-vocab.cpp), transformers some of them. With one that neither
    transformers nor this function knows, text is split as for GPT-2, and that is said. The name also says whether text
    begins with BOS, where the file has no field for that.

    Args:
        source: The folder or name.
        gguf_file: The file's name in it.
    """
    if gguf_file is None:
        return plain_tokenizer(AutoTokenizer.from_pretrained(source), source)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    file = str(cached_file(source, gguf_file))
    way = _field(file, "pre")
    if way in WITH_BOS and _field(file, "add_bos_token") is None and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return tokenizer
    if way in DIGITS_FIRST:
        digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    elif way not in AS_GPT2:
        _say_unknown(gguf_file, way)
    return tokenizer


def sha256_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a tokenizer, with its chat template, from any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(json.dumps([content, tokenizer.chat_template]).encode()).hexdigest()


# A run reads a tokenizer twice: for its text, and to write the model folder.
@cache
def _say_unknown(gguf_file: str, way: str | None) -> None:
    said = way not in (None, "default")
    named = f"calls its way to split text {way!r}, which is not known here" if said else "has no tokenizer.ggml.pre"
    say(
        f"note: {gguf_file} {named}: text is split as for GPT-2, which may give other tokens than those that the model "
        "has learned. The model's own folder, where there is one, has its tokenizer"
    )


def _field(file: str, name: str) -> Any:
    """What a GGUF file says of its tokenizer, or None."""
    field = read_gguf(file).fields.get(f"tokenizer.ggml.{name}")
    return field.contents() if field else None
