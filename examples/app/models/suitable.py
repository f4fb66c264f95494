"""Whether a model can be used with S2-Attn, with its tokenizer and with a text: refused here, or not at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from app.inputs.tokenised import Tokenised
from longlora_ext._fields import kv_heads
from longlora_ext._per_layer import layer_configs
from longlora_ext._routed import check_layer_types, check_routed
from longlora_ext.attention import attention_window
from longlora_ext.config import context_length
from longlora_ext.ops import check_runs

LARGEST_HEAD_DIM = 256  # of a kernel
#: Models that have a mask made for a window whether or not a layer has one.
NEEDS_A_WINDOW = ("afmoe", "cohere2", "ministral", "olmo3")


def head_dim_of(config: PreTrainedConfig) -> int:
    """Dimensions of a head of q and k, in the layer that has the most of them."""
    return max(map(_head_dim, layer_configs(config)))


def _head_dim(layer: PreTrainedConfig) -> int:
    heads = getattr(layer, "num_attention_heads", None)
    return getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else LARGEST_HEAD_DIM)


def check_attention(config: PreTrainedConfig, context: int | None = None) -> None:
    """Raise `ValueError` if S2-Attn cannot express the model's attention.

    Args:
        config: The model's config.
        context: Tokens that it is to be trained with, which a window may hold. Default: four times its own.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        check_routed(model_class)
    check_layer_types(config)
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError("its attention caps its logits (attn_logit_softcapping), which S2-Attn cannot express")
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError("its attention is bidirectional, and S2-Attn is causal")
    _check_window(config, context)
    if getattr(config, "attention_dropout", 0):
        raise ValueError(
            f'its attention has dropout ({config.attention_dropout}), which S2-Attn has not: set "attention_dropout": '
            "0.0 in its config.json"
        )
    for layer in layer_configs(config):
        heads = getattr(layer, "num_attention_heads", None)
        if heads and heads % kv_heads(layer):
            raise ValueError(f"its {heads} query heads are no multiple of its {kv_heads(layer)} key and value heads")


def _check_window(config: PreTrainedConfig, context: int | None) -> None:
    """A sliding window is S2-Attn's to keep to; refused is what is none."""
    window, layers, kind = attention_window(config), getattr(config, "layer_types", None), config.model_type
    if layers and window is None and getattr(config, "sliding_window", 0) is None and kind in NEEDS_A_WINDOW:
        raise ValueError(
            'its config has no "sliding_window", and though no layer uses one, its code in transformers asks for it: '
            'set "sliding_window": 4096, or any number, in its config.json'
        )
    if window is None or window >= (context or 4 * context_length(config)):
        return
    chunks = getattr(config, "attention_chunk_size", None)
    if chunks is not None and window == chunks:
        raise ValueError(f"its attention is in chunks of {chunks} tokens, which S2-Attn cannot express")
    if window < 1:
        none = "" if layers else "null, or "
        raise ValueError(
            f"its attention has a sliding window of {getattr(config, 'sliding_window', None)} tokens: set "
            f'"sliding_window": {none}a number of tokens, in its config.json'
        )


def check_context(option: str, tokens: int, own: int) -> None:
    """Raise `ValueError` if `option` asks for a context that is shorter than the model's own."""
    if tokens < own:
        raise ValueError(
            f"{option} {tokens} is less than the model's own {own}: give more to extend it, or {own} to train it as it "
            "is"
        )


def check_kernels(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, **pattern: Any) -> None:
    """Raise `ValueError` if S2-Attn, with this `sink` and `window`, does not run there: it is tried, and says best
    itself what it lacks."""
    try:
        check_runs(device, dtype, head_dim_of(config), **pattern)
    except RuntimeError as error:
        raise ValueError(f"S2-Attn does not run here, on {device.type} in {dtype}: {error}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if it knows no words, which is what some transformers make of a folder without its files."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError("it has special tokens alone: its files are missing")


def check_tokens(config: PreTrainedConfig, *texts: Tokenised) -> None:
    """Raise `ValueError` if the tokenizer made tokens that the model does not know."""
    check_largest_token(config, max(text.largest_id for text in texts))


def check_largest_token(config: PreTrainedConfig, largest: int) -> None:
    """Raise `ValueError` if the model does not know the largest of a text's token ids."""
    if largest >= config.vocab_size:
        raise ValueError(
            f"the text has the token id {largest}, but the model's vocabulary has {config.vocab_size} tokens: this is "
            "not the model's own tokenizer"
        )


def padding_token(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """A token to fill a sequence up with. Nothing is learned from it, so any does that the model knows."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return next((token for token in known if token < config.vocab_size), 0)
