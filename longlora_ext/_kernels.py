"""The library and its kernels: where they run; `s2attn_fwd` and `s2attn_bwd` with fake kernels and autograd."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora_ext._arguments import check

_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.is_file():
    raise ImportError(f"{_LIBRARY} is missing: this is a source tree that was never built; run `pip install .` in it")
try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    raise ImportError(f"{_LIBRARY} cannot be loaded: {error.__cause__ or error}") from error  # torch says no reason


def has_cuda_kernels() -> bool:
    """Whether this build of the library has them."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("longlora::s2attn_fwd", "CUDA")


def padded(head_dim: int) -> int:
    """The head dim that kernels are given: a multiple of 8."""
    return -(-head_dim // 8) * 8


def why_unsupported(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, *, backward: bool = True
) -> str | None:
    """Why no kernel of this package runs there, whatever the other shapes. The library answers, by its kernels' limits.

    There `s2attn` is computed by calls of `torch.nn.functional.scaled_dot_product_attention`, which is slower.

    Args:
        device: Where the tensors would be. "cuda" is the current GPU.
        dtype: What they would be of.
        head_dim: Their last dimension. `s2attn` pads it to a multiple of 8.
        backward: The backward pass is needed too. It takes more of a GPU than the forward.

    Returns:
        The reason, in words that go on after a colon; `None` if there is none.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):  # the stable ABI does not know all of them by name
        return f"there are kernels for the CPU and CUDA alone, and none for {device.type}"
    why = torch.ops.longlora.why_unsupported(device, dtype, padded(head_dim), backward=backward)
    return why.partition(";")[0] or None  # what to use instead is said of the kernels alone


@torch.library.register_fake("longlora::s2attn_fwd")
def _fake_fwd(q, k, v, group_size, first_shifted_head, doc_start, scale, deterministic, *, sink=False, window=None):
    for name, x in (("k", k), ("v", v), ("doc_start", doc_start)):
        check(x is None or x.device == q.device, f"{name} must be on q's device")
    batch, seqlen, heads, _ = q.shape
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, seqlen), dtype=stats)


@torch.library.register_fake("longlora::s2attn_bwd")
def _fake_bwd(dout, q, k, v, *args, **kwargs):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.group_size, ctx.first_shifted_head, doc_start, ctx.scale, ctx.deterministic = inputs
    ctx.pattern = keyword_only_inputs
    ctx.set_materialize_grads(False)  # lse has seldom a gradient
    ctx.save_for_backward(q, k, v, doc_start, *output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
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


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("s2attn cannot be differentiated twice")


torch.library.register_autograd("longlora::s2attn_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("longlora::s2attn_bwd", _double_backward)


def with_head_dim(head_dim: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind the head dim, which change no product, up to `head_dim` in all three."""
    if q.shape[-1] == k.shape[-1] == v.shape[-1] == head_dim:
        return q, k, v
    # A dimension of size 1 may have any stride, of which F.pad would make another order of dimensions.
    q, k, v = (F.pad(x, (0, head_dim - x.shape[-1])).contiguous() for x in (q, k, v))
    return q, k, v
