"""What `torch.ops.longlora.s2attn` does: defaults, autocast, padding, and whose attention runs.

The op itself falls back to torch's attention where no kernel runs, so that compiled and exported code and Ulysses do
too. `halo_s2attn` calls `s2attn_fwd` and `s2attn_bwd`, which refuse what they lack. A fallback registered for these
(`CompositeExplicitAutograd`) would not help: for a dtype or head dim that the kernel of a CPU or a GPU lacks, the
dispatcher picks that kernel still.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longlora_ext._arguments import (
    DTYPES,
    Arguments,
    check,
    check_arguments,
    in_autocast,
    with_defaults,
    with_positive_scale,
)
from longlora_ext._kernels import padded, why_unsupported, with_head_dim
from longlora_ext._strided import strided
from longlora_ext.sinks import add_key

_why_unsupported = functools.cache(why_unsupported)


@functools.cache
def _say_once(why: str) -> None:
    warnings.warn(
        "s2attn runs by torch's scaled_dot_product_attention, which computes the same but more slowly than a kernel of "
        f"longlora_ext: {why}",
        UserWarning,
        stacklevel=2,
    )


@torch.library.impl("longlora::s2attn", "CompositeImplicitAutograd")
def _without_lse(*args: Any, **kwargs: Any) -> Tensor:
    return _attend(*args, **kwargs, with_lse=False)[0]


@torch.library.impl("longlora::s2attn_with_lse", "CompositeImplicitAutograd")
def _with_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _attend(*args, **kwargs, with_lse=True)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    doc_start: Tensor | None = None,
    *,
    first_shifted_head: int | None = None,
    wrap: bool = False,
    scale: float | None = None,
    deterministic: bool = False,
    sink: bool = False,
    window: int | None = None,
    with_lse: bool,
) -> tuple[Tensor, Any]:
    check(q.dim() == 4, f"q must have 4 dimensions [batch, seqlen, heads, head_dim], but is {list(q.shape)}")
    # Kernels know reverse mode alone, and would drop a tangent without a word.
    if forward_ad._current_level >= 0:
        tangents = [forward_ad.unpack_dual(x).tangent for x in (q, k, v)]
        check(all(tangent is None for tangent in tangents), "cannot be differentiated in forward mode")
    q, k, v = in_autocast(q, k, v)
    check(q.shape[3] >= 1, f"head_dim must be at least 1, but is {q.shape[3]}")
    first_shifted_head, scale = with_defaults(q, first_shifted_head, scale)
    q, scale = with_positive_scale(q, scale)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    head_dim = v.shape[-1]
    q, k, v = _with_one_head_dim(q, k, v)
    arguments = Arguments(group_size, first_shifted_head, doc_start, scale, deterministic, sink, window)
    out, lse = (_wrapped if wrap else _run)(q, k, v, arguments, with_lse)
    return out if out.shape[-1] == head_dim else out[..., :head_dim].contiguous(), lse


def _with_one_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same head dim in all three, one that kernels take."""
    if q.shape[-1] != k.shape[-1] or k.dim() != 4 or v.dim() != 4:  # an error
        return q, k, v
    return with_head_dim(padded(max(q.shape[-1], v.shape[-1])), q, k, v)


def _run(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, with_lse: bool) -> tuple[Tensor, Any]:
    """By the kernels or by torch's attention."""
    why = None if q.is_meta or q.dtype not in DTYPES else _why_no_kernel(q, k, v)
    if why is not None:
        _say_once(why)
        check_arguments(q, k, v, arguments)
        return strided(q, k, v, arguments, with_lse)
    *positional, sink, window = arguments
    return torch.ops.longlora.s2attn_fwd(q, k, v, *positional, sink=sink, window=window)


def _why_no_kernel(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _why_unsupported(q.device, q.dtype, int(q.shape[-1]), backward=backward)  # not symbolic


def _wrapped(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, with_lse: bool) -> tuple[Tensor, Any]:
    """Algorithm 1: roll the shifted heads, attend, roll back."""
    group_size, first_shifted_head, doc_start, scale, _, sink, window = arguments
    check(doc_start is None, "wrap=True takes no doc_start: rolling mixes documents")
    seqlen, heads = q.shape[1], q.shape[2]
    check(
        group_size > 0 and group_size % 2 == 0 and seqlen % group_size == 0,
        f"wrap=True needs a seqlen divisible by an even group_size, but they are {seqlen} and {group_size}",
    )
    check_arguments(q, k, v, arguments)
    check(k.shape[1] == seqlen, f"wrap=True needs as many keys as queries, but they are {k.shape[1]} and {seqlen}")
    # One KV head for each query head: with GQA the boundary may fall between two heads of one KV head.
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))

    def roll_shifted(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, :, :first_shifted_head], x[:, :, first_shifted_head:].roll(by, dims=1)], dim=2)

    half = group_size // 2
    q_, k_, v_ = (roll_shifted(x, -half) for x in (q, k, v))
    groups_alone = arguments._replace(first_shifted_head=heads, sink=False)
    out, lse = _run(q_, k_, v_, groups_alone, with_lse or sink)
    out = roll_shifted(out, half)
    if lse is not None:
        lse = roll_shifted(lse.transpose(1, 2), half).transpose(1, 2)
    if not sink:
        return out, lse
    # The first token is somewhere else after rolling, so that the kernels cannot be asked for it.
    head, row = torch.arange(heads, device=q.device)[:, None], torch.arange(seqlen, device=q.device)
    seen_by = torch.where(head < first_shifted_head, group_size, half).clamp(max=seqlen if window is None else window)
    return add_key(out, lse, q, k[:, :1], v[:, :1], scale, where=(row >= seen_by)[None])
