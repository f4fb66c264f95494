"""What a row sees besides its group: the sink, the window, queries that are the last of the keys' tokens; and lse."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlora_ext import add_key, add_learned_sink, s2attn
from longlora_ext.reference import s2attn_mask, s2attn_reference
from op_checks import (
    DTYPES,
    HALVES,
    Problem,
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
    "pattern",
    [{"sink": True}, {"window": 23}, {"sink": True, "window": 23}, {"sink": True, "window": 1}],
    ids=lambda pattern: "-".join(f"{name}={value}" for name, value in pattern.items()),
)
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2, "seqlen": 150, "heads": 4, "kv_heads": 4, "head_dim": 64, "group_size": 16},
        {"seqlen": 333, "heads": 6, "kv_heads": 1, "head_dim": 40, "group_size": 100},
        {"seqlen": 130, "seqlen_k": 290, "heads": 4, "kv_heads": 2, "head_dim": 128, "group_size": 64},
        {"batch": 2, "seqlen": 1, "seqlen_k": 300, "heads": 2, "kv_heads": 1, "group_size": 90},
        {"seqlen": 140, "heads": 2, "kv_heads": 2, "group_size": 400, "first_shifted_head": 2, "scale": -0.3},
    ],
    ids=lambda shape: "-".join(str(value) for value in shape.values()),
)
def test_forward_and_backward(shape: dict, pattern: dict, documents: bool, dtype: torch.dtype) -> None:
    check_against_reference(Problem(**shape, **pattern, documents=documents, dtype=dtype))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    seqlen=st.integers(1, 300),
    before=st.sampled_from([0, 0, 1, 130, 256]),
    kv_heads=st.integers(1, 2),
    heads_per_kv=st.integers(1, 3),
    head_dim=st.integers(1, 6).map(lambda n: 8 * n),
    group_size=st.integers(1, 320).map(lambda n: 2 * n),
    shifted=st.floats(0, 1),
    documents=st.booleans(),
    sink=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 320)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_pattern(
    device: str, before: int, kv_heads: int, heads_per_kv: int, shifted: float, dtype: torch.dtype, seed: int, **shape
) -> None:
    torch.manual_seed(seed)
    heads = kv_heads * heads_per_kv
    shape |= {"heads": heads, "kv_heads": kv_heads, "first_shifted_head": round(shifted * heads)}
    if device == "cuda" and dtype not in HALVES:
        dtype = HALVES[seed % 2]
    check_against_reference(Problem(**shape, seqlen_k=shape["seqlen"] + before, dtype=dtype))


@pytest.mark.parametrize("began", [-1, -40, -1000, -(2**28)])
def test_document_that_began_before_the_keys(began: int) -> None:
    """A window of a longer sequence: groups count from the document's start, keys from the window's."""
    problem = Problem(batch=1, seqlen=150, seqlen_k=190, heads=4, kv_heads=2, group_size=64, window=50)
    q, k, v = problem.tensors()
    doc_start = torch.full((1, 150), began, dtype=torch.int32)
    doc_start[:, 90:] = 130

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, 64, doc_start, window=50)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn_reference(q, k, v, 64, doc_start, window=50)[0]

    assert_outputs_and_grads_close(ours, reference, q, k, v, 0.25)


def test_windows_of_a_sequence_equal_the_whole() -> None:
    """As by halo over processes or in a prefill by parts: the last rows of some keys, of documents begun earlier."""
    problem = Problem(batch=2, seqlen=400, heads=4, kv_heads=2, group_size=64, documents=False)
    q, k, v = problem.tensors()
    starts = torch.tensor([0, 70, 211], dtype=torch.int32)
    doc_start = starts.repeat_interleave(torch.tensor([70, 141, 189]))[None].expand(2, -1).contiguous()
    whole = s2attn(q, k, v, 64, doc_start)
    for begin, first, end in [(0, 0, 100), (36, 100, 217), (153, 217, 400)]:  # reach back a group at least
        part = s2attn(q[:, first:end], k[:, begin:end], v[:, begin:end], 64, doc_start[:, first:end] - begin)
        assert_same(part, whole[:, first:end])


def first_tokens(problem: Problem, doc_start: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Of each query row's document, from tensors of the keys."""
    index = torch.zeros(problem.batch, problem.seqlen, dtype=torch.int64) if doc_start is None else doc_start.long()
    return [x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:])) for x in tensors]


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.only("cpu", "needs float64")
def test_sink_by_composition(documents: bool, window: int | None) -> None:
    """The other definition: attention without it, and the key merged by the log-sum-exp. Gradients go through lse."""
    problem = Problem(batch=2, seqlen=150, seqlen_k=170, heads=6, kv_heads=2, group_size=32, documents=documents)
    q, k, v = (x.double() for x in problem.tensors())
    doc_start = problem.doc_start()
    pattern = {"window": window, "seqlen_k": 170}
    seen = torch.stack([s2attn_mask(150, 32, head >= 3, doc_start, **pattern) for head in range(6)], -3)
    start = torch.zeros(1, 1, dtype=torch.int64) if doc_start is None else doc_start.long()
    lacks = ~seen.expand(2, -1, -1, -1).gather(-1, start[:, None, :, None].expand(2, 6, 150, 1))[..., 0]
    assert lacks.any()

    def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = s2attn(q, k, v, 32, doc_start, window=window, return_lse=True)
        out, lse = add_key(out, lse, q, *first_tokens(problem, doc_start, k, v), 0.25, lacks)
        return torch.cat([out, lse.transpose(1, 2)[..., None]], dim=-1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = s2attn(q, k, v, 32, doc_start, window=window, sink=True, return_lse=True)
        return torch.cat([out, lse.transpose(1, 2)[..., None]], dim=-1)

    dout = torch.randn(2, 150, 6, 17, dtype=torch.float64)
    results = zip(outputs_and_grads(ours, q, k, v, dout), outputs_and_grads(composed, q, k, v, dout), strict=True)
    for a, b in results:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_sink_changes_nothing_where_the_group_begins_with_it(documents: bool) -> None:
    """To the bit: with one group a document this is dense attention as before."""
    problem = Problem(batch=2, seqlen=150, heads=4, kv_heads=2, documents=documents)
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()

    def results(**pattern) -> tuple[Tensor, ...]:
        return outputs_and_grads(lambda *qkv: s2attn(*qkv, 300, doc_start, deterministic=True, **pattern), q, k, v, q)

    for pattern in ({"sink": True}, {"window": 150}):
        assert all(torch.equal(a, b) for a, b in zip(results(), results(**pattern), strict=True))


def test_no_token_sees_the_future_or_another_document() -> None:
    problem = Problem(batch=1, seqlen=150, heads=4, kv_heads=2, group_size=16, documents=True)
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    before = s2attn(q, k, v, 16, doc_start, sink=True, window=5)
    for j in range(150):
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, j] += 3
        after = s2attn(q, *changed, 16, doc_start, sink=True, window=5)
        rows = (after != before).any(-1).any(-1)[0]
        masks = [s2attn_mask(150, 16, shifted, doc_start, sink=True, window=5) for shifted in (False, True)]
        assert torch.equal(rows, (masks[0] | masks[1])[0, :, j]), f"token {j}"


