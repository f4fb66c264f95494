"""The op as a citizen of torch: opcheck, autograd, compile, checkpointing, autocast, memory."""

import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora_ext import s2attn
from op_checks import DTYPES, HALVES, Problem, assert_same, outputs_and_grads

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_opcheck(documents: bool, dtype: torch.dtype) -> None:
    problem = Problem(batch=2, seqlen=40, heads=4, kv_heads=2, documents=documents, dtype=dtype)
    q, k, v = (x.requires_grad_() for x in problem.tensors())
    doc_start = problem.doc_start()
    torch.library.opcheck(torch.ops.longlora.s2attn_fwd.default, (q, k, v, 16, 2, doc_start, 0.25, False))
    torch.library.opcheck(torch.ops.longlora.s2attn.default, (q, k, v, 16, doc_start))
    with torch.no_grad():
        out, lse = torch.ops.longlora.s2attn_fwd(q, k, v, 16, 2, doc_start, 0.25, False)
    backward_args = tuple(x.detach() for x in (out, q, k, v, out, lse))
    torch.library.opcheck(torch.ops.longlora.s2attn_bwd.default, (*backward_args, 16, 2, doc_start, 0.25, False))


@pytest.mark.only("cpu", "needs float64")
@pytest.mark.parametrize("wrap", [False, True])
def test_gradcheck(wrap: bool) -> None:
    problem = Problem(seqlen=8, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in problem.tensors())
    assert torch.autograd.gradcheck(lambda q, k, v: s2attn(q, k, v, 4, wrap=wrap), inputs)


@pytest.mark.only("cpu", "needs float64")
def test_gradcheck_with_documents() -> None:
    problem = Problem(seqlen=14, head_dim=8, documents=True, dtype=torch.float64)
    doc_start = problem.doc_start()
    inputs = tuple(x.requires_grad_() for x in problem.tensors())
    assert torch.autograd.gradcheck(lambda q, k, v: s2attn(q, k, v, 4, doc_start), inputs)


def test_only_needed_gradients() -> None:
    q, k, v = Problem().tensors()
    s2attn(q, k.requires_grad_(), v, 16).sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None
    assert not s2attn(q, k.detach(), v, 16).requires_grad


def test_differentiating_twice_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Problem().tensors())
    (dq,) = torch.autograd.grad(s2attn(q, k, v, 16).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="s2attn cannot be differentiated twice"):
        dq.sum().backward()


def test_forward_mode_is_refused() -> None:
    q, k, v = Problem().tensors()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="s2attn: cannot be differentiated in forward mode"):
            s2attn(dual, k, v, 16)


