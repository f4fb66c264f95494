"""Times S2-Attn beside the other ways to compute it, forward and backward apart, and dense attention beside both.

On the GPU, where there is one, or on the CPU:

    python benchmarks/attention.py                               all points
    python benchmarks/attention.py --seqlen 4096 --head_dim 64   one of them

Each provider is first checked against ours, gradients too, where it computes the same. Then all take turns: a round
times each once, forward and backward, with other data in the cache, and the median over the rounds counts. A provider
that cannot run at a point says why. The results go to a JSON file after every point, with a plot beside it, and are
printed as a table (`benchmarks/table.py`). Rates count the pairs of query and key that the provider itself attends to:
two matrix products forward, five backward, 2 D operations a pair in each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
import time
import warnings
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clock import Clock, matmul_tflops
from draw import draw
from environment import ROOT, environment
from providers import PROVIDERS, Attention, NotHere, Pattern, Point, Provider
from table import tables

PRODUCTS = {"forward": 2, "backward": 5}  # matrix products: S and O; S again, dP, dQ, dK, dV
FEWEST_ROUNDS = 3
# Relative distance from ours, by the norm: twice what rounding to the dtype leaves of q, k, v, P and dS.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "dtype": ["bfloat16"],
        "heads": 32,
        "kv_heads": [32, 8],
        "seqlen": [1024, 2048, 4096, 8192, 16384, 32768, 65536, 102400],
        "min_tokens": 16384,
        "rounds": 20,
        "seconds": 5.0,
    },
    "cpu": {
        "dtype": ["float32", "bfloat16"],
        "heads": 8,
        "kv_heads": [8, 2],
        "seqlen": [1024, 2048, 4096, 8192, 16384],
        "min_tokens": 1,
        "rounds": 5,
        "seconds": 30.0,
    },
}


def check(point: Point, pattern: Pattern, attend: Attention, tensors: tuple[Tensor, ...]) -> None:
    """Raises NotHere where `attend` is not what ours computes of `pattern`."""
    *inputs, dout = tensors
    same_from = pattern.group_size // 2 if pattern.wraps else 0
    dout = dout.clone()
    dout[:, :same_from] = 0  # rows that see the future of the wrap-around give no gradient either

    def results(attend: Attention) -> tuple[Tensor, ...]:
        out = attend(*inputs)
        return out.detach()[:, same_from:], *torch.autograd.grad(out, inputs, dout)

    expected = results(pattern.attend)
    for name, a, b in zip(("out", "dq", "dk", "dv"), results(attend), expected, strict=True):
        distance = ((a.float() - b.float()).norm() / b.float().norm()).item()
        if not distance <= TOLERANCE[point.dtype]:  # NaN is not
            raise NotHere(f"{name} differs from ours by {distance:.2g} of its norm")


def peak_memory(attend: Attention, tensors: tuple[Tensor, ...]) -> dict[str, int]:
    """Bytes beside the inputs at most in use: in the forward, and in all."""
    *inputs, dout = tensors
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(*inputs)
    forward = torch.cuda.max_memory_allocated() - before
    grads = torch.autograd.grad(out, inputs, dout)
    torch.cuda.synchronize()
    del out, grads
    return {"forward_peak_bytes": forward, "peak_bytes": torch.cuda.max_memory_allocated() - before}


def prepare(point: Point, provider: Provider, tensors: tuple[Tensor, ...], checked: bool) -> tuple[Attention, dict]:
    """The provider's function for this point, checked and warmed up, and what it needs of memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attend = provider.make(point)
            if not checked:
                check(point, provider.pattern(point), attend, tensors)
            *inputs, dout = tensors
            torch.autograd.grad(attend(*inputs), inputs, dout)
            return attend, peak_memory(attend, tensors) if point.device == "cuda" else {}
        except torch.OutOfMemoryError:
            raise NotHere("out of memory") from None
        except NotHere:
            raise
        except Exception as error:  # of whatever kind: the others go on. torch says in warnings why no kernel would do
            said = [str(error), *(str(warning.message) for warning in caught)]
            raise NotHere("; ".join(dict.fromkeys(textwrap.shorten(text, 300) for text in said))) from error


