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
from torch.utils._pytree import tree_leaves, tree_map_only
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


@dataclass(frozen=True)
class _Like:
    """What a tensor is, but for its numbers and where they are."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> _Like:
        return _Like(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _likeness(given: Any) -> Any:
    """Of arguments what the result's likeness depends on."""
    if isinstance(given, torch.Tensor):
        return _Like.of(given)
    if isinstance(given, list | tuple):
        return tuple(map(_likeness, given))
    return type(given), given  # 1 is not True


def _storages(tree: Any) -> dict[int, int]:
    """Bytes by storage."""
    storages = (tensor.untyped_storage() for tensor in tree_leaves(tree) if isinstance(tensor, torch.Tensor))
    return {storage._cdata: storage.nbytes() for storage in storages}


def _is_new(out: Any, given: Any) -> bool:
    """Whether this is tensors without numbers, and their memory neither that of what was given nor each other's."""
    made = [
        _Like.of(tensor).make() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor) and tensor.is_meta
    ]
    mine, theirs = _storages(out), _storages(given)
    return bool(made) and list(_storages(made).values()) == list(mine.values()) and not mine.keys() & theirs.keys()


class Counts(TorchDispatchMode):
    """Counts the bytes of the tensors made under it, while they live, and the floating-point operations.

    A question about their values is answered with yes: transformers asks whether no token is padding and the row is
    one document, and `tile_loss` whether it computes the same.

    What torch makes of an operation it is asked once for each likeness of tensors: most of a plan of millions of tokens
    are the tiles of the loss, which are alike.
    """

    def __init__(self, model: torch.nn.Module, attention_scratch: Callable[[torch.Tensor], int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops: Counter[str] = Counter()
        there = [*model.parameters(), *model.buffers()]
        there += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._storages = {tensor.untyped_storage()._cdata: 0 for tensor in there}  # a view of one is nothing new
        self._attention_scratch = attention_scratch
        self._known: dict[Any, Any] = {}  # what an operation makes, by what it is given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return True
        out = self._run(func, args, kwargs or {})
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

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        key = (func, _likeness(args), _likeness(tuple(kwargs.items())))
        if key in self._known:
            return tree_map_only(_Like, _Like.make, self._known[key])
        out = func(*args, **kwargs)
        if not func._schema.is_mutable and _is_new(out, (args, kwargs)):
            self._known[key] = tree_map_only(torch.Tensor, _Like.of, out)
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
