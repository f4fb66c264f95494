"""One of several processes that attend to sequences they share, and compare with the definition on all of them.

    torchrun --nproc_per_node 2 tests/helpers/halo_worker.py RESULT.json

The first one writes what it found, for test_halo.py to judge.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bytes_sent import count_sent
from halo_cases import CASES, HEAD_DIM, Case
from longlora_ext.parallel import _exchange, halo_s2attn, ulysses_s2attn
from longlora_ext.reference import s2attn_reference

#: Bytes that this rank sent to others, by `all_to_all_single`.
sent = count_sent()


def main() -> None:
    dist.init_process_group("gloo")
    found = {name: compared(case, halo_s2attn) for name, case in CASES.items()}
    divide = {name: case for name, case in CASES.items() if divides(case, dist.get_world_size())}
    found |= {f"ulysses {name}": compared(case, ulysses_s2attn) for name, case in divide.items()}
    found |= {"errors": errors(), "again": again(), "bf16": bf16()}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    said = without_the_last()
    if dist.get_rank() == 0:
        ranks[0]["dead"] = said
        Path(sys.argv[1]).write_text(json.dumps(ranks))
    os._exit(0)  # the group is of no use any more


def divides(case: Case, ranks: int) -> bool:
    """Whether Ulysses can share the heads: key and value heads are divided, or each is on several ranks."""
    return case.heads % ranks == 0 and (case.kv_heads % ranks == 0 or ranks % case.kv_heads == 0)


def without_the_last() -> str:
    """What a rank is told if the last one has died."""
    _exchange.ROLL_CALL = 2.0
    x, places = torch.ones(1, 8, 2, HEAD_DIM), torch.arange(8)[None] + 8 * dist.get_rank()
    try:
        halo_s2attn(x, x, x, 64, places)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def share(x: Tensor) -> Tensor:
    """This rank's part of the rows of a tensor [B, N, ...]."""
    return x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def compared(case: Case, attend: Callable[..., Tensor]) -> dict[str, Any]:
    """How far the result and gradients are from the definition's, at most, and the bytes sent forward and back."""
    torch.manual_seed(0)
    whole, dout, places = case.tensors(dist.get_world_size())
    doc_start = (torch.arange(places.shape[1]) - places).to(torch.int32)
    expected = [x.clone().requires_grad_() for x in whole]
    out = s2attn_reference(*expected, case.group_size, doc_start, **case.pattern)[0]
    out.backward(dout)

    own = [share(x).clone().requires_grad_() for x in whole]
    sent.clear()
    result = attend(*own, case.group_size, share(places).clone(), **case.pattern)
    forward = sum(sent)
    result.backward(share(dout))
    pairs = [(result, out), *((mine.grad, all_of.grad) for mine, all_of in zip(own, expected, strict=True))]
    distance = max((mine - share(all_of)).abs().max().item() for mine, all_of in pairs)
    return {"distance": distance, "forward": forward, "backward": sum(sent) - forward}


def errors() -> dict[str, str]:
    """What each rank is told where the last one, or all, call it wrongly."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    last, places = rank == ranks - 1, torch.arange(8)[None] + 8 * rank
    x = torch.zeros(1, 8, 24, HEAD_DIM)  # heads that any number of ranks here divides
    short = slice(0, 6 if last else 8)
    calls: dict[str, tuple[Any, ...]] = {
        "length": (x[:, short], x[:, short], x[:, short], 8, places[:, short]),
        "group": (x, x, x, 10 if last else 8, places),
        "odd": (x, x, x, 7 if last else 8, places),
        "shape": (x, x, x, 8, places[:, 1:] if last else places),
        "dtype": (x, x, x.double() if last else x, 8, places),
        "before": (x, x, x, 8, places + 1),
        "order": (x, x, x, 8, torch.arange(8)[None] + 8 * (ranks - 1 - rank) if ranks > 2 or rank else places + 0),
        "gap": (x, x, x, 8, torch.where(places == 3, 7, places)),
        "negative": (x, x, x, 8, places - 1),
        "local": (x, x, x, 8, torch.arange(8)[None] + 5 * (rank > 0)),
    }
    wide = x.repeat(1, 1, 1, 33)  # more than kernels take
    calls |= {"scale": (x, x, x, 8, places), "no number": (x, x, x, 8, places), "kernel": (wide, wide, wide, 8, places)}
    scales = {"scale": 0.5 if last else 1.0, "no number": float("nan")}
    found = {}
    for attend in (halo_s2attn, ulysses_s2attn):
        for name, call in calls.items():
            try:
                attend(*call, scale=scales.get(name))
            except ValueError as error:
                found[f"{attend.__name__} {name}"] = str(error)
    halo_s2attn(x, x, x, 8, places := places.clone())
    try:
        if last:
            halo_s2attn(x, x, x, 8, places, scale=float("nan"))
    except ValueError as error:
        found["after a good call"] = str(error)
    return found


def again() -> dict[str, Any]:
    """A second layer asks nothing of the others; positions that were written to are looked at again."""
    gathered = []
    gather = dist.all_gather_object

    def counting(found: list[Any], value: Any, group: Any = None) -> None:
        gathered.append(value)
        gather(found, value, group)

    dist.all_gather_object = counting
    x, places = torch.randn(1, 8, 4, HEAD_DIM), torch.arange(8)[None] + 8 * dist.get_rank()
    first, second = (halo_s2attn(x, x, x, 16, places) for _ in range(2))
    once = len(gathered)
    places.copy_(torch.arange(8)[None])  # now each rank holds a document of its own
    third = halo_s2attn(x, x, x, 16, places)
    dist.all_gather_object = gather
    alone = s2attn_reference(x, x, x, 16)[0]
    return {
        "same": torch.equal(first, second),
        "asked": [once, len(gathered)],
        "distance": (third - alone).abs().max().item(),
    }


def bf16() -> dict[str, Any]:
    """The distance of the gradients of keys from fp64's, together and in one process, and the bytes sent."""
    torch.manual_seed(0)
    case = Case(length=32, group_size=64)
    whole, dout, places = case.tensors(dist.get_world_size())
    exact = [x.clone().requires_grad_() for x in whole]
    s2attn_reference(*exact, case.group_size)[0].backward(dout)
    half = [x.bfloat16().requires_grad_() for x in whole]
    s2attn_reference(*half, case.group_size)[0].backward(dout.bfloat16())
    own = [share(x).bfloat16().requires_grad_() for x in whole]
    sent.clear()
    halo_s2attn(*own, case.group_size, share(places).clone()).backward(share(dout).bfloat16())
    plain, ours = (
        max((share_of(x) - share(y.grad)).abs().max().item() for x, y in zip(grads, exact, strict=True))
        for grads, share_of in ((half, lambda x: share(x.grad)), (own, lambda x: x.grad))
    )
    return {"plain": plain, "ours": ours, "sent": sum(sent)}


if __name__ == "__main__":
    main()
