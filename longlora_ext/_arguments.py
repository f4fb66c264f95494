"""The op's arguments beside the tensors, and what it demands of all of them where the library does not check them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Kernels count in float.
LARGEST_SCALE = 1e30
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """As the kernels take them, in their order; `longlora_ext.s2attn` says what each is."""

    group_size: int
    first_shifted_head: int
    doc_start: Tensor | None = None
    scale: float = 1.0
    deterministic: bool = False
    sink: bool = False
    window: int | None = None


def in_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of autocast, where that is on."""
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def with_defaults(q: Tensor, first_shifted_head: int | None, scale: float | None) -> tuple[int, float]:
    """`first_shifted_head` and `scale`, filled in where they are not given."""
    first = q.shape[2] // 2 if first_shifted_head is None else first_shifted_head
    return first, 1 / math.sqrt(q.shape[3]) if scale is None else scale


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same products by a scale that is not negative.

    Kernels take the largest score of a row for the largest of its products with scale.
    """
    return (-q, -scale) if scale < 0 else (q, scale)


def check(ok: bool, message: str) -> None:
    """Raise `RuntimeError`, as the library does."""
    if not ok:
        raise RuntimeError(f"s2attn: {message}")


def check_arguments(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments) -> None:
    """Raise `RuntimeError` for what csrc/checks.h refuses, but for strides, of which torch's attention takes any."""
    group_size, first_shifted_head, doc_start, scale, _, sink, window = arguments
    batch, seqlen, heads, _ = q.shape
    for name, x in (("k", k), ("v", v)):
        check(x.dim() == 4, f"{name} must have 4 dimensions [batch, seqlen, heads, head_dim], but is {list(x.shape)}")
        check(x.dtype == q.dtype, f"{name} must have q's dtype {q.dtype}, but is {x.dtype}")
        check(x.device == q.device, f"{name} must be on q's device")
    check(k.shape == v.shape, f"k and v must have the same shape, but are {list(k.shape)} and {list(v.shape)}")
    check(
        k.shape[0] == batch and k.shape[3] == q.shape[3],
        f"k and v must have q's batch and head_dim, but q is {list(q.shape)} and k {list(k.shape)}",
    )
    check(
        k.shape[1] >= seqlen,
        "k and v must have at least q's seqlen, the queries being the last of their tokens, but q is "
        f"{list(q.shape)} and k {list(k.shape)}",
    )
    check(seqlen >= 1, f"seqlen must be at least 1, but q is {list(q.shape)}")
    check(
        heads >= 1 and k.shape[2] >= 1 and heads % k.shape[2] == 0,
        f"the heads of q must be a positive multiple of those of k and v, but are {heads} and {k.shape[2]}",
    )
    check(group_size > 0 and group_size % 2 == 0, f"group_size must be a positive even number, but is {group_size}")
    check(
        0 <= first_shifted_head <= heads,
        f"first_shifted_head must be from 0 to the number of query heads {heads}, but is {first_shifted_head}",
    )
    check(window is None or window >= 1, f"window must be at least 1 token, but is {window}")
    check(math.isfinite(scale) and scale >= 0, f"scale must be finite and not negative, but is {scale}")
    check(scale <= LARGEST_SCALE, f"scale must be at most 1e30, but is {scale}")
    if doc_start is None:
        return
    check(doc_start.dtype == torch.int32, f"doc_start must be int32, but is {doc_start.dtype}")
    check(doc_start.device == q.device, "doc_start must be on q's device")
    check(
        doc_start.shape == (batch, seqlen),
        f"doc_start must have shape [batch, seqlen] = [{batch}, {seqlen}], but is {list(doc_start.shape)}",
    )
    if doc_start.device.type == "cpu" and type(doc_start) is Tensor:  # while compiling there are no values
        _check_values(doc_start, k.shape[1] - seqlen, sink)


def _check_values(doc_start: Tensor, offset: int, sink: bool) -> None:
    """A document begins at its first token, and each of its tokens names it."""
    first = doc_start[:, 0]
    check(bool((first <= offset).all()), f"doc_start[:, 0] is {first.tolist()}, but must be at most {offset}")
    check(
        not sink or bool((first >= 0).all()),
        "sink=True needs the first token of every document among the keys, but doc_start[:, 0] is "
        f"{first.tolist()}: pass sink=False and merge that key by its lse",
    )
    token = torch.arange(offset + 1, offset + doc_start.shape[1], device=doc_start.device)
    wrong = ((doc_start[:, 1:] != token) & doc_start.diff(dim=1).ne(0)).nonzero()
    if len(wrong):
        b, n = wrong[0].tolist()
        check(
            False,
            f"doc_start[{b}, {n + 1}] is {doc_start[b, n + 1]}, but must be {n + 1 + offset} (a document begins here) "
            f"or {doc_start[b, n]}, the value before it (its document goes on)",
        )
