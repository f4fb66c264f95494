"""The model card of the tiny Llama."""

from __future__ import annotations

from typing import Any

from transformers import LlamaForCausalLM

from app.tiny.model import CONTEXT_LENGTH, END_OF_TEXT
from app.tiny.text import EVAL_LENGTHS

CARD = """\
# A tiny Llama to test with

{parameters:,} parameters, context {context} tokens, trained from scratch by `examples/train_tiny_llama.py`
on the standard library of CPython {python} ({train_tokens:,} tokens of source code and of the language
reference; one twelfth, chosen by module name, is held out: see `examples/app/inputs/corpus.py`). It has
learned what Python source looks like, and nothing else. It exists so that the examples and tests of this
project run everywhere in minutes, without a download or a GPU. Do not use it for anything else.

- Architecture: `LlamaForCausalLM`, {layers} layers, hidden size {hidden}, {heads} heads on {kv_heads} KV
  heads of {head_dim} dimensions, RoPE theta 10000, tied embeddings. The weights are stored in bfloat16 and
  load as float32.
- Tokenizer: byte-level BPE, {vocab:,} tokens, trained on the same text. It can encode any bytes, adds nothing
  to a text, and `{end_of_text}` separates documents.
- Training: {steps:,} steps of {batch} x {context} tokens, seed {seed}, {minutes:.0f} minutes{resumed}; the loss
  curve, the versions and the corpus' SHA-256 are in `training_log.json`.

Perplexity of the stored weights on held-out documents, in windows of the given number of tokens, with dense
attention:

| tokens | RoPE unscaled | RoPE scaled x4, not trained |
|---|---|---|
{table}

It does not extrapolate beyond its {context} tokens, and scaling RoPE alone does not help.
`examples/finetune_llama.py` extends it.

The text it was trained on is part of CPython, under the PSF License Agreement. The model has the licence of
this project.
"""


def model_card(model: LlamaForCausalLM, log: dict[str, Any]) -> str:
    """The card of a model with its training log."""
    config, arguments, found = model.config, log["arguments"], log["perplexity"]
    columns = [[f"{found[name][str(length)]:.1f}" for length in EVAL_LENGTHS] for name in found]
    rows = zip(map(str, EVAL_LENGTHS), *columns, strict=True)
    return CARD.format(
        parameters=log["parameters"],
        context=CONTEXT_LENGTH,
        python=log["versions"]["python"],
        train_tokens=log["train_tokens"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        end_of_text=END_OF_TEXT,
        steps=arguments["max_steps"],
        batch=arguments["batch_size"],
        seed=arguments["seed"],
        minutes=log["seconds"] / 60,
        resumed=f" from {log['resumed_from']} on" if log["resumed_from"] else "",
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
    )
