"""A tiny base model in a folder, and twenty steps of training it: what the adapter tests share with their workers."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import longlora_ext.attention  # noqa: F401
from longlora_ext.config import extend_config
from tiny_models import VOCABULARY, tiny_config, tokens

STEPS, LEARNING_RATE, LENGTH, CONTEXT = 20, 2e-5, 100, 256


def save_base(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """A base model in bf16 with a context of 64, and a tokenizer."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    del config.s2attn_group_size
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


def extended_model(base: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        base, config=extend_config(AutoConfig.from_pretrained(base), CONTEXT), dtype=dtype, attn_implementation="s2attn"
    )


def is_tied(model: PreTrainedModel) -> bool:
    """Whether input and output embedding are one weight."""
    return model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def batches(rank: int = 0) -> Iterable[dict[str, torch.Tensor]]:
    for step in range(STEPS):
        ids = tokens(1, LENGTH, seed=1000 * rank + step)
        yield {"input_ids": ids, "labels": ids}


def joined_batches() -> Iterable[dict[str, torch.Tensor]]:
    """What two ranks see in a step, as one batch; each row has as many tokens, so that its mean loss is theirs."""
    for first, second in zip(batches(0), batches(1), strict=True):
        yield {name: torch.cat([first[name], second[name]]) for name in first}


def train(model: torch.nn.Module, data: Iterable[dict[str, torch.Tensor]] | None = None) -> None:
    """Twenty steps of AdamW without any launcher."""
    model.train()
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    for batch in batches() if data is None else data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def lora_a(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Where LoRA's random halves begin, under the names they are saved with."""
    return {
        name.replace(".default.", "."): weight.detach().float().clone()
        for name, weight in model.named_parameters()
        if ".lora_A." in name
    }


def moved(saved: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, float]:
    """The part of the weights of each saved tensor that differ from where they began."""
    return {name: (weight != began(name, base)).float().mean().item() for name, weight in saved.items()}


def began(name: str, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where a saved tensor began, in fp32: `base` holds the base model and LoRA's random halves."""
    origin = base.get(name, base.get(name.removeprefix("base_model.model.")))
    if ".lora_B." in name:
        origin = torch.zeros(())
    elif origin is None and name.endswith("lm_head.weight"):  # tied
        origin = base["model.embed_tokens.weight"]
    assert origin is not None, name
    return origin.float()
