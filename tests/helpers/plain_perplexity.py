"""Perplexity by the definition, token by token."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import LlamaForCausalLM

import longlora_ext.attention  # noqa: F401


def brute_force(model: LlamaForCausalLM, documents: list[np.ndarray], window: int, stride: int) -> float:
    """Each token by itself, from the context that the first window to reach it gives it."""
    losses = []
    for document in documents:
        for token in range(1, len(document)):
            begin = 0
            while begin + window <= token:
                begin += stride
            context = torch.tensor(document[None, begin:token])
            logits = model(input_ids=context, use_cache=False).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, -1)[document[token]].item())
    return math.exp(sum(losses) / len(losses))
