"""`longlora_ext.s2attn`, typed and documented, and what there is to know of where it runs."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

import longlora_ext._attend  # noqa: F401  (what the op does)
from longlora_ext._kernels import has_cuda_kernels, why_unsupported

__all__ = ["check_runs", "has_cuda_kernels", "s2attn", "why_unsupported"]


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
        q: [B, N, H, D], any N. The kernels take bfloat16 and float16, on a CPU float32 and float64 as well, with D up
            to 256. Elsewhere the same attention is computed by calls of torch's, more slowly, and a warning says so.
            Any strides; the last dimension must be contiguous. On CUDA, a tensor with rows that do not begin at
            multiples of 16 bytes is copied. All inputs must be finite: a NaN, or an infinity that makes no score minus
            infinity, shows in all rows that see it, and may show in rows that do not: kernels compute tiles of up to a
            few hundred tokens, in which what is masked weighs 0, and 0 * NaN is NaN. So a NaN in `v` may reach earlier
            rows and other documents, and in the backward pass one in any input or in the gradient may; none reaches
            other rows of the batch or other KV heads. With `sink`, one in `k` or `v` of a document's first token shows
            in all rows of the document.
        k: [B, Nk, Hkv, D], dtype and device of `q`; Hkv divides H. Nk >= N: the queries are the last of the keys'
            tokens, as with a KV cache or a prompt in parts.
        v: Like `k`. Its head dim may differ from that of `q` and `k`; it is then the output's.
        group_size: G, tokens in a group, even. With G >= N and no shifted head this is dense causal attention.
        doc_start: int32 [B, N]: for each token the index, within its row, of the first token of its document. Groups
            restart there and nothing is seen across. `longlora_ext.documents` makes it. It counts in rows of `k`, and
            is negative where a document began before these, by less than 2^29 tokens. Without it the document begins at
            the first key. Checked on a CPU; on CUDA, where to look would be to wait, a wrong one gives wrong numbers or
            NaN.
        first_shifted_head: Query heads from this one on are shifted; H // 2 by default. A rank that holds only some
            heads passes clamp(H_total // 2 - its_first_head, 0, H).
        wrap: Algorithm 1 of the paper to the letter: shifted heads are rolled by G/2, so that the last half group
            attends together with the first, which leaks the future into the first G/2 tokens. For comparison only: it
            copies, needs N divisible by G, and takes no documents.
        scale: Factor of q k^T; D ** -0.5 by default.
        deterministic: Gradients are the same bits in every run. Also follows `torch.use_deterministic_algorithms`.
        sink: A query row sees the first token of its document besides, on which pretrained models rest (the attention
            sink). It changes nothing for rows whose group begins there. With `doc_start`, the first tokens of all
            documents must be among the keys.
        window: A query row sees at most so many keys, the last ones of its group up to itself; the sink is not counted.
            With G >= N and no shifted head this is sliding-window attention.
        return_lse: Return the log-sum-exp of each row's scores as well. Attention over other keys of the same rows can
            be merged by it; see [`~longlora_ext.add_key`] and [`~longlora_ext.add_learned_sink`].

    Returns:
        [B, N, H, D], contiguous, dtype of `q`. Under autocast, inputs are cast to its dtype. With
        `return_lse` a tuple of it and the natural log-sum-exp, [B, H, N] of float32 (float64 for float64 inputs), which
        counts the sink. Both can be differentiated.

    Raises:
        RuntimeError: For an argument that does not fit, named, before any work starts. Differentiating twice, or in
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


def check_runs(device: torch.device | str, dtype: torch.dtype, head_dim: int, **pattern: Any) -> None:
    """Try `s2attn` on eight tokens, forward and backward.

    That finds what nobody knows before, such as a driver that is too old.

    Args:
        device: Where to run it.
        dtype: Of the inputs.
        head_dim: Of the inputs.
        pattern: `sink` and `window` of `s2attn`.

    Raises:
        RuntimeError: It does not run there.
    """
    try:
        q, k, v = torch.zeros(3, 1, 8, 1, head_dim, dtype=dtype, device=device, requires_grad=True).unbind()
    except AssertionError as error:  # how torch says that it was built without CUDA
        raise RuntimeError(str(error)) from error
    s2attn(q, k, v, group_size=8, **pattern).sum().backward()
