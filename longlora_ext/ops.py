"""`torch.ops.longlora.s2attn`: loads the library, adds what torch wants from Python, and the typed wrapper."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["check_runs", "has_cuda_kernels", "s2attn", "why_unsupported"]

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.is_file():
    raise ImportError(f"{_LIBRARY} is missing: this is a source tree that was never built; run `pip install .` in it")
try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    raise ImportError(f"{_LIBRARY} cannot be loaded: {error.__cause__ or error}") from error  # torch says no reason


def s2attn(
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
) -> Tensor:
    """Shifted short attention (S2-Attn) of LongLoRA, https://arxiv.org/abs/2309.12307.

    A query row attends causally to its group: [0, G), [G, 2G), ... in an unshifted head, [0, G/2), [G/2, 3G/2), ...
    in a shifted one. Nothing sees the future, and memory grows with seqlen, not with its square.

    Args:
        q (`Tensor`): [B, N, H, D] of bfloat16 or float16, on a CPU float32 or float64 as well; any N, D a multiple of 8
            up to 256. Any strides whose last is 1; on CUDA a tensor with rows that do not begin at multiples of 16
            bytes is copied. All inputs are finite: a NaN or infinity shows in all rows that see it, and may show in
            rows that do not: kernels compute tiles of up to a few hundred tokens, in which what is masked weighs 0, and
            0 * NaN is NaN. So a NaN in `v` may reach earlier rows and other documents, and in the backward pass one in
            any input or in the gradient may; none reaches other rows of the batch or other KV heads.
        k (`Tensor`): [B, N, Hkv, D], dtype and device of `q`; Hkv divides H.
        v (`Tensor`): like `k`.
        group_size (`int`): G, tokens in a group, even. With G >= N and no shifted head this is dense causal attention.
        doc_start (`Tensor`, *optional*): int32 [B, N]: for each token the index, within its row, of the first token of
            its document. Groups restart there and nothing is seen across. `longlora_ext.documents` makes it. Checked
            on a CPU; on CUDA, where to look would be to wait, a wrong one gives wrong numbers or NaN.
        first_shifted_head (`int`, *optional*): query heads from this one on are shifted; H // 2 by default. A rank that
            holds only some heads passes clamp(H_total // 2 - its_first_head, 0, H).
        wrap (`bool`): Algorithm 1 of the paper to the letter: shifted heads are rolled by G/2, so that the last half
            group attends together with the first, which leaks the future into the first G/2 tokens. For
            comparison only: it copies, needs N divisible by G, and takes no documents.
        scale (`float`, *optional*): factor of q k^T; D ** -0.5 by default.
        deterministic (`bool`): gradients are the same bits in every run. Also follows
            `torch.use_deterministic_algorithms`.

    Returns:
        `Tensor`: [B, N, H, D], contiguous, dtype of `q`. Under autocast, inputs are cast to its dtype.

    Raises:
        RuntimeError: for an argument that does not fit, named, before any work starts. Differentiating twice, or in
            forward mode, is refused as well.
    """
    return torch.ops.longlora.s2attn(
        q,
        k,
        v,
        group_size,
        doc_start,
        first_shifted_head=first_shifted_head,
        wrap=wrap,
        scale=scale,
        deterministic=deterministic,
    )


def has_cuda_kernels() -> bool:
    """Whether this build of the library has them."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("longlora::s2attn_fwd", "CUDA")


def why_unsupported(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, *, backward: bool = True
) -> str | None:
    """Why `s2attn` cannot run there, whatever the other shapes. The library answers, by the limits of its kernels.

    Args:
        device (`torch.device` or `str`): Where the tensors would be. "cuda" is the current GPU.
        dtype (`torch.dtype`): What they would be of.
        head_dim (`int`): Their last dimension.
        backward (`bool`): The backward pass is needed too. It takes more of a GPU than the forward.

    Returns:
        `str`: The reason, in words that go on after a colon; `None` if there is none.
    """
    return torch.ops.longlora.why_unsupported(torch.device(device), dtype, head_dim, backward=backward) or None


def check_runs(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> None:
    """
    Try `s2attn` on eight tokens, forward and backward.

    That finds what nobody knows before, such as a driver that is too old.

    Args:
        device (`torch.device` or `str`): Where.
        dtype (`torch.dtype`): In which dtype.
        head_dim (`int`): With heads of so many dimensions.

    Raises:
        RuntimeError: It does not run there.
    """
    if reason := why_unsupported(device, dtype, head_dim):
        raise RuntimeError(reason)
    q, k, v = torch.zeros(3, 1, 8, 1, head_dim, dtype=dtype, device=device, requires_grad=True).unbind()
    s2attn(q, k, v, group_size=8).sum().backward()


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"s2attn: {message}")


@torch.library.impl("longlora::s2attn", "CompositeImplicitAutograd")
def _s2attn(
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
) -> Tensor:
    _check(q.dim() == 4, f"q must have 4 dimensions [batch, seqlen, heads, head_dim], but is {list(q.shape)}")
    if q.device.type == "cuda" and not has_cuda_kernels():
        _check(False, "this build of longlora_ext has no CUDA kernels; use attn_implementation='sdpa' or the CPU")
    # register_autograd knows reverse mode alone, and would drop a tangent without a word.
    if forward_ad._current_level >= 0:
        tangents = [forward_ad.unpack_dual(x).tangent for x in (q, k, v)]
        _check(all(tangent is None for tangent in tangents), "cannot be differentiated in forward mode")
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    if first_shifted_head is None:
        first_shifted_head = q.shape[2] // 2
    _check(q.shape[3] >= 8, f"head_dim must be a multiple of 8 from 8 to 256, but is {q.shape[3]}")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    if scale < 0:  # kernels take the largest score of a row for the largest of its products with scale
        q, scale = -q, -scale
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if wrap:
        return _wrapped(q, k, v, group_size, doc_start, first_shifted_head, scale, deterministic)
    return torch.ops.longlora.s2attn_fwd(q, k, v, group_size, first_shifted_head, doc_start, scale, deterministic)[0]


def _wrapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    doc_start: Tensor | None,
    first_shifted_head: int,
    scale: float,
    deterministic: bool,
) -> Tensor:
    seqlen, heads = q.shape[1], q.shape[2]
    _check(doc_start is None, "wrap=True takes no doc_start: rolling mixes documents")
    _check(
        group_size > 0 and group_size % 2 == 0 and seqlen % group_size == 0,
        f"wrap=True needs a seqlen divisible by an even group_size, but they are {seqlen} and {group_size}",
    )
    _check(
        0 <= first_shifted_head <= heads,
        f"first_shifted_head must be from 0 to the number of query heads {heads}, but is {first_shifted_head}",
    )
    _check(
        k.dim() == 4 and v.dim() == 4 and k.shape[2] >= 1 and heads % k.shape[2] == 0,
        f"k and v must be [batch, seqlen, kv_heads, head_dim] with kv_heads dividing {heads}, but k is {list(k.shape)}",
    )
    _check(k.shape == v.shape, f"k and v must have the same shape, but are {list(k.shape)} and {list(v.shape)}")
    # One KV head for each query head: with GQA the boundary may fall between two heads of one KV head.
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))

    def roll_shifted(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, :, :first_shifted_head], x[:, :, first_shifted_head:].roll(by, dims=1)], dim=2)

    q, k, v = (roll_shifted(x, -(group_size // 2)) for x in (q, k, v))
    out = torch.ops.longlora.s2attn_fwd(q, k, v, group_size, heads, None, scale, deterministic)[0]
    return roll_shifted(out, group_size // 2)


@torch.library.register_fake("longlora::s2attn_fwd")
def _fake_fwd(q, k, v, group_size, first_shifted_head, doc_start, scale, deterministic):
    for name, x in (("k", k), ("v", v), ("doc_start", doc_start)):
        _check(x is None or x.device == q.device, f"{name} must be on q's device")
    batch, seqlen, heads, _ = q.shape
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen), dtype=stats)


@torch.library.register_fake("longlora::s2attn_bwd")
def _fake_bwd(dout, q, k, v, out, lse, group_size, first_shifted_head, doc_start, scale, deterministic):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.group_size, ctx.first_shifted_head, doc_start, ctx.scale, ctx.deterministic = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, doc_start, out, lse)


def _backward(ctx, dout, _dlse):
    q, k, v, doc_start, out, lse = ctx.saved_tensors
    dq, dk, dv = torch.ops.longlora.s2attn_bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        ctx.group_size,
        ctx.first_shifted_head,
        doc_start,
        ctx.scale,
        ctx.deterministic,
    )
    return dq, dk, dv, None, None, None, None, None


def _double_backward(ctx, *grads):
    raise NotImplementedError("s2attn cannot be differentiated twice")


torch.library.register_autograd("longlora::s2attn_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("longlora::s2attn_bwd", _double_backward)
