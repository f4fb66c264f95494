"""S2-Attn by torch's own attention, where no kernel runs: the same, features and gradients, without a kernel."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlora_ext import _attend, _strided, s2attn
from longlora_ext._strided import _tiles
from longlora_ext.reference import s2attn_reference
from measured_peak import peak_of
from op_checks import DTYPES, Problem, assert_outputs_and_grads_close, assert_same, outputs_and_grads

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device that has none."""
    monkeypatch.setattr(_attend, "_why_unsupported", lambda *where, **direction: "there are none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(problem: Problem, **kwargs: object) -> None:
    """As check_against_reference."""
    q, k, v = problem.tensors()
    doc_start, options = problem.doc_start(), problem.kwargs() | kwargs
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn(q, k, v, problem.group_size, doc_start, **options)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn_reference(q, k, v, problem.group_size, doc_start, **options)[0]

    assert_outputs_and_grads_close(ours, reference, q, k, v, scale, str(problem))
    assert ours(q, k, v).is_contiguous()


SHAPES = [
    {"batch": 2, "seqlen": 128, "heads": 4, "kv_heads": 4, "group_size": 32},  # groups are views of whole rows
    {"batch": 3, "seqlen": 150, "heads": 6, "kv_heads": 2, "group_size": 16},  # a rest, more groups than rows
    {"batch": 5, "seqlen": 150, "heads": 6, "kv_heads": 1, "group_size": 60},  # more rows than groups
    {"seqlen": 90, "heads": 9, "kv_heads": 3, "group_size": 20, "first_shifted_head": 4},  # cuts through a KV head
    {"batch": 2, "seqlen": 70, "seqlen_k": 130, "heads": 4, "kv_heads": 2, "group_size": 32},
    {"seqlen": 100, "heads": 2, "kv_heads": 2, "group_size": 400, "scale": -0.3},
]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "pattern",
    [{}, {"sink": True}, {"window": 23}, {"sink": True, "window": 7}],
    ids=lambda pattern: "-".join(f"{name}={value}" for name, value in pattern.items()) or "groups",
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(str(value) for value in shape.values()))
def test_it_is_the_reference(shape: dict, pattern: dict, documents: bool) -> None:
    check(Problem(**shape, **pattern, documents=documents))


