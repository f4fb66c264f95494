"""QLoRA: frozen weights kept in 4 bits, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's way to keep frozen weights: NF4, its constants quantised as well, to compute in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_bitsandbytes() -> None:
    """Raise `ValueError` if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit needs the package bitsandbytes (pip install '.[qlora]')")
