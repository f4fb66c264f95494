"""`torch.ops.longlora.s2attn`: loads the library, adds what torch wants from Python, and the typed wrapper."""

import math
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longlora_ext.sinks import add_key

__all__ = ["check_runs", "has_cuda_kernels", "s2attn", "why_unsupported"]

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.is_file():
    raise ImportError(f"{_LIBRARY} is missing: this is a source tree that was never built; run `pip install .` in it")
try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    raise ImportError(f"{_LIBRARY} cannot be loaded: {error.__cause__ or error}") from error  # torch says no reason


@overload
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
    sink: bool = False,
    window: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
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
    sink: bool = False,
    window: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    sink: bool = False,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        k (`Tensor`): [B, Nk, Hkv, D], dtype and device of `q`; Hkv divides H. Nk >= N: the queries are the last of the
            keys' tokens, as with a KV cache or a prompt in parts.
        v (`Tensor`): like `k`.
        group_size (`int`): G, tokens in a group, even. With G >= N and no shifted head this is dense causal attention.
        doc_start (`Tensor`, *optional*): int32 [B, N]: for each token the index, within its row, of the first token of
            its document. Groups restart there and nothing is seen across. `longlora_ext.documents` makes it. It counts
            in rows of `k`, and is negative where a document began before these. Without it the document begins at the
            first key. Checked on a CPU; on CUDA, where to look would be to wait, a wrong one gives wrong numbers or
            NaN.
        first_shifted_head (`int`, *optional*): query heads from this one on are shifted; H // 2 by default. A rank that
            holds only some heads passes clamp(H_total // 2 - its_first_head, 0, H).
        wrap (`bool`): Algorithm 1 of the paper to the letter: shifted heads are rolled by G/2, so that the last half
            group attends together with the first, which leaks the future into the first G/2 tokens. For
            comparison only: it copies, needs N divisible by G, and takes no documents.
        scale (`float`, *optional*): factor of q k^T; D ** -0.5 by default.
        deterministic (`bool`): gradients are the same bits in every run. Also follows
            `torch.use_deterministic_algorithms`.
        sink (`bool`): a query row sees the first token of its document besides, on which pretrained models rest (the
            attention sink). It changes nothing for rows whose group begins there. With `doc_start`, the first tokens
            of all documents must be among the keys.
        window (`int`, *optional*): a query row sees at most so many keys, the last ones of its group up to itself; the
            sink is not counted. With G >= N and no shifted head this is sliding-window attention.
        return_lse (`bool`): return the log-sum-exp of each row's scores as well. Attention over other keys of the same
            rows can be merged by it; see [`~longlora_ext.add_key`] and [`~longlora_ext.add_learned_sink`].

    Returns:
        `Tensor`: [B, N, H, D], contiguous, dtype of `q`. Under autocast, inputs are cast to its dtype. With
        `return_lse` a tuple of it and the natural log-sum-exp, [B, H, N] of float32 (float64 for float64 inputs), which
        counts the sink. Both can be differentiated.

    Raises:
        RuntimeError: for an argument that does not fit, named, before any work starts. Differentiating twice, or in
            forward mode, is refused as well.
    """
    op = torch.ops.longlora.s2attn_with_lse if return_lse else torch.ops.longlora.s2attn
    return op(
        q,
        k,
        v,
        group_size,
        doc_start,
        first_shifted_head=first_shifted_head,
        wrap=wrap,
        scale=scale,
        deterministic=deterministic,
        sink=sink,
        window=window,
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
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):  # the stable ABI does not know all of them by name
        return (
            f"there are kernels for the CPU and CUDA alone, and none for {device.type}; use attn_implementation='sdpa'"
        )
    return torch.ops.longlora.why_unsupported(device, dtype, head_dim, backward=backward) or None


def check_runs(device: torch.device | str, dtype: torch.dtype, head_dim: int, **pattern: Any) -> None:
    """
    Try `s2attn` on eight tokens, forward and backward.

    That finds what nobody knows before, such as a driver that is too old.

    Args:
        device (`torch.device` or `str`): Where.
        dtype (`torch.dtype`): In which dtype.
        head_dim (`int`): With heads of so many dimensions.
        pattern: `sink` and `window` of `s2attn`.

    Raises:
        RuntimeError: It does not run there.
    """
    if reason := why_unsupported(device, dtype, head_dim):
        raise RuntimeError(reason)
    q, k, v = torch.zeros(3, 1, 8, 1, head_dim, dtype=dtype, device=device, requires_grad=True).unbind()
    s2attn(q, k, v, group_size=8, **pattern).sum().backward()


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"s2attn: {message}")


@torch.library.impl("longlora::s2attn", "CompositeImplicitAutograd")
def _without_lse(*args: Any, **kwargs: Any) -> Tensor:
    return _attend(*args, **kwargs)[0]


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
) -> tuple[Tensor, Tensor]:
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
        _check(doc_start is None, "wrap=True takes no doc_start: rolling mixes documents")
        return _wrapped(q, k, v, group_size, first_shifted_head, scale, deterministic, sink, window)
    return torch.ops.longlora.s2attn_fwd(
        q, k, v, group_size, first_shifted_head, doc_start, scale, deterministic, sink=sink, window=window
    )


torch.library.impl("longlora::s2attn_with_lse", "CompositeImplicitAutograd", _attend)


def _wrapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    first_shifted_head: int,
    scale: float,
    deterministic: bool,
    sink: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: roll the shifted heads, attend, roll back."""
    seqlen, heads = q.shape[1], q.shape[2]
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
    _check(k.shape[1] == seqlen, f"wrap=True needs as many keys as queries, but they are {k.shape[1]} and {seqlen}")
    # One KV head for each query head: with GQA the boundary may fall between two heads of one KV head.
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))

    def roll_shifted(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, :, :first_shifted_head], x[:, :, first_shifted_head:].roll(by, dims=1)], dim=2)

    half = group_size // 2
    rolled = (roll_shifted(x, -half) for x in (q, k, v))
    out, lse = torch.ops.longlora.s2attn_fwd(*rolled, group_size, heads, None, scale, deterministic, window=window)
    out, lse = roll_shifted(out, half), roll_shifted(lse.transpose(1, 2), half).transpose(1, 2)
    if not sink:
        return out, lse
    # The first token is somewhere else after rolling, so that the kernels cannot be asked for it.
    head, row = torch.arange(heads, device=q.device)[:, None], torch.arange(seqlen, device=q.device)
    seen_by = torch.where(head < first_shifted_head, group_size, half).clamp(max=seqlen if window is None else window)
    return add_key(out, lse, q, k[:, :1], v[:, :1], scale, where=(row >= seen_by)[None])


