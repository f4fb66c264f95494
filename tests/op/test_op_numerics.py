"""The op against its definition, by an error bound: shapes, dtypes, heads, documents, strides."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlora_ext import s2attn
from longlora_ext.reference import s2attn_reference
from op_checks import (
    DTYPES,
    HALVES,
    Problem,
    assert_close_to_reference,
    assert_outputs_and_grads_close,
    assert_same,
    check_against_reference,
    default_dtype,
    outputs_and_grads,
)

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "shape",
    [
        {"seqlen": 1, "group_size": 2},
        {"seqlen": 2, "group_size": 2},
        {"batch": 3, "seqlen": 64, "heads": 4, "kv_heads": 4, "group_size": 16},
        {"batch": 2, "seqlen": 300, "heads": 9, "kv_heads": 3, "head_dim": 64, "group_size": 64},  # SmolLM2
        {
            "seqlen": 777,
            "heads": 4,
            "kv_heads": 1,
            "head_dim": 40,
            "group_size": 200,
        },  # MQA, ragged everywhere
        {"seqlen": 200, "heads": 1, "kv_heads": 1, "head_dim": 8, "group_size": 50},
        {"seqlen": 130, "heads": 2, "kv_heads": 1, "head_dim": 128, "group_size": 1000},  # G > N
        {"seqlen": 260, "heads": 2, "kv_heads": 2, "head_dim": 256, "group_size": 128},
        {
            "seqlen": 100,
            "heads": 6,
            "kv_heads": 2,
            "group_size": 10,
            "first_shifted_head": 1,
        },  # within one KV head
        {"seqlen": 100, "heads": 2, "kv_heads": 2, "group_size": 12, "first_shifted_head": 0, "scale": 0.7},
        {"seqlen": 100, "heads": 2, "kv_heads": 2, "group_size": 12, "first_shifted_head": 2, "scale": -0.3},
    ],
    ids=lambda shape: "-".join(str(value) for value in shape.values()),
)
def test_forward_and_backward(shape: dict, documents: bool, dtype: torch.dtype) -> None:
    check_against_reference(Problem(**shape, documents=documents, dtype=dtype))


# Every example runs on the one device.
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 300),
    kv_heads=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    head_dim=st.integers(1, 6).map(lambda n: 8 * n),
    group_size=st.integers(1, 320).map(lambda n: 2 * n),
    shifted=st.floats(0, 1),
    documents=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 1.0, 3.0, -0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    device: str, kv_heads: int, heads_per_kv: int, shifted: float, dtype: torch.dtype, seed: int, **shape
) -> None:
    torch.manual_seed(seed)
    heads = kv_heads * heads_per_kv
    shape |= {"heads": heads, "kv_heads": kv_heads, "first_shifted_head": round(shifted * heads)}
    if device == "cuda" and dtype not in HALVES:
        dtype = HALVES[seed % 2]
    check_against_reference(Problem(**shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(dtype: torch.dtype) -> None:
    problem = Problem(batch=2, seqlen=150, heads=4, kv_heads=2, group_size=32, documents=True, dtype=dtype)
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    _, lse = torch.ops.longlora.s2attn_fwd(q, k, v, 32, 2, doc_start, 0.25, False)
    _, exact = s2attn_reference(q.double(), k.double(), v.double(), 32, doc_start, scale=0.25)
    _, plain = s2attn_reference(q.to(lse.dtype), k.to(lse.dtype), v.to(lse.dtype), 32, doc_start, scale=0.25)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_to_reference(lse, plain, exact)


def test_large_scores_stay_exact() -> None:
    """An online softmax must survive scores that overflow exp, rising and falling along the keys."""
    q, k, v = Problem(seqlen=400, group_size=400).tensors()
    k = k * torch.linspace(-300, 300, 400, dtype=k.dtype)[None, :, None, None]
    exact, _ = s2attn_reference(q.double(), k.double(), v.double(), 400)
    plain, _ = s2attn_reference(q, k, v, 400)
    assert_close_to_reference(s2attn(q, k, v, 400), plain, exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    """Every value of 16 bits passes through a single-token row unchanged: subnormal numbers, infinities, NaN.

    AVX512_BF16's dot product alone takes subnormal bfloat16, below 1.2e-38, for 0.
    """
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(-1, 1, 1, 256)
    out = s2attn(torch.zeros_like(v), torch.zeros_like(v), v, 2)
    assert torch.equal(out.isnan(), v.isnan())
    flushed = (dtype == torch.bfloat16) & (v.abs() < torch.finfo(dtype).tiny) & (out == 0)
    assert torch.equal(out.nan_to_num(0), v.where(~flushed, 0).nan_to_num(0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """With q = 0 the second token gets the exact mean of two values, half of these a tie between two neighbours."""
    v = torch.randn(1, 2, 4, 64).to(dtype)
    up = torch.full((), torch.inf, dtype=dtype, device="cpu")
    v[:, 1, :2] = torch.nextafter(v[:, 0, :2].cpu(), up).to(v.device)  # not every GPU torch has it for float16
    out = s2attn(torch.zeros_like(v), torch.randn(v.shape).to(dtype), v, 4, first_shifted_head=4)
    assert torch.equal(out[:, 1], v.float().mean(dim=1).to(dtype))


@pytest.mark.parametrize("group_size", [90, 1024, 2**62])
def test_one_group_without_shift_is_dense_causal(group_size: int) -> None:
    q, k, v = Problem(batch=2, seqlen=90, heads=4, kv_heads=4, head_dim=32).tensors()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, group_size, first_shifted_head=4)

    assert_outputs_and_grads_close(ours, dense, q, k, v, 32**-0.5)


def algorithm_1(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> Tensor:
    """The paper's pseudo-code: shift half of the heads, fold groups into the batch, attend causally, undo."""
    batch, seqlen, heads, head_dim = q.shape

    def shift(x: Tensor, by: int) -> Tensor:
        x = x.clone()
        x[:, :, heads // 2 :] = x[:, :, heads // 2 :].roll(by, dims=1)
        return x

    def fold(x: Tensor) -> Tensor:
        return x.reshape(batch * seqlen // group_size, group_size, heads, head_dim).transpose(1, 2)

    folded = (fold(shift(x, -group_size // 2)) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*folded, is_causal=True).transpose(1, 2)
    return shift(out.reshape(batch, seqlen, heads, head_dim), group_size // 2)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_wrap_is_algorithm_1(kv_heads: int) -> None:
    q, k, v = Problem(batch=2, seqlen=96, heads=6, kv_heads=kv_heads).tensors()

    def paper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return algorithm_1(q, *(x.repeat_interleave(6 // kv_heads, dim=2) for x in (k, v)), 24)

    assert_outputs_and_grads_close(lambda *qkv: s2attn(*qkv, 24, wrap=True), paper, q, k, v, 16**-0.5)
    leak_free, wrapped = s2attn(q, k, v, 24), s2attn(q, k, v, 24, wrap=True)
    assert (leak_free[:, :12, 3:] - wrapped[:, :12, 3:]).abs().max() > 0.1  # where wrapping leaks the future
    assert_same(leak_free[:, 12:], wrapped[:, 12:])


@pytest.mark.parametrize("seqlen", [64, 77, 70, 5])
def test_no_token_sees_the_future(seqlen: int) -> None:
    """Perturbing token j changes no output before j, in any head, with whole and ragged last groups: to the bit."""
    q, k, v = Problem(seqlen=seqlen, heads=4, kv_heads=2, group_size=16).tensors()
    before = s2attn(q, k, v, 16)
    for j in range(seqlen):
        changed = [x.clone() for x in (q, k, v)]
        for x, amount in zip(changed, (3, 3, 1e38), strict=True):  # 1e38: a masked weight must be 0, not just tiny
            x[:, j] += amount
        after = s2attn(*changed, 16)
        assert torch.equal(after[:, :j], before[:, :j]), f"token {j} changed an output before it"
        assert not torch.equal(after[:, j], before[:, j])


def test_no_document_sees_another() -> None:
    problem = Problem(batch=2, seqlen=120, heads=4, kv_heads=4, group_size=16, documents=True)
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    before = s2attn(q, k, v, 16, doc_start)
    j = 60
    same = doc_start == doc_start[:, j : j + 1]
    for x in (k, v):
        x[:, j] += 3
    changed = (s2attn(q, k, v, 16, doc_start) != before).any(-1).any(-1)
    assert changed[:, j].all() and not (changed & ~same).any()


def test_documents_equal_separate_rows() -> None:
    """A packed row gives each document what it would get alone."""
    lengths = [37, 1, 64, 18]
    q, k, v = Problem(seqlen=sum(lengths), heads=4, kv_heads=2, group_size=20).tensors()
    starts = torch.tensor([0, 37, 38, 102], dtype=torch.int32)
    doc_start = starts.repeat_interleave(torch.tensor(lengths))[None]
    packed = s2attn(q, k, v, 20, doc_start)
    alone = [s2attn(*(x.split(lengths, dim=1)[i] for x in (q, k, v)), 20) for i in range(len(lengths))]
    assert_same(packed, torch.cat(alone, dim=1))


def test_ragged_length_of_the_original() -> None:
    """L = 4274 with G = 2048: the original cut it at [0, 2048, 4096, 4274, 5298, ..., 8548] and read past its end."""
    check_against_reference(Problem(seqlen=4274, heads=2, kv_heads=1, head_dim=8, group_size=2048))


def test_batch_of_unequal_rows() -> None:
    """Rows padded left and right: each gets, at its tokens, what it gets alone (the original mixed rows up)."""
    q, k, v = Problem(batch=3, seqlen=50, heads=4, kv_heads=4, group_size=16).tensors()
    spans = [(0, 50), (13, 50), (0, 31)]
    mask = torch.zeros(3, 50)
    for row, (begin, end) in enumerate(spans):
        mask[row, begin:end] = 1
    from longlora_ext import doc_start_from_mask

    out = s2attn(q, k, v, 16, doc_start_from_mask(mask))
    assert torch.isfinite(out).all()
    for row, (begin, end) in enumerate(spans):
        alone = s2attn(*(x[row : row + 1, begin:end] for x in (q, k, v)), 16)
        assert_same(out[row : row + 1, begin:end], alone)


@pytest.mark.parametrize("layout", ["heads_first", "fused", "sliced", "misaligned", "expanded"])
def test_strided_inputs(layout: str) -> None:
    """transformers' transposed views, a fused qkv, slices of something larger (of which one has rows that start at no
    multiple of 16 bytes), an expanded batch: as they lie."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(default_dtype())

    if layout == "heads_first":
        q, k, v = (random(2, 4, 70, 16).transpose(1, 2) for _ in range(3))
    elif layout == "fused":
        q, k, v = random(2, 70, 3, 4, 16).unbind(2)
    elif layout == "sliced":
        q, k, v = (random(3, 90, 5, 24)[1:, 9:79, 1:, 8:] for _ in range(3))
    elif layout == "misaligned":
        q, k, v = (random(2, 70, 4, 17)[..., 1:] for _ in range(3))
    else:
        q, k, v = (random(1, 70, 1, 16).expand(2, 70, 4, 16) for _ in range(3))
    assert not q.is_contiguous()
    dout = random(2, 4, 70, 16).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, 16, deterministic=True)

    actual = outputs_and_grads(ours, q, k, v, dout)
    dense = outputs_and_grads(ours, *(x.contiguous() for x in (q, k, v)), dout.contiguous())
    assert actual[0].is_contiguous()
    for a, b in zip(actual, dense, strict=True):
        assert torch.equal(a, b)


def test_expanded_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in Problem().tensors())
    summed = torch.autograd.grad(s2attn(q, k, v, 16, deterministic=True).sum(), q)
    ones = torch.autograd.grad(s2attn(q, k, v, 16, deterministic=True), q, torch.ones_like(q))
    assert torch.equal(*summed, *ones)


@pytest.mark.only("cpu", "a GPU's blocks have no number to set; tests/op/test_op_cuda.py repeats its runs")
def test_gradients_do_not_depend_on_threads() -> None:
    q, k, v = Problem(batch=2, seqlen=300, heads=4, kv_heads=2, group_size=64).tensors()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_grads(lambda *qkv: s2attn(*qkv, 64, deterministic=True), q, k, v, q))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.only("cpu", "a GPU adds to dQ of all heads at once")
def test_more_of_dq_than_is_kept_at_once() -> None:
    """csrc/cpu keeps 32 MiB of dQ in fp32: of these 40 MiB some heads go first, the others take their memory."""
    q, k, v = Problem(batch=32, seqlen=128, heads=40, kv_heads=20, head_dim=64, group_size=64).tensors()
    together = outputs_and_grads(lambda *qkv: s2attn(*qkv, 64), q, k, v, q)
    for row in range(32):
        alone = outputs_and_grads(lambda *qkv: s2attn(*qkv, 64), *(x[row : row + 1] for x in (q, k, v, q)))
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


def test_empty_batch() -> None:
    q, k, v = Problem(batch=0).tensors()
    assert [x.shape for x in outputs_and_grads(lambda *qkv: s2attn(*qkv, 16), q, k, v, q)] == [q.shape] * 4
