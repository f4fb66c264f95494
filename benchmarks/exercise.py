"""Runs the operator on a GPU and little else: what compute-sanitizer watches and Nsight Compute profiles.

compute-sanitizer --tool racecheck python benchmarks/exercise.py
ncu --set full python benchmarks/exercise.py --slowest_of benchmarks/results/attention_cuda.json
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from longlora_ext import s2attn
from providers import Point


def small_problems(device: str) -> None:
    """Each head dim with kernels of its own and one between, both dtypes, and whatever a call may ask for."""
    for head_dim, dtype, deterministic in product((40, 64, 128, 256), ("bfloat16", "float16"), (False, True)):
        point = Point(device, dtype, head_dim, heads=4, kv_heads=2, seqlen=333, batch=2, group_size=128)
        documents = torch.arange(333, dtype=torch.int32).div(100, rounding_mode="floor").mul(100).expand(2, -1)
        cases: list[tuple[int, torch.Tensor | None, dict[str, Any]]]
        cases = [(0, None, {}), (0, documents, {"sink": True}), (150, None, {"sink": True, "window": 70})]
        for before, doc_start, pattern in cases:
            q, k, v, dout = point.tensors()
            doc_start = None if doc_start is None else doc_start.contiguous().to(device)
            pattern |= {"deterministic": deterministic, "return_lse": True}
            out, lse = s2attn(q[:, before:], k, v, point.group_size, doc_start, **pattern)
            results = out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout[:, before:], torch.ones_like(lse)))
            if not all(x.isfinite().all() for x in results):
                raise SystemExit(f"not finite: {point}")
    print("all results are finite")


def slowest(path: Path) -> Point:
    """Where ours, forward and backward, falls shortest of torch.mm's rate."""
    run = json.loads(path.read_text())

    def share(point: dict) -> float:
        result = point["results"]["ours"]
        if "reason" in result:
            return float("inf")
        return (result["forward"]["tflops"] + result["backward"]["tflops"]) / run["matmul_tflops"][point["dtype"]]

    found = min(run["points"], key=share)
    return Point(**{key: value for key, value in found.items() if key != "results"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(cuda)")
    parser.add_argument("--slowest_of", type=Path, help="instead, the slowest point of this file of attention.py, once")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.slowest_of is None:
        return small_problems(options.device)
    point = slowest(options.slowest_of)
    q, k, v, dout = point.tensors()
    torch.autograd.grad(s2attn(q, k, v, point.group_size), (q, k, v), dout)
    print(point)


if __name__ == "__main__":
    main()