@pytest.mark.usefixtures("no_kernels")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 4),
    seqlen=st.integers(1, 200),
    before=st.sampled_from([0, 0, 1, 130]),
    kv_heads=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    group_size=st.integers(1, 120).map(lambda n: 2 * n),
    shifted=st.floats(0, 1),
    documents=st.booleans(),
    sink=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 220)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["tokens first", "heads first"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_pattern_is_that_of_the_kernels(
    device: str, before: int, kv_heads: int, heads_per_kv: int, shifted: float, layout: str, seed: int, **shape
) -> None:
    """Out and log-sum-exp, and all gradients of both, in fp64 to 1e-11, in others as a kernel against the reference."""
    torch.manual_seed(seed)
    heads = kv_heads * heads_per_kv
    shape |= {"heads": heads, "kv_heads": kv_heads, "first_shifted_head": round(shifted * heads)}
    problem = Problem(**shape, seqlen_k=shape["seqlen"] + before)
    if problem.dtype != torch.float64:
        return check(problem)
    q, k, v = problem.tensors()
    if layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    doc_start, options = problem.doc_start(), problem.kwargs()
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    results = s2attn(*inputs, problem.group_size, doc_start, **options, return_lse=True)
    expected = s2attn_reference(*inputs, problem.group_size, doc_start, **options)
    gradients = [torch.randn_like(x) for x in expected]
    results += torch.autograd.grad(results, inputs, gradients)
    expected += torch.autograd.grad(expected, inputs, gradients)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("pattern", [{}, {"window": 50}])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_several_tiles_and_devices_whose_attention_forms_all_scores(
    fused: bool, pattern: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiles, "MOST_ROWS", 32)
    monkeypatch.setattr(_strided, "is_fused", lambda q: fused)
    shape = {"batch": 2, "seqlen": 150, "heads": 4, "kv_heads": 2, "group_size": 64}
    for documents in (False, True):
        for sink in (False, True):
            check(Problem(**shape, **pattern, documents=documents, sink=sink))


@pytest.mark.usefixtures("no_kernels")
def test_document_that_began_before_the_keys() -> None:
    q, k, v = Problem(seqlen=150, seqlen_k=190, heads=4, kv_heads=2).tensors()
    for began in (-1, -40, -1000, -(2**28)):
        doc_start = torch.full((1, 150), began, dtype=torch.int32)
        doc_start[:, 90:] = 130

        def ours(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor = doc_start) -> Tensor:
            return s2attn(q, k, v, 64, doc_start, window=50)

        def reference(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor = doc_start) -> Tensor:
            return s2attn_reference(q, k, v, 64, doc_start, window=50)[0]

        assert_outputs_and_grads_close(ours, reference, q, k, v, 0.25)
    with pytest.raises(RuntimeError, match=r"^s2attn: sink=True needs the first token .*\[0\] is \[-268435456\]|is \["):
        s2attn(q, k, v, 64, doc_start, sink=True)


@pytest.mark.usefixtures("no_kernels")
def test_wrap_with_sink_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = Problem(batch=2, seqlen=96, heads=6, kv_heads=2).tensors()
    options = {"wrap": True, "sink": True, "window": 20}
    actual = outputs_and_grads(lambda *qkv: s2attn(*qkv, 24, **options), q, k, v, q)
    monkeypatch.undo()
    expected = outputs_and_grads(lambda *qkv: s2attn(*qkv, 24, **options), q, k, v, q)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


@pytest.mark.usefixtures("no_kernels")
def test_a_batch_of_nothing() -> None:
    q, k, v = (x[:0] for x in Problem(batch=2, seqlen=96, heads=6, kv_heads=2).tensors())
    assert s2attn(q, k, v, 24, window=20).shape == q.shape
    out, lse = torch.ops.longlora.s2attn_with_lse(q, k, v, 24)
    assert out.shape == q.shape and lse.shape == (0, 6, 96)


@pytest.mark.parametrize("sink", [False, True])
def test_unshifted_groups_are_neither_copied_nor_masked(sink: bool) -> None:
    """What torch's attention is called with: views of q, k and v, unless a sink goes in front of them."""
    q, k, v = Problem(batch=2, seqlen=128, heads=4, kv_heads=4).tensors()
    calls = []

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.scaled_dot_product_attention:
                calls.append((*args, kwargs))
            return function(*args, **(kwargs or {}))

    with Calls():
        _strided.strided(q, k, v, _strided.Arguments(32, 2, sink=sink))
    assert all("attn_mask" not in options for *_, options in calls)
    shared = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    own = [all(x.untyped_storage().data_ptr() in shared for x in tensors) for *tensors, _ in calls]
    # Unshifted: all groups at once; with a sink the first alone. Shifted: half a group, of each row three, half a one.
    assert own == ([True, False, False, True, False, False, False] if sink else [True] * 5)


@pytest.mark.only("cpu", "asks the CPU's allocator")
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("how", ["groups", "sink", "window", "documents", "lse"])
def test_memory_grows_with_the_length_alone(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """4,096 tokens in groups of 1,024: masks of all tiles would take 8 MiB, and four times that as torch has them."""
    monkeypatch.setattr(_tiles, "MASK_ENTRIES", 2**16)
    monkeypatch.setattr(_tiles, "SCORES", 2**16)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 4096, 2, 8))
    documents = torch.arange(4096, dtype=torch.int32)[None] // 1500 * 1500
    options = {
        "groups": {},
        "sink": {"sink": True},
        "window": {"window": 700},
        "documents": {"doc_start": documents, "sink": True},
        "lse": {"return_lse": True, "sink": True},
    }

    def work() -> None:
        out = s2attn(q, k, v, 1024, **options[how])
        sum(x.sum() for x in (out if isinstance(out, tuple) else [out])).backward()

    assert peak_of(work, tmp_path) <= 16 * q.nbytes + 2**20


@pytest.mark.parametrize("how", ["groups", "sink", "documents", "lse"])
@pytest.mark.usefixtures("no_kernels")
def test_compiled_in_one_graph(how: str) -> None:
    problem = Problem(seqlen=64, heads=4, kv_heads=2, documents=how == "documents")
    (q, k, v), doc_start = problem.tensors(), problem.doc_start()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = s2attn(q * 2, k, v, 16, doc_start, sink=how != "groups", return_lse=how == "lse")
        return out[0] + out[1].transpose(1, 2)[..., None] if isinstance(out, tuple) else out.sin()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_grads(compiled, q, k, v, q), outputs_and_grads(layer, q, k, v, q), strict=True):
        assert_same(a, b)


