"""A sequence that processes share: time, bytes sent and memory of the halo, of Ulysses, and of one process.

    torchrun --nproc_per_node 2 benchmarks/shared_sequences.py --output result.json
    torchrun --nproc_per_node 1 benchmarks/shared_sequences.py     # one process that holds all of the sequence

Forward and backward of the op, on gloo processes and the CPU. The ways alternate, each after a barrier, and a time is
the median over repeats of the slowest rank's. Bytes are those that `all_to_all_single` sends to other ranks, checked
against the formula of the halo where a rank holds a multiple of the group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bytes_sent import count_sent
from environment import environment
from longlora_ext import s2attn
from longlora_ext.parallel import halo_s2attn, ulysses_s2attn


def peak_memory(work: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak of `work`, beyond those before it (Linux)."""

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
    work()
    return max(0, status("VmHWM") - before)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seqlen", type=int, default=16384, help="tokens of the whole sequence (default: %(default)s)")
    parser.add_argument("--group_size", type=int, help="default: a quarter of the tokens")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=int, default=2, help="KV heads (default: %(default)s)")
    parser.add_argument("--head_dim", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--note", help="kept with the result, such as what else the machine was doing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(options.threads)
    sent = count_sent()
    group_size, length = options.group_size or options.seqlen // 4, options.seqlen // ranks
    torch.manual_seed(rank)
    dtype = getattr(torch, options.dtype)
    shapes = [(1, length, heads, options.head_dim) for heads in (options.heads, options.kv_heads, options.kv_heads)]
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    dout = torch.randn(shapes[0]).to(dtype)
    places = torch.arange(rank * length, (rank + 1) * length)[None]

    ways: dict[str, Callable[[], Tensor]] = {"one process": lambda: s2attn(q, k, v, group_size)}
    if ranks > 1:
        ways = {"halo": lambda: halo_s2attn(q, k, v, group_size, places)}
        if options.heads % ranks == 0:
            ways["ulysses"] = lambda: ulysses_s2attn(q, k, v, group_size, places)

    def step(way: str) -> None:
        ways[way]().backward(dout)
        for x in (q, k, v):
            x.grad = None

    results: dict[str, dict[str, Any]] = {}
    for way in ways:
        step(way)  # what is done once
        sent.clear()
        results[way] = {"peak bytes": peak_memory(lambda: step(way)), "bytes sent": sum(sent)}  # noqa: B023
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            dist.barrier()
            begin = time.perf_counter()
            step(way)
            seconds[way].append(time.perf_counter() - begin)

    mine = {way: results[way] | {"seconds": seconds[way]} for way in ways}
    of_all: list[Any] = [None] * ranks
    dist.all_gather_object(of_all, mine)
    if rank == 0:
        shape = {name: getattr(options, name) for name in ("seqlen", "heads", "kv_heads", "head_dim", "dtype")}
        found = {way: summary([its[way] for its in of_all]) for way in ways}
        if "halo" in found and length % group_size == 0:
            numbers = 2 * -(-options.kv_heads // 2) * (group_size // 2) * options.head_dim
            found["halo"]["bytes of the formula"] = 2 * numbers * dtype.itemsize  # forward and backward
        content = {**shape, "group_size": group_size, "ranks": ranks, "ways": found}
        content["environment"] = environment("cpu", options.note)
        print(json.dumps(content, indent=1))
        if options.output:
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    dist.destroy_process_group()


def summary(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks found of one way: their slowest, and the most."""
    slowest = [max(times) for times in zip(*(its["seconds"] for its in of_ranks), strict=True)]
    return {
        "median seconds": round(statistics.median(slowest), 5),
        "least seconds": round(min(slowest), 5),
        "most bytes sent by a rank": max(its["bytes sent"] for its in of_ranks),
        "bytes sent by all": sum(its["bytes sent"] for its in of_ranks),
        "most peak MiB of a rank": round(max(its["peak bytes"] for its in of_ranks) / 2**20, 1),
    }


if __name__ == "__main__":
    main()