@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("kv_heads", [6, 1])
def test_wrap_with_sink_and_window(kv_heads: int, window: int | None) -> None:
    """Rolling and masks by hand: the first token is the sink of every row, wherever rolling took it."""
    q, k, v = Problem(batch=2, seqlen=96, heads=6, kv_heads=kv_heads).tensors()
    mask = s2attn_mask(96, 24, False, window=window)
    rolled = mask.roll((12, 12), dims=(0, 1))
    masks = torch.stack([mask] * 3 + [rolled] * 3)
    masks[:, :, 0] = True

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(6 // kv_heads, dim=2).transpose(1, 2) for x in (k, v))
        scores = (q.transpose(1, 2) @ k.transpose(-1, -2) / 4).masked_fill(~masks, float("-inf"))
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, 24, wrap=True, sink=True, window=window)

    if default_dtype() == torch.float32:
        assert_outputs_and_grads_close(ours, by_hand, q, k, v, 16**-0.5)
    else:  # what is merged is rounded once more
        torch.testing.assert_close(ours(q, k, v), by_hand(q, k, v), rtol=0, atol=0.03)


@pytest.mark.parametrize("sink", [False, True])
def test_learned_sink(sink: bool) -> None:
    """gpt-oss: a learned logit a head takes part in the softmax and has no value."""
    q, k, v = Problem(batch=2, seqlen=90, heads=4, kv_heads=2, group_size=32).tensors()
    logits = torch.randn(4)

    def plain(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.stack([s2attn_mask(90, 32, head >= 2, sink=sink) for head in range(4)])
        k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
        scores = (q.transpose(1, 2) @ k.transpose(-1, -2) / 4).masked_fill(~masks, float("-inf"))
        scores = torch.cat([scores, logits[None, :, None, None].expand(2, 4, 90, 1)], dim=-1)
        return (scores.softmax(dim=-1)[..., :-1] @ v).transpose(1, 2), scores.logsumexp(dim=-1)

    def ours(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return add_learned_sink(*s2attn(q, k, v, 32, sink=sink, return_lse=True), logits)

    inputs = [x.requires_grad_() for x in (q, k, v, logits)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    results, expected = ours(*inputs), plain(*doubles)
    gradients = [torch.randn(x.shape) for x in expected]
    results += torch.autograd.grad(results, inputs, [g.to(r.dtype) for g, r in zip(gradients, results, strict=True)])
    expected += torch.autograd.grad(expected, doubles, [g.double() for g in gradients])
    for a, b in zip(results, expected, strict=True):
        bound = 16 * torch.finfo(a.dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)
