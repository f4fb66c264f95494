"""A training step without numbers: a model on torch's meta device, where tensors have shapes and no memory, runs
forward and backward, and what it would hold and compute is counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import longlora_ext._flops  # noqa: F401  (tells torch what the operator computes)

_QUESTIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.allclose.default)
_ATTENTION = torch.ops.longlora.s2attn_bwd.default


def _grouped_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """The products of a mixture's experts: each takes its own rows (or columns) of one tensor."""
    a, b = a.shape, b.shape
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


#: Operations that torch does not count.
_COUNTED_HERE = {torch.ops.aten._grouped_mm: _grouped_product}


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass takes, beside weights and gradients.

    Bytes that the forward pass leaves for the backward pass, bytes at the peak (these included), and floating-point
    operations by operator.
    """

    kept: int
    peak: int
    flops: Counter[str]


class Counts(TorchDispatchMode):
    """Counts the bytes of the tensors made under it, while they live, and the floating-point operations.

    A question about their values is answered with yes: transformers asks whether no token is padding and the row is
    one document, and `tile_loss` whether it computes the same.
    """

    def __init__(self, model: torch.nn.Module, attention_scratch: Callable[[torch.Tensor], int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops: Counter[str] = Counter()
        there = [*model.parameters(), *model.buffers()]
        there += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._storages = {tensor.untyped_storage()._cdata: 0 for tensor in there}  # a view of one is nothing new
        self._attention_scratch = attention_scratch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return True
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        packet = func.overloadpacket
        if count := flop_registry.get(packet) or _COUNTED_HERE.get(packet):
            self.flops[str(packet)] += count(*args, **(kwargs or {}), out_val=out)
        elif func.namespace not in ("aten", "prim"):
            raise ValueError(f"what the operation {packet} computes is not known here")
        if func is _ATTENTION:
            self.peak = max(self.peak, self.now + self._attention_scratch(args[1]))
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._storages.pop(key)


def cuda_scratch(q: torch.Tensor) -> int:
    """Bytes that the CUDA kernels' backward pass needs for itself: dq in fp32, and a number a row."""
    return 4 * q.numel() + cpu_scratch(q)


def cpu_scratch(q: torch.Tensor) -> int:
    """Bytes that the CPU kernels' backward pass needs for itself: a number a row."""
    return 4 * q.shape[0] * q.shape[1] * q.shape[2]


def dry_run(
    model: torch.nn.Module, batch: int, tokens: int, scratch: Callable[[torch.Tensor], int] = cuda_scratch
) -> Step:
    """
    Run one step of a causal language model that is on the meta device, in train mode.

    Args:
        model: As it is trained. Its gradients are made, if they are not there: what they take is not counted.
        batch: Sequences.
        tokens: Tokens of each.
        scratch: What the attention's backward pass allocates for itself, given `q`.
    """
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    counts = Counts(model, scratch)
    with counts:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = counts.now
        loss.backward()
        del loss
    return Step(kept, counts.peak, counts.flops)
