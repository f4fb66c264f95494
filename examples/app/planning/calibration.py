"""How fast this machine trains: one rate, measured on a few layers of the planned model, from which hours follow.

The rate is of floating-point operations as `Plan` counts them, in a forward and backward pass of two layers, with
embedding, loss and activation checkpointing, on random weights. What is not in it: the optimizer's step, the exchange
between GPUs, reading data. A step's share of these falls with the length of its sequences.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from app.planning.dry_run import cpu_scratch
from app.planning.planner import Plan, Way
from app.runs.precision import machine_dtype
from app.runs.wording import counted
from app.training.recipe import RECIPE, accumulation

#: A step is measured that takes so many seconds, or is of the whole context.
ENOUGH = 3.0
REPEATS = 3


@dataclass(frozen=True)
class Rate:
    """What was measured, and on what."""

    flops_a_second: float
    tokens: int
    layers: int
    seconds: float
    dtype: str
    device: str


def measure_rate(plan: Plan, enough: float = ENOUGH) -> Rate:
    """Time steps of the first layers of a plan's model on the GPU, in bf16, or else on the CPU, in what it trains in.

    Tokens are doubled until a step takes `enough` seconds or has the planned context. The median of three counts.

    Raises:
        RuntimeError: This machine cannot run it, as where two layers are more than its memory.
    """
    on_gpu = torch.cuda.is_available()
    run = replace(plan.run, batch=1, sequence_parallel_size=1, load_in_4bit=False)
    if not on_gpu:
        run = replace(run, dtype=machine_dtype(), scratch=cpu_scratch)
    layers = [plan.kinds[0].first] * min(2, plan.config.num_hidden_layers)
    model = Plan(plan.base, plan.tokens, run, plan.kinds).model(Way(), layers, device="cuda" if on_gpu else "cpu")

    def seconds_of(tokens: int) -> float:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    tokens = min(128, plan.tokens)
    while (seconds := _warm(seconds_of, tokens)) < enough and tokens < plan.tokens:
        tokens = min(2 * tokens, plan.tokens)
    seconds = statistics.median([seconds, *(seconds_of(tokens) for _ in range(REPEATS - 1))])
    # Counted in bfloat16 whatever was measured: the operations are as many, and torch counts experts in it alone.
    counts = replace(run, group_size=plan.config.s2attn_group_size, dtype=torch.bfloat16)
    flops = Plan(plan.base, tokens, counts, plan.kinds).flops_of(layers)
    device = torch.cuda.get_device_name() if on_gpu else counted(torch.get_num_threads(), "CPU thread")
    dtype = str(run.dtype).removeprefix("torch.")
    return Rate(flops / seconds, tokens, len(layers), seconds, dtype, device)


def _warm(seconds_of: Callable[[int], float], tokens: int) -> float:
    """The time of a second call: the first one allocates."""
    seconds_of(tokens)
    return seconds_of(tokens)


def rate_lines(found: dict[str, Any]) -> list[str]:
    """Tokens a second and hours, to read, from a plan's figures."""
    rate, run, context = found["rate"], found["run"], found["context"]
    at_once = run["gpus"] * run["batch"] // run["sequence_parallel_size"]
    sequences = RECIPE["max_steps"] * at_once * accumulation(at_once)
    all_of = [found["flops_of_a_sequence"][name]["all"] for name in ("s2", "dense")]
    speed = rate["flops_a_second"] * run["gpus"]
    values = {
        "tokens a second": [f"{speed / flops * context:,.4g}" for flops in all_of],
        f"hours of {RECIPE['max_steps']:,} steps": [f"{sequences * flops / speed / 3600:,.4g}" for flops in all_of],
    }
    lines = [f"{'at the rate of this machine':<32}{'S2-Attn':>16}{'dense':>16}"]
    lines += [f"{name:<32}" + "".join(f"{value:>16}" for value in pair) for name, pair in values.items()]
    lines.append(
        f"measured: {rate['flops_a_second'] / 1e12:,.4g} TFLOP/s, {rate['device']}, {rate['dtype']}, "
        f"{counted(rate['layers'], 'layer')} on {rate['tokens']:,} tokens in {rate['seconds']:.2f} s"
    )
    if run["gpus"] > 1:
        lines.append(f"each of the {run['gpus']} GPUs is taken to be as fast as that, and their exchange to be free")
    return lines
