"""Milliseconds of work on a device, and the rate of its matrix products, the roof over all others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from providers import Attention


class Clock:
    """Times work on the device, with neither its data in the cache nor the time to launch it counted."""

    def __init__(self, device: str, processor_time: bool = False) -> None:
        self.cuda = device == "cuda"
        self.now, self.cores = time.perf_counter, 1
        if processor_time:  # which other programs on the machine disturb less
            self.now, self.cores = time.process_time, torch.get_num_threads()
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def time(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """What `work` returns, and a function that says, after `wait`, how many milliseconds it took."""
        self.flush.zero_()
        if not self.cuda:
            begin = self.now()
            result = work()
            elapsed = 1e3 * (self.now() - begin) / self.cores
            return result, lambda: elapsed
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host launches what follows
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = work()
        last.record()
        return result, lambda: first.elapsed_time(last)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forward_and_backward(self, attend: Attention, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
        *inputs, dout = tensors
        out, forward = self.time(lambda: attend(*inputs))
        _, backward = self.time(lambda: torch.autograd.grad(out, inputs, dout))
        self.wait()
        return forward(), backward()


def matmul_tflops(device: str, dtype: str, clock: Clock) -> float:
    """What torch.mm reaches with large square matrices: the roof over all that is measured."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    samples = []
    for _ in range(10 if device == "cuda" else 4):
        _, elapsed = clock.time(lambda: torch.mm(a, b))
        clock.wait()
        samples.append(elapsed())
    return float(f"{2 * n**3 / statistics.median(samples[1:]) * 1e-9:.4g}")
