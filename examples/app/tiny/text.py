"""The text that the tiny Llama sees in training, and its perplexity on what it has not seen."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.tiny.model import CONTEXT_LENGTH

EVAL_LENGTHS = (256, 512, 1024)


class Windows(Dataset):
    """`count` windows of `length` tokens out of one stream; every pass over it is cut at another offset."""

    def __init__(self, stream: torch.Tensor, length: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts: list[int] = []
        while len(starts) < count:
            offset = int(torch.randint(length, (), generator=generator))
            blocks = torch.arange(offset, len(stream) - length, length)
            starts += blocks[torch.randperm(len(blocks), generator=generator)].tolist()
        self.stream, self.length, self.starts = stream, length, starts[:count]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.stream[self.starts[index] : self.starts[index] + self.length]
        return {"input_ids": window, "labels": window}


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[torch.Tensor]:
    """Each document's tokens, with the end-of-text token after the last."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def held_out_windows(encoded: list[torch.Tensor], length: int, count: int) -> torch.Tensor:
    """At most `count` windows [count, length], none across two documents, spread evenly over them."""
    windows = torch.cat([tokens[: len(tokens) // length * length].view(-1, length) for tokens in encoded])
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, windows: torch.Tensor, length: int) -> float:
    """Perplexity of `windows` [count, n] where the model sees pieces of `length` tokens of them."""
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.double()
        for batch in windows.reshape(-1, length).split(max(1, 4096 // length))
    ]
    return math.exp(torch.stack(losses).mean())


def evaluate(folder: Path, windows: torch.Tensor) -> dict[str, dict[str, float]]:
    """Perplexities of the model stored in `folder`: as it is, and with RoPE scaled to the longest length."""
    result: dict[str, dict[str, float]] = {}
    for name, factor in (("unscaled", 1.0), ("scaled_x4", max(EVAL_LENGTHS) / CONTEXT_LENGTH)):
        config = LlamaConfig.from_pretrained(folder)
        if factor != 1:
            config.rope_parameters = dict(config.rope_parameters or {}, rope_type="linear", factor=factor)
        model = LlamaForCausalLM.from_pretrained(folder, config=config).eval()
        result[name] = {str(length): round(perplexity(model, windows, length), 3) for length in EVAL_LENGTHS}
    return result