def test_it_is_said_once() -> None:
    """A head dim that no kernel has; later calls for the same reason say nothing."""
    q, k, v = Problem(head_dim=264).tensors()
    _attend._say_once.cache_clear()
    with pytest.warns(UserWarning, match="by torch's scaled_dot_product_attention.*head_dim must be .* but is 264"):
        s2attn(q, k, v, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s2attn(q, k, v, 16)
        s2attn(*Problem().tensors(), 16)  # with a kernel


BAD = {
    "k must have 4 dimensions": {"k": torch.ones(64, 2, 16)},
    "k must have q's dtype": {"k": torch.ones(1, 64, 2, 16, dtype=torch.float64)},
    "k and v must have q's batch": {"k": torch.ones(2, 64, 2, 16), "v": torch.ones(2, 64, 2, 16)},
    "k and v must have at least q's seqlen": {"k": torch.ones(1, 63, 2, 16), "v": torch.ones(1, 63, 2, 16)},
    "the heads of q must be a positive multiple": {"q": torch.ones(1, 64, 3, 16)},
    "group_size must be a positive even number, but is 15": {"group_size": 15},
    "first_shifted_head must be from 0 to .* 2, but is 3": {"first_shifted_head": 3},
    "window must be at least 1 token, but is 0": {"window": 0},
    "scale must be finite and not negative, but is nan": {"scale": float("nan")},
    "doc_start must be int32": {"doc_start": torch.zeros(1, 64, dtype=torch.int64)},
    "doc_start must have shape": {"doc_start": torch.zeros(1, 63, dtype=torch.int32)},
    r"doc_start\[0, 1\] is 7, but must be 1 ": {"doc_start": torch.tensor([[0] + [7] * 63], dtype=torch.int32)},
    r"doc_start\[:, 0\] is \[1\], but must be at most 0": {"doc_start": torch.ones(1, 64, dtype=torch.int32)},
}


@pytest.mark.only("cpu", "values of doc_start are looked at there alone")
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_argument_is_named_as_by_the_kernels(message: str) -> None:
    q, k, v = Problem(dtype=torch.float32).tensors()
    with pytest.raises(RuntimeError, match=f"^s2attn: {message}"):
        s2attn(**({"q": q, "k": k, "v": v, "group_size": 16} | BAD[message]))


# Head dims ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", [(24, 16), (16, 24), (12, 12), (3, 1), (192, 128), (300, 20)], ids=str)
def test_v_of_another_head_dim_and_head_dims_without_a_kernel(head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    """As plain attention has it: the scale is that of q's, out has v's."""
    of_k, of_v = head_dims
    q, k, _ = Problem(batch=2, seqlen=70, heads=4, head_dim=of_k, dtype=dtype).tensors()
    v, dout = torch.randn(2, 70, 2, of_v, dtype=torch.float64), torch.randn(2, 70, 4, of_v, dtype=torch.float64)

    def results(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in (q.detach(), k.detach(), v.to(q.dtype))]
        out, lse = function(*inputs)
        return out, lse, *torch.autograd.grad(out, inputs, dout.to(q.dtype).to(dtype))

    actual = results(lambda *qkv: s2attn(*qkv, 16, sink=True, return_lse=True), q.dtype)
    plain = results(lambda *qkv: s2attn_reference(*qkv, 16, sink=True), q.dtype)
    exact = results(lambda *qkv: s2attn_reference(*qkv, 16, sink=True), torch.float64)
    assert actual[0].is_contiguous()
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.shape == e.shape
        error, ulp = (p.double() - e).abs().max(), torch.finfo(p.dtype).eps * e.abs().max()
        torch.testing.assert_close(a.double(), e, rtol=0, atol=(3 * error + 16 * ulp).item())


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-46])
def test_scale_of_nothing(scale: float, sink: bool) -> None:
    """Each row is the mean of what it sees."""
    q, k, v = torch.randn(3, 1, 40, 2, 264).unbind()
    expected, _ = s2attn_reference(*(x.double() for x in (q, k, v)), 16, sink=sink, scale=scale)
    torch.testing.assert_close(s2attn(q, k, v, 16, scale=scale, sink=sink).double(), expected, rtol=0, atol=1e-5)


def test_one_dimension_and_a_negative_scale() -> None:
    """-q gives the last dimension another stride, which means nothing where its size is 1."""
    q, k, v = (x.transpose(1, 2) for x in torch.randn(3, 2, 4, 64, 1).unbind())
    expected, _ = s2attn_reference(*(x.double() for x in (q, k, v)), 16, scale=-0.3)
    torch.testing.assert_close(s2attn(q, k, v, 16, scale=-0.3).double(), expected, rtol=0, atol=1e-5)
