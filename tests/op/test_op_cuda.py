"""What only a GPU can show: streams, graphs, devices, memory, and sizes that a CPU has no time for."""

import pytest
import torch
from torch import Tensor

from longlora_ext import s2attn
from op_checks import HALVES, Problem, assert_same, check_against_reference, outputs_and_grads

pytestmark = [pytest.mark.only("cuda", "CUDA's own"), pytest.mark.usefixtures("device")]

# Several tiles in every direction, two KV heads, a ragged end.
LARGE = {"batch": 2, "seqlen": 2000, "heads": 8, "kv_heads": 2, "head_dim": 128, "group_size": 512}
# Each has kernels of its own, or other tiles.
PATTERNS = [{}, {"sink": True}, {"sink": True, "window": 300}, {"window": 300}]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s2attn(q, k, v, LARGE["group_size"], deterministic=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_deterministic_gives_the_same_bits(dtype: torch.dtype, pattern: dict) -> None:
    q, k, v = Problem(**LARGE, dtype=dtype).tensors()

    def results(deterministic: bool) -> tuple[Tensor, ...]:
        options = {"deterministic": deterministic, **pattern}
        return outputs_and_grads(lambda *qkv: s2attn(*qkv, LARGE["group_size"], **options), q, k, v, q)

    first = results(True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(True), strict=True))
    for a, b in zip(results(False), first, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("keys", [2000, 2777])
def test_large(pattern: dict, documents: bool, keys: int) -> None:
    check_against_reference(Problem(**LARGE, **pattern, seqlen_k=keys, documents=documents, dtype=torch.bfloat16))


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_graph(pattern: dict) -> None:
    """Captured once, forward and backward, and replayed with other inputs."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, LARGE["group_size"], deterministic=True, **pattern)

    static = [x.requires_grad_() for x in Problem(**LARGE).tensors()]
    dout = torch.randn_like(static[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(ours(*static), static, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(*static)
        grads = torch.autograd.grad(out, static, dout)
    fresh = Problem(**LARGE).tensors()
    with torch.no_grad():
        for kept, new in zip(static, fresh, strict=True):
            kept.copy_(new)
    graph.replay()
    expected = outputs_and_grads(ours, *fresh, dout)
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), expected, strict=True))


def test_stream() -> None:
    """On a stream of its own, behind work that makes the inputs late: a launch on another would read the old ones."""
    late = Problem(**LARGE).tensors()
    expected = outputs_and_grads(ours, *late, late[0])
    q, k, v = (torch.zeros_like(x) for x in late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for x, new in zip((q, k, v), late, strict=True):
            x.copy_(new)
        actual = outputs_and_grads(ours, q, k, v, q)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nothing_waits_for_the_gpu(pattern: dict) -> None:
    problem = Problem(**LARGE, documents=True)
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_grads(lambda *qkv: s2attn(*qkv, 512, doc_start, **pattern), q, k, v, q)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    here = Problem(**LARGE).tensors()
    there = tuple(x.to("cuda:1") for x in here)
    actual = outputs_and_grads(ours, *there, there[0])
    for a, b in zip(actual, outputs_and_grads(ours, *here, here[0]), strict=True):
        assert a.device == there[0].device
        assert_same(a.to(b.device), b)  # the other may be of another kind


def test_more_than_2_to_31_elements() -> None:
    """The last group of a row gets what it gets alone, past every 32-bit offset."""
    seqlen, heads, head_dim, group_size = 2**19 + 256, 32, 128, 256
    tensor = 2 * seqlen * heads * head_dim
    needed = 10 * tensor  # q, dout, out, dq, dq in fp32; k, v and their gradients are small; some room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    q, dout = torch.randn(2, 1, seqlen, heads, head_dim, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, seqlen, 1, head_dim, dtype=torch.bfloat16)
    assert q.numel() > 2**31

    def unshifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, group_size, first_shifted_head=heads)

    whole = outputs_and_grads(unshifted, q, k, v, dout)
    last = outputs_and_grads(unshifted, *(x[:, -group_size:] for x in (q, k, v, dout)))
    for a, b in zip(whole, last, strict=True):
        assert_same(a[:, -group_size:], b)


@pytest.mark.parametrize("sink", [False, True])
def test_memory_grows_with_the_length_alone(sink: bool) -> None:
    """Beside out and the gradients: row statistics, dq once more in fp32. No copy, nothing of G x G.

    A sink has two more statistics, and dk and dv in fp32 for each tile of 64 query rows.
    """
    shape = {"seqlen": 65_536, "heads": 8, "kv_heads": 2, "head_dim": 128, "group_size": 16_384}
    q, k, v = (x.requires_grad_() for x in Problem(**shape).tensors())
    dout = torch.randn_like(q)
    tensor, row_stats = q.nbytes, 4 * q.shape[1] * q.shape[2]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    s2attn(q, k, v, shape["group_size"], sink=sink).backward(dout)
    outputs = 2 * tensor + 2 * k.nbytes  # out, dq; dk, dv
    scratch = 2 * tensor + 3 * row_stats  # dq in fp32; lse, delta, and as much to spare
    scratch += (2 * row_stats + 4 * tensor // 64) if sink else 0
    assert torch.cuda.max_memory_allocated() - before <= outputs + scratch + 20 * 2**20


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_refused(wide: torch.dtype) -> None:
    q, k, v = (x.to(wide) for x in Problem().tensors())
    with pytest.raises(RuntimeError, match=r"^s2attn: q must be .*float16.*, but is"):
        s2attn(q, k, v, 16)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wrong_doc_start_is_harmless(pattern: dict) -> None:
    """Values are clamped, not looked at: a wrong one may give a wrong number, but reads nothing outside."""
    q, k, v = Problem(batch=2, seqlen=300, group_size=64).tensors()
    wrong = torch.randint(-(2**31), 2**31, (2, 300), dtype=torch.int64).to(torch.int32)
    results = outputs_and_grads(lambda *qkv: s2attn(*qkv, 64, wrong, **pattern), q, k, v, q)
    torch.cuda.synchronize()
    assert [x.shape for x in results] == [q.shape] * 4
