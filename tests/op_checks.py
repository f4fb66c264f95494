"""What the op's tests share: random problems, and the error bound against the reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longlora_ext import s2attn
from longlora_ext.reference import s2attn_reference


@dataclass
class Problem:
    batch: int = 1
    seqlen: int = 64
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    group_size: int = 16
    first_shifted_head: int | None = None
    documents: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        def random(heads: int) -> Tensor:
            return torch.randn(self.batch, self.seqlen, heads, self.head_dim, dtype=torch.float64).to(self.dtype)

        return random(self.heads), random(self.kv_heads), random(self.kv_heads)

    def doc_start(self) -> Tensor | None:
        """A new document with probability 1/8 at each token, each row cut differently."""
        if not self.documents:
            return None
        begins = torch.rand(self.batch, self.seqlen) < 1 / 8
        begins[:, 0] = True
        index = torch.arange(self.seqlen, dtype=torch.int32)
        return torch.where(begins, index, 0).cummax(dim=1).values.to(torch.int32)

    def kwargs(self) -> dict[str, float | int | None]:
        return {"first_shifted_head": self.first_shifted_head, "scale": self.scale}


def outputs_and_grads(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of `function(q, k, v)`."""
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    out = function(*inputs)
    out.backward(dout)
    return (out.detach(), *(x.grad for x in inputs))


def assert_close_to_reference(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result") -> None:
    """Our error against fp64 is at most twice that of the plain computation in the same dtype, plus 2 ulp.

    ulp at the result's largest value, but at least at 1, the magnitude of the inputs: a gradient that cancels to nearly
    nothing carries the rounding of what cancelled. In fp64 there is nothing more exact to compare with: 1e-12.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    magnitude = max(exact.abs().max().item(), 1)
    error = (actual.double() - exact).abs().max().item()
    if actual.dtype == torch.float64:
        bound = 1e-12 * magnitude
    else:
        plain_error = (plain.double() - exact).abs().max().item()
        bound = 2 * plain_error + 2 * torch.finfo(actual.dtype).eps * magnitude
    assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


def check_against_reference(problem: Problem) -> None:
    """Forward and backward of the op on a random instance of `problem`."""
    q, k, v = problem.tensors()
    dout = torch.randn(q.shape, dtype=torch.float64).to(q.dtype)
    doc_start = problem.doc_start()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, problem.group_size, doc_start, **problem.kwargs())

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn_reference(q, k, v, problem.group_size, doc_start, **problem.kwargs())[0]

    actual = outputs_and_grads(ours, q, k, v, dout)
    plain = outputs_and_grads(reference, q, k, v, dout)
    exact = outputs_and_grads(reference, q.double(), k.double(), v.double(), dout.double())
    for name, *tensors in zip(("out", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert_close_to_reference(*tensors, name=f"{name} of {problem}")