def attention_layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s2attn(q * 2, k, v, 16).sin()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_makes_one_graph_for_every_length(backend: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(attention_layer, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (40, 64, 131, 7):
        q, k, v = Problem(seqlen=seqlen).tensors()
        expected = outputs_and_grads(attention_layer, q, k, v, q)
        for a, b in zip(outputs_and_grads(compiled, q, k, v, q), expected, strict=True):
            assert_same(a, b)
    assert counter.frame_count == 1


def test_compile_with_documents_and_marked_length() -> None:
    """doc_start made inside the graph, only the length dynamic."""
    from longlora_ext import doc_start_from_position_ids

    def layer(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
        return s2attn(q, k, v, 16, doc_start_from_position_ids(position_ids))

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seqlen in (40, 64, 33):
        q, k, v = Problem(seqlen=seqlen).tensors()
        position_ids = torch.cat([torch.arange(20), torch.arange(seqlen - 20)])[None]
        for x in (q, k, v, position_ids):
            torch._dynamo.mark_dynamic(x, 1)
        assert_same(compiled(q, k, v, position_ids), layer(q, k, v, position_ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """The op used twice in a checkpointed block, whose forward then runs twice."""
    q, k, v = Problem(seqlen=50).tensors()

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(s2attn(q, k, v, 16, deterministic=True), k, v, 8, deterministic=True)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, q, k, v, use_reentrant=use_reentrant)

    expected = outputs_and_grads(block, q, k, v, q)
    for a, b in zip(outputs_and_grads(checkpointed, q, k, v, q), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast(device: str, half: torch.dtype) -> None:
    q, k, v = Problem(dtype=torch.float32).tensors()
    with torch.autocast(device, dtype=half):
        actual = outputs_and_grads(lambda *qkv: s2attn(*qkv, 16), q, k.to(half), v, q.to(half))
        with pytest.raises(RuntimeError, match=r"q must be .* but is Int"):
            s2attn(q.int(), k.int(), v.int(), 16)
        if device == "cpu":
            assert s2attn(q.double(), k.double(), v.double(), 16).dtype == torch.float64  # as torch's own autocast
    assert actual[0].dtype == half and actual[1].dtype == torch.float32
    assert torch.equal(actual[0], s2attn(q.to(half), k.to(half), v.to(half), 16))


def test_deterministic_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = Problem().tensors()
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.longlora.s2attn_fwd.default:
                seen.append(args[7])
            return func(*args, **(kwargs or {}))

    with Spy():
        s2attn(q, k, v, 16)
        s2attn(q, k, v, 16, deterministic=True)
        torch.use_deterministic_algorithms(True)
        try:
            s2attn(q, k, v, 16)
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True]


@pytest.mark.only("cpu", "meta tensors are on no device")
def test_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in Problem().tensors())
    out = s2attn(q, k, v, 16)
    assert out.is_meta and out.shape == q.shape


def extra_memory(seqlen: int, head_dim: int, group_size: int) -> int:
    """Bytes by which forward and backward of one head raise a fresh process's peak memory."""
    script = f"""
        import resource, torch
        from longlora_ext import s2attn
        torch.set_num_threads(2)  # each has scratch of its own
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        q, k, v = (torch.randn(1, 512, 1, {head_dim}, requires_grad=True) for _ in range(3))
        s2attn(q, k, v, 128).sum().backward()  # loads what is loaded lazily
        q, k, v = (torch.randn(1, {seqlen}, 1, {head_dim}, requires_grad=True) for _ in range(3))
        before = peak()
        s2attn(q, k, v, {group_size}).sum().backward()
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.only("cpu", "measures a process; tests/op/test_op_cuda.py asks torch's allocator")
@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(64, 512), (8, 8192), pytest.param(128, 8192, marks=pytest.mark.full)]
)
def test_memory_grows_with_the_length_alone(head_dim: int, group_size: int) -> None:
    """131,072 tokens: a G x G buffer would take up to 256 MiB, an N x N one 64 GiB, a copy of q, k or v one tensor."""
    seqlen = 131_072
    tensor, row_stats = seqlen * head_dim * 4, seqlen * 4
    # out, dout (that of sum() is expanded, and made whole), dq, dk, dv; lse, delta
    outputs = 5 * tensor + 2 * row_stats
    assert extra_memory(seqlen, head_dim, group_size) <= outputs + max(tensor // 2, 20 * 2**20)


#: What is run of the operator's tests with each instruction set.
SHAPES = ["test_op_numerics.py", "-k", "cpu and (forward_and or rounds or conversions)"]
# What checks arguments and speaks to torch is compiled once, for all of them.
ALL = ["test_op_numerics.py", "test_op_not_finite.py", "-k", "cpu"]


@cache
def instruction_sets() -> list[str]:
    """Those that this processor has, the widest first."""
    script = "import torch; from longlora_ext import s2attn; s2attn(*torch.randn(3, 1, 8, 1, 8), 2)"
    environment = os.environ | {"LONGLORA_CPU_ISA": "none"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "LONGLORA_CPU_ISA is 'none', but must be one of" in result.stderr
    return result.stderr.strip().rsplit(": ", 1)[1].split(", ")


@pytest.mark.only("cpu", "a GPU has no LONGLORA_CPU_ISA")
@pytest.mark.parametrize(
    ("isa", "chosen"),
    [
        *((isa, SHAPES) for isa in ("baseline", "avx2")),
        *(
            pytest.param(isa, ALL, marks=pytest.mark.full)
            for isa in ("baseline", "avx2", "avx512", "avx512bf16", "amx")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "shapes" if value is SHAPES else "all",
)
def test_other_instruction_sets(isa: str, chosen: list[str]) -> None:
    """Forward and backward of every shape and dtype, with the kernels that this processor would not choose."""
    if isa not in instruction_sets():
        pytest.skip(f"this processor or build has no {isa}")
    if isa == instruction_sets()[0]:
        return  # all other tests run with it
    tests = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    environment = os.environ | {"LONGLORA_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, cwd=tests.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