def measure(point: Point, names: list[str], clock: Clock, unfit: dict[str, str | None], limits: Any) -> dict[str, Any]:
    """The results of all providers at one point. `unfit` is what checks found at shorter lengths, by provider."""
    tensors = point.tensors()
    attends: dict[str, Attention] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            if reason := unfit.get(name):
                raise NotHere(reason)
            checked = name == "ours" or name in unfit
            attends[name], results[name] = prepare(point, PROVIDERS[name], tensors, checked)
            unfit[name] = None
        except NotHere as reason_:
            results[name] = {"reason": str(reason_)}
            if "differs from ours" in str(reason_):
                unfit[name] = str(reason_)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in attends}
    begin = time.monotonic()
    for done in range(limits.rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() - begin > limits.seconds:
            break
        for name, attend in list(attends.items()):
            try:
                times[name].append(clock.forward_and_backward(attend, tensors))
            except torch.OutOfMemoryError:
                results[name] = {"reason": "out of memory"}
                del attends[name]
    for name in attends:
        pairs = PROVIDERS[name].pattern(point).pairs(point)
        results[name] |= {"pairs": pairs, "rounds": len(times[name])}
        for direction, samples in zip(PRODUCTS, zip(*times[name], strict=True), strict=True):
            median = statistics.median(samples)
            rate = 2 * PRODUCTS[direction] * point.head_dim * pairs / median * 1e-9
            figures = {"ms": median, "min_ms": min(samples), "max_ms": max(samples), "tflops": rate}
            results[name][direction] = {key: float(f"{value:.5g}") for key, value in figures.items()}
    return asdict(point) | {"results": results}


def points_of(options: argparse.Namespace) -> list[Point]:
    """Shorter ones first, so that each provider is checked early and an interrupted run leaves whole lengths."""
    return [
        Point(
            device=options.device,
            dtype=dtype,
            head_dim=head_dim,
            heads=options.heads,
            kv_heads=kv_heads,
            seqlen=seqlen,
            batch=max(1, options.min_tokens // seqlen),
            group_size=options.group_size or max(2, seqlen // options.groups // 2 * 2),
        )
        for seqlen, dtype, head_dim, kv_heads in product(
            sorted(options.seqlen), options.dtype, options.head_dim, options.kv_heads
        )
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cuda", "cpu"], default=here, help="where to measure (here: %(default)s)")
    add("--dtype", nargs="+", choices=list(TOLERANCE), help="of q, k and v (bfloat16; on a CPU float32 as well)")
    add("--head_dim", nargs="+", type=int, default=[64, 128], help="(64 128)")
    add("--heads", type=int, help="query heads (32; 8 on a CPU)")
    add("--kv_heads", nargs="+", type=int, help="KV heads that they share (32 8; 8 2 on a CPU)")
    add("--seqlen", nargs="+", type=int, help="tokens in a row (1024 to 102400; to 16384 on a CPU)")
    add("--groups", type=int, default=4, help="groups in a row: group size = seqlen / groups (4)")
    add("--group_size", type=int, help="tokens of a group, the same at every length, instead of --groups")
    add("--min_tokens", type=int, help="shorter rows come as a batch of this many tokens (16384; one row on a CPU)")
    add("--providers", nargs="+", choices=list(PROVIDERS), help="what to compare; ours is always there (all)")
    add("--rounds", type=int, help="turns of each provider at a point, at most (20; 5 on a CPU)")
    add("--seconds", type=float, help=f"for the turns at a point, about; {FEWEST_ROUNDS} are taken anyway (5; 30)")
    add("--processor_time", action="store_true", help="on a CPU that others use: the process's own time, a core")
    add("--output", type=Path, help="the JSON file, the plot beside it (benchmarks/results/attention_DEVICE.json)")
    add("--note", help="what a reader of the figures must know, such as that the machine was shared")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.output is None:
        options.output = ROOT / "benchmarks" / "results" / f"attention_{options.device}.json"
    return options


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    clock = Clock(options.device, options.processor_time)
    wanted = {"ours", *(options.providers or PROVIDERS)}
    names = [name for name, provider in PROVIDERS.items() if name in wanted and options.device in provider.devices]
    run: dict[str, Any] = {"environment": environment(options.device, options.note)}
    run["matmul_tflops"] = {dtype: matmul_tflops(options.device, dtype, clock) for dtype in options.dtype}
    run["points"] = []
    unfit: dict[tuple, dict[str, str | None]] = {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for point in points_of(options):
        shape = (point.dtype, point.head_dim, point.kv_heads)
        run["points"].append(measure(point, names, clock, unfit.setdefault(shape, {}), options))
        # The best over the whole run: what slows a machine down for a while must not lower the roof.
        again = matmul_tflops(options.device, point.dtype, clock)
        run["matmul_tflops"][point.dtype] = max(run["matmul_tflops"][point.dtype], again)
        options.output.write_text(json.dumps(run, indent=1) + "\n")
        print(f"measured {point}", file=sys.stderr, flush=True)
    draw(run, options.output.with_suffix(".png"))
    print(tables(run))
    if failed := [point["results"]["ours"] for point in run["points"] if "reason" in point["results"]["ours"]]:
        sys.exit(f"ours did not run at {len(failed)} points: {failed[0]['reason']}")


if __name__ == "__main__":
    main()
