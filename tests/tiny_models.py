"""Tiny random models, made from configs: one of each family that the attention is promised for."""

import inspect

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import create_causal_mask

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention weights far from uniform, so that a wrong mask shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "s2attn_group_size": 8,
}

CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama-9-heads-on-3": (
        LlamaConfig,
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
    ),
    "llama-1-head": (LlamaConfig, {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma": (GemmaConfig, {"head_dim": 16, "tie_word_embeddings": True}),
}


def tiny_config(family: str = "llama", **changes: object) -> PreTrainedConfig:
    kind, own = CONFIGS[family]
    return kind(**{**SIZES, **own, **changes})


def tiny_model(
    family: str = "llama",
    attn_implementation: str = "s2attn",
    dtype: torch.dtype = torch.float64,
    config: PreTrainedConfig | None = None,
    **changes: object,
) -> PreTrainedModel:
    """The same weights for the same family, whatever the attention. In eval mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config or tiny_config(family, **changes), attn_implementation=attn_implementation
    )
    return model.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask_of(**arguments: object) -> torch.Tensor | None:
    """What a model's mask preparation gives for a batch of [2, 12]."""
    inputs = {"attention_mask": None, "past_key_values": None}
    known = inspect.signature(create_causal_mask).parameters  # some were renamed or went, up to transformers 5.4
    inputs["inputs_embeds" if "inputs_embeds" in known else "input_embeds"] = torch.zeros(2, 12, 1)
    if "cache_position" in known:
        inputs["cache_position"] = torch.arange(12)
    config = tiny_config(attn_implementation="s2attn")
    return create_causal_mask(**{"config": config, **inputs, **arguments})
