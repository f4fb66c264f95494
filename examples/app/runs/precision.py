"""In which dtype a machine computes best."""

from __future__ import annotations

import os
from typing import Any

import torch


def cpu_multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware: AVX512_BF16 or AMX.

    Others widen each number to fp32 first, and are slower than in fp32. torch before 2.13 may not tell.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def computes_in_bf16() -> bool:
    """Whether bfloat16 is the default: on a GPU that has it, and on a processor that multiplies it.

    On a processor accelerate's `ACCELERATE_MIXED_PRECISION=no`, which `accelerate launch` sets too, asks for fp32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return cpu_multiplies_bf16() and os.environ.get("ACCELERATE_MIXED_PRECISION") != "no"


def machine_dtype() -> torch.dtype:
    """The dtype to compute in where none is asked for: bfloat16 where `computes_in_bf16`, else float32."""
    return torch.bfloat16 if computes_in_bf16() else torch.float32