@torch.library.register_fake("longlora::s2attn_fwd")
def _fake_fwd(q, k, v, group_size, first_shifted_head, doc_start, scale, deterministic, *, sink=False, window=None):
    for name, x in (("k", k), ("v", v), ("doc_start", doc_start)):
        _check(x is None or x.device == q.device, f"{name} must be on q's device")
    batch, seqlen, heads, _ = q.shape
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen), dtype=stats)


@torch.library.register_fake("longlora::s2attn_bwd")
def _fake_bwd(dout, q, k, v, *args, **kwargs):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, ctx.group_size, ctx.first_shifted_head, doc_start, ctx.scale, ctx.deterministic = inputs
    ctx.pattern = keyword_only_inputs
    ctx.set_materialize_grads(False)  # lse has seldom a gradient
    ctx.save_for_backward(q, k, v, doc_start, *output)


def _backward(ctx, dout, dlse):
    q, k, v, doc_start, out, lse = ctx.saved_tensors
    grads = (None, None, None)
    if dout is not None or dlse is not None:
        grads = torch.ops.longlora.s2attn_bwd(
            torch.zeros_like(out) if dout is None else dout,
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
            dlse,
            **ctx.pattern,
        )
    return (*grads, None, None, None, None, None)


def _double_backward(ctx, *grads):
    raise NotImplementedError("s2attn cannot be differentiated twice")


torch.library.register_autograd("longlora::s2attn_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("longlora::s2attn_bwd", _double_backward)
