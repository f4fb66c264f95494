"""What the op's tests share: random problems, and the error bound against the reference."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longlora_ext import s2attn
from longlora_ext.reference import s2attn_reference

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES, torch.float64]  # conftest.py leaves those of 16 bits on CUDA


def default_dtype() -> torch.dtype:
    """What a test uses that is not about dtypes: the plainest that the test's device has kernels for."""
    return torch.bfloat16 if torch.get_default_device().type == "cuda" else torch.float32


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
    sink: bool = False
    window: int | None = None
    seqlen_k: int | None = None  # the queries are the last of so many tokens; absent, all
    dtype: torch.dtype = field(default_factory=default_dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        def random(heads: int) -> Tensor:
            return torch.randn(self.batch, self.tokens, heads, self.head_dim, dtype=torch.float64).to(self.dtype)

        q, k, v = random(self.heads), random(self.kv_heads), random(self.kv_heads)
        return q[:, self.tokens - self.seqlen :], k, v

    @property
    def tokens(self) -> int:
        return self.seqlen if self.seqlen_k is None else self.seqlen_k

    def doc_start(self) -> Tensor | None:
        """A new document with probability 1/8 at each token, each row cut differently."""
        if not self.documents:
            return None
        begins = torch.rand(self.batch, self.tokens) < 1 / 8
        begins[:, 0] = True
        index = torch.arange(self.tokens, dtype=torch.int32)
        documents = torch.where(begins, index, 0).cummax(dim=1).values.to(torch.int32)
        return documents[:, self.tokens - self.seqlen :]

    def kwargs(self) -> dict[str, float | int | None]:
        """Those of the op. What only some kernels take is left out where it is not asked for."""
        asked = {name: getattr(self, name) for name in ("sink", "window") if getattr(self, name)}
        return {"first_shifted_head": self.first_shifted_head, "scale": self.scale, **asked}


def outputs_and_grads(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of `function(q, k, v)`."""
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    out = function(*inputs)
    out.backward(dout)
    return (out.detach(), *(x.grad for x in inputs))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Two ways of ours to one result: rounding in another order, 8 ulp at the largest value."""
    assert actual.dtype == expected.dtype
    bound = 8 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def assert_close_to_reference(
    actual: Tensor, plain: Tensor, exact: Tensor, name: str = "result", inherited: float = 0.0
) -> None:
    """Our error against fp64 is at most twice that of the plain computation in the same dtype, plus 2 ulp.

    ulp at the result's largest value; `inherited` is an error that any such computation passes on, which the plain one
    may escape by luck. In fp64 there is nothing more exact to compare with: 1e-12.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    magnitude = exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    bound = 2 * plain_error + 2 * torch.finfo(actual.dtype).eps * magnitude
    if actual.dtype == torch.float64:
        bound = 1e-12 * magnitude
    assert error <= bound + inherited, f"{name}: error {error:.3g} exceeds {bound + inherited:.3g}"


def assert_outputs_and_grads_close(
    ours: Callable, reference: Callable, q: Tensor, k: Tensor, v: Tensor, scale: float, name: str = ""
) -> None:
    """Forward and backward of `ours` against `reference`, both functions of q, k and v."""
    dout = torch.randn(q.shape, dtype=torch.float64).to(q.dtype)
    actual = outputs_and_grads(ours, q, k, v, dout)
    plain = outputs_and_grads(reference, q, k, v, dout)
    exact = outputs_and_grads(reference, q.double(), k.double(), v.double(), dout.double())

    # What is inherited. A score rounded in fp32 gives a probability with as much relative error as the score has ulp.
    # dS = P * (dP - delta) keeps the rounding of dP where the two cancel, and delta = dout * out that of out in q's
    # dtype, half an ulp.
    accumulated = torch.promote_types(q.dtype, torch.float32)
    ulp, half_ulp_of_out = torch.finfo(accumulated).eps, torch.finfo(q.dtype).eps / 2
    of_score = 2 * ulp * largest_product(q, k) * abs(scale)
    of_dscore = (2 * ulp + half_ulp_of_out) * largest_product(dout, v) * abs(scale)
    cancelled = {"dq": of_dscore * k.abs().max().item(), "dk": of_dscore * q.abs().max().item()}
    for i, result in enumerate(("out", "dq", "dk", "dv")):
        inherited = of_score * exact[i].abs().max().item() + cancelled.get(result, 0.0)
        assert_close_to_reference(actual[i], plain[i], exact[i], f"{result} of {name}", inherited)


def largest_product(a: Tensor, b: Tensor) -> float:
    """The largest |a_i . b_j| over all rows of a batch and head; b may have fewer heads."""
    b = b.repeat_interleave(a.shape[2] // b.shape[2], dim=2)
    return torch.einsum("bihd,bjhd->bhij", a.double(), b.double()).abs().max().item()


def check_against_reference(problem: Problem) -> None:
    """Forward and backward of the op on a random instance of `problem`."""
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, problem.group_size, doc_start, **problem.kwargs())

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn_reference(q, k, v, problem.group_size, doc_start, **problem.kwargs())[0]

    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    assert_outputs_and_grads_close(ours, reference, q, k, v, scale, str(problem))
