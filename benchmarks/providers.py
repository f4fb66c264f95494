"""The ways to compute attention that `attention.py` compares, each a function of q, k and v [B, N, H, D]."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlora_ext import s2attn
from longlora_ext._arguments import Arguments
from longlora_ext._flops import attended_pairs
from longlora_ext._strided import strided as by_views

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotHere(Exception):
    """Why a provider cannot run at a point."""


@dataclass(frozen=True)
class Point:
    """One problem to time."""

    device: str
    dtype: str
    head_dim: int
    heads: int
    kv_heads: int
    seqlen: int
    batch: int
    group_size: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Random q, k, v, of which gradients are wanted, and the gradient of the output."""

        def random(heads: int) -> Tensor:
            shape = (self.batch, self.seqlen, heads, self.head_dim)
            return torch.randn(shape, device=self.device, dtype=getattr(torch, self.dtype))

        inputs = (random(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        return (*inputs, random(self.heads))


@dataclass(frozen=True)
class Pattern:
    """Which keys a row sees, in the operator's own terms: what a provider is checked against."""

    group_size: int
    first_shifted_head: int
    wraps: bool = False  # the last half group attends together with the first, as rolling has it
    sink: bool = False  # rows see the first token as well
    window: int | None = None  # and so many tokens of their group at most

    def pairs(self, point: Point) -> int:
        """(query, key) pairs that are attended."""
        first_shifted = point.heads if self.wraps else self.first_shifted_head
        seen = self.window, self.sink
        return point.batch * attended_pairs(point.seqlen, self.group_size, point.heads, first_shifted, *seen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By our kernels, without the wrap-around."""
        first, sink, window = self.first_shifted_head, self.sink, self.window
        return s2attn(q, k, v, self.group_size, first_shifted_head=first, sink=sink, window=window)

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """As FlexAttention is told a mask."""
        shift = torch.where(head >= self.first_shifted_head, self.group_size // 2, 0)
        seen = (query >= key) & ((query + shift) // self.group_size == (key + shift) // self.group_size)
        if self.window is not None:
            seen = seen & (key > query - self.window)
        return seen | (key == 0) if self.sink else seen


def dense_pattern(point: Point) -> Pattern:
    return Pattern(point.seqlen + point.seqlen % 2, point.heads)


def s2_pattern(point: Point) -> Pattern:
    return Pattern(point.group_size, point.heads // 2)


def sink_pattern(point: Point) -> Pattern:
    return replace(s2_pattern(point), sink=True)


def window_pattern(point: Point) -> Pattern:
    """A sliding window of as many keys as a row of a group sees on average."""
    return replace(dense_pattern(point), window=point.group_size // 2)


def window_sink_pattern(point: Point) -> Pattern:
    return replace(window_pattern(point), sink=True)


def rolled_pattern(point: Point) -> Pattern:
    return replace(s2_pattern(point), wraps=True)


def groups_pattern(point: Point) -> Pattern:
    return Pattern(point.group_size, point.heads)


def ours(point: Point, pattern: Callable[[Point], Pattern]) -> Attention:
    return pattern(point).attend


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    """torch's causal attention of [B, N, H, D]; without a backend the one that torch chooses."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def dense(point: Point, backend: SDPBackend | None) -> Attention:
    return partial(sdpa, backend=backend)


def needs_whole_groups(point: Point) -> None:
    if point.seqlen % point.group_size:
        raise NotHere(f"folding needs a length divisible by the group size, not {point.seqlen} by {point.group_size}")


def in_groups(point: Point, backend: SDPBackend | None) -> Attention:
    """Groups folded into the batch, which costs nothing, and no shift: what attention alone costs of S2-Attn."""
    needs_whole_groups(point)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded_q, folded_k, folded_v = (x.reshape(-1, point.group_size, *x.shape[2:]) for x in (q, k, v))
        return sdpa(folded_q, folded_k, folded_v, backend).reshape(q.shape)

    return attend


def rolled(point: Point, backend: SDPBackend | None) -> Attention:
    """The paper's Algorithm 1: roll half of the heads by half a group, attend in groups, roll back."""
    if point.kv_heads % 2:
        raise NotHere("rolling half of the KV heads needs an even number of them")
    attend = in_groups(point, backend)

    def roll_half(x: Tensor, by: int) -> Tensor:
        still, moved = x.chunk(2, dim=2)
        return torch.cat([still, moved.roll(by, dims=1)], dim=2)

    def attend_rolled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(roll_half(x, -(point.group_size // 2)) for x in (q, k, v)))
        return roll_half(out, point.group_size // 2)

    return attend_rolled


def strided(point: Point, backend: SDPBackend | None) -> Attention:
    """What the package does where it has no kernel: views of the groups, shifted or not, each a call of SDPA."""
    pattern = s2_pattern(point)
    arguments = Arguments(pattern.group_size, pattern.first_shifted_head, scale=point.head_dim**-0.5)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            return by_views(q, k, v, arguments)[0]

    return attend


def original(point: Point) -> Attention:
    """How LongLoRA's own code does it: KV heads repeated, the halves of the heads as two batches, one varlen call whose
    boundaries carry the shift. Left out, in its favour, is the gather and scatter of its unpadding."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise NotHere(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    if point.heads % 2:
        raise NotHere("halving the heads needs an even number of them")
    batch, seqlen, group = point.batch, point.seqlen, point.group_size
    rows = torch.arange(2 * batch)[:, None] * seqlen
    starts = [torch.tensor([0, *range(first, seqlen, group)]) for first in (group, group // 2)]
    # Row b of the packed batch is an unshifted half for even b and a shifted one for odd b.
    cuts = torch.cat([rows[b] + starts[b % 2] for b in range(2 * batch)] + [torch.tensor([2 * batch * seqlen])])
    boundaries = cuts.to(point.device, torch.int32)
    repeats, longest = point.heads // point.kv_heads, min(group, seqlen)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k, v))
        qkv = torch.stack([q, k, v], dim=2).unflatten(3, (2, -1))  # B, N, 3, 2, H/2, D
        packed = qkv.permute(0, 3, 1, 2, 4, 5).reshape(2 * batch * seqlen, 3, point.heads // 2, point.head_dim)
        q_half, k_half, v_half = packed.unbind(1)
        out = varlen_attn(q_half, k_half, v_half, boundaries, boundaries, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out.view(batch, 2, seqlen, *out.shape[1:]).transpose(1, 2).reshape(q.shape)

    return attend


def flex(point: Point, pattern: Callable[[Point], Pattern]) -> Attention:
    """FlexAttention with the pattern as its block mask, compiled for this very shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if point.device == "cpu":
        raise NotHere("it has no backward on a CPU")
    torch.compiler.reset()  # a point's kernels serve no other, and too many shapes of one function would not compile
    make_mask = torch.compile(create_block_mask, dynamic=False)  # eager, it would hold [H, N, N] booleans
    mask = make_mask(pattern(point).visible, None, point.heads, point.seqlen, point.seqlen, point.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = point.heads != point.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return attend


@dataclass(frozen=True)
class Provider:
    label: str
    make: Callable[[Point], Attention]
    pattern: Callable[[Point], Pattern]
    devices: tuple[str, ...] = ("cuda",)


BOTH = ("cpu", "cuda")
#: What ours and FlexAttention are both asked for: the end of their names, in words, what a row sees.
PATTERNS = (
    ("", "", s2_pattern),
    ("_sink", ", with the sink", sink_pattern),
    ("_window", ", sliding window", window_pattern),
    ("_window_sink", ", window and sink", window_sink_pattern),
)
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION

PROVIDERS = {
    **{f"ours{end}": Provider(f"ours{said}", partial(ours, pattern=p), p, BOTH) for end, said, p in PATTERNS},
    "dense": Provider("dense SDPA", partial(dense, backend=None), dense_pattern, ("cpu",)),
    "dense_flash": Provider("dense, flash", partial(dense, backend=FLASH), dense_pattern),
    "dense_cudnn": Provider("dense, cuDNN", partial(dense, backend=CUDNN), dense_pattern),
    "rolled": Provider("roll + SDPA", partial(rolled, backend=None), rolled_pattern, ("cpu",)),
    "rolled_flash": Provider("roll + flash", partial(rolled, backend=FLASH), rolled_pattern),
    "rolled_cudnn": Provider("roll + cuDNN", partial(rolled, backend=CUDNN), rolled_pattern),
    "strided": Provider("views + SDPA", partial(strided, backend=None), s2_pattern, ("cpu",)),
    "strided_flash": Provider("views + flash", partial(strided, backend=FLASH), s2_pattern),
    "strided_cudnn": Provider("views + cuDNN", partial(strided, backend=CUDNN), s2_pattern),
    "original": Provider("original (varlen flash)", original, s2_pattern),
    **{
        f"flex{name}": Provider(f"FlexAttention{said}", partial(flex, pattern=p), p, BOTH) for name, said, p in PATTERNS
    },
    "groups": Provider("groups alone, SDPA", partial(in_groups, backend=None), groups_pattern, ("cpu",)),
    "groups_flash": Provider("groups alone, flash", partial(in_groups, backend=FLASH), groups_pattern),
}
