"""Tiny random models, made from configs: one of each family that the attention is promised for."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
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


def op_dtype() -> torch.dtype:
    """The most exact that the op has kernels for on the test's device."""
    return torch.bfloat16 if torch.get_default_device().type == "cuda" else torch.float64


def tiny_model(
    family: str = "llama",
    attn_implementation: str = "s2attn",
    dtype: torch.dtype | None = None,
    config: PreTrainedConfig | None = None,
    **changes: object,
) -> PreTrainedModel:
    """The same weights for the same family, whatever the attention; `op_dtype` if none is given. In eval mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config or tiny_config(family, **changes), attn_implementation=attn_implementation
    )
    return model.to(dtype or op_dtype()).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=random, device="cpu")
    return ids.to(torch.get_default_device())


def assert_close(actual: Tensor, expected: Tensor, family: str = "llama", plain: Tensor | None = None) -> None:
    """Two ways to one result of a family's model, logits unless `plain` is given.

    In fp64 within 1e-5, for models normalise in fp32 inside. In 16 bits, as in op_checks.py, a result may be twice as
    far from the exact one as plain attention in its dtype, and 2 ulp. `expected` is exact if `plain` is given;
    otherwise it is one more such result, and plain attention's error is measured on other tokens.
    """
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    elif actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())
    elif plain is not None:
        # Norms, not the largest errors: those of a bias' few values are too much a matter of luck.
        error, plain_error = ((x.double() - expected).norm().item() for x in (actual, plain))
        bound = 2 * plain_error + 2 * torch.finfo(actual.dtype).eps * expected.norm().item()
        assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"
    else:
        bound = 2 * rounding(family, actual.dtype) + 2 * torch.finfo(actual.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2 * bound)


@cache
def rounding(family: str, dtype: torch.dtype) -> float:
    """The largest error of logits that come from plain attention in `dtype`."""
    ids = tokens(4, 32)
    model = tiny_model(family, "eager", dtype)
    with torch.no_grad():
        logits = model(ids).logits.double()
        return (logits - model.double()(ids).logits).abs().max().item()


@contextmanager
def deterministic() -> Iterator[None]:
    """Gradients are the same bits in every run, on CUDA too; cuBLAS only warns of what it does not promise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def mask_of(**arguments: object) -> torch.Tensor | None:
    """What a model's mask preparation gives for a batch of [2, 12]."""
    inputs = {"attention_mask": None, "past_key_values": None}
    known = inspect.signature(create_causal_mask).parameters  # some were renamed or went, up to transformers 5.4
    inputs["inputs_embeds" if "inputs_embeds" in known else "input_embeds"] = torch.zeros(2, 12, 1)
    if "cache_position" in known:
        inputs["cache_position"] = torch.arange(12)
    config = tiny_config(attn_implementation="s2attn")
    return create_causal_mask(**{"config": config, **inputs, **arguments})
