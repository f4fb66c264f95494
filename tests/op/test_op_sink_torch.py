"""Sink, window and lse as operations of torch: gradients, schemas, compilation, threads."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from longlora_ext import s2attn
from longlora_ext.reference import s2attn_reference
from op_checks import DTYPES, Problem, assert_same, outputs_and_grads

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.only("cpu", "needs float64")
@pytest.mark.parametrize(
    ("documents", "wrap"), [(False, False), (True, False), (False, True)], ids=["whole", "documents", "wrap"]
)
def test_gradcheck(documents: bool, wrap: bool) -> None:
    """Of out and lse together, of each alone too."""
    problem = Problem(seqlen=12, heads=2, kv_heads=1, head_dim=8, documents=documents, dtype=torch.float64)
    doc_start = problem.doc_start()
    inputs = tuple(x.requires_grad_() for x in problem.tensors())

    def op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return s2attn(q, k, v, 4, doc_start, wrap=wrap, sink=True, window=3, return_lse=True)

    for chosen in (lambda *qkv: op(*qkv), lambda *qkv: op(*qkv)[0], lambda *qkv: op(*qkv)[1]):
        assert torch.autograd.gradcheck(chosen, inputs)


def test_log_sum_exp_of_half_precision_has_gradients() -> None:
    problem = Problem(seqlen=100, heads=4, kv_heads=2, group_size=16, sink=True, dtype=torch.bfloat16)
    q, k, v = problem.tensors()
    dlse = torch.randn(1, 4, 100)

    def lse_of(function, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        lse = function(*inputs)[1]
        assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        return torch.autograd.grad(lse, inputs, dlse.to(lse.dtype), allow_unused=True)

    ours = lse_of(lambda *qkv: s2attn(*qkv, 16, sink=True, return_lse=True), q, k, v)
    exact = lse_of(lambda *qkv: s2attn_reference(*qkv, 16, sink=True), *(x.double() for x in (q, k, v)))
    for a, b in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * torch.finfo(a.dtype).eps * b.abs().max().item())
    assert not ours[2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    problem = Problem(batch=2, seqlen=40, seqlen_k=50, heads=4, kv_heads=2, documents=True, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in problem.tensors())
    doc_start, pattern = problem.doc_start(), {"sink": True, "window": 9}
    if q.device.type == "cpu":
        torch.library.opcheck(torch.ops.longlora.s2attn_fwd.default, (q, k, v, 16, 2, doc_start, 0.25, True), pattern)
        torch.library.opcheck(torch.ops.longlora.s2attn.default, (q, k, v, 16, doc_start), pattern)
        torch.library.opcheck(torch.ops.longlora.s2attn_with_lse.default, (q, k, v, 16, doc_start), pattern)
    with torch.no_grad():
        out, lse = torch.ops.longlora.s2attn_fwd(q, k, v, 16, 2, doc_start, 0.25, True, **pattern)
    arguments = (*(x.detach() for x in (out, q, k, v, out, lse)), 16, 2, doc_start, 0.25, True, lse)
    torch.library.opcheck(torch.ops.longlora.s2attn_bwd.default, arguments, pattern)


def test_compile_makes_one_graph_for_every_length_and_window() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out, lse = s2attn(q * 2, k, v, 16, sink=True, window=window, return_lse=True)
        return out.sin() * lse.transpose(1, 2)[..., None]

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for seqlen, before, window in ((40, 5, 9), (64, 20, 3), (131, 7, 30)):
        q, k, v = Problem(seqlen=seqlen, seqlen_k=seqlen + before).tensors()
        expected = outputs_and_grads(lambda *qkv, w=window: layer(*qkv, w), q, k, v, q)
        actual = outputs_and_grads(lambda *qkv, w=window: compiled(*qkv, w), q, k, v, q)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    assert counter.frame_count == 1


@pytest.mark.only("cpu", "schemas are of no device")
def test_schemas_take_old_calls() -> None:
    """Those of 0.1: code and saved graphs of then call the op of now."""
    tensors = "Tensor q, Tensor k, Tensor v"
    arguments = "SymInt group_size, SymInt first_shifted_head, Tensor? doc_start, float scale, bool deterministic"
    old = {
        "s2attn": f"longlora::s2attn({tensors}, SymInt group_size, Tensor? doc_start=None, *, "
        "SymInt? first_shifted_head=None, bool wrap=False, float? scale=None, bool deterministic=False) -> Tensor",
        "s2attn_fwd": f"longlora::s2attn_fwd({tensors}, {arguments}) -> (Tensor out, Tensor lse)",
        "s2attn_bwd": f"longlora::s2attn_bwd(Tensor dout, {tensors}, Tensor out, Tensor lse, {arguments}) -> "
        "(Tensor dq, Tensor dk, Tensor dv)",
    }
    for name, schema in old.items():
        now = getattr(torch.ops.longlora, name).default._schema
        assert now.is_backward_compatible_with(torch._C.parse_schema(schema)), name


@pytest.mark.only("cpu", "a GPU's blocks have no number to set")
def test_gradients_do_not_depend_on_threads() -> None:
    problem = Problem(batch=2, seqlen=500, seqlen_k=570, heads=4, kv_heads=2, group_size=64, documents=True)
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_grads(lambda *qkv: s2attn(*qkv, 64, doc_start, sink=True), q, k, v, q))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
