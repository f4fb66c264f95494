"""Every argument that does not fit is refused before work starts, by name."""

import pytest
import torch

from longlora_ext import s2attn, why_unsupported
from op_checks import Problem, default_dtype

pytestmark = pytest.mark.usefixtures("device")

DOCUMENTS = torch.zeros(1, 64, dtype=torch.int32)


def with_value(tensor: torch.Tensor, index: int, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[0, index:] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(64, 2, 16)}, r"q must have 4 dimensions .*\[64, 2, 16\]"),
        ({"k": torch.randn(64, 2, 16)}, r"k must have 4 dimensions .*\[64, 2, 16\]"),
        ({"q": torch.ones(1, 64, 2, 16, dtype=torch.int32)}, r"q must be .*but is Int"),
        ({"k": torch.randn(1, 64, 2, 16).half()}, r"k must have q's dtype (Float|BFloat16), but is Half"),
        ({"v": torch.randn(1, 64, 2, 16).double()}, r"v must have q's dtype (Float|BFloat16), but is Double"),
        ({"v": torch.randn(1, 64, 1, 16)}, r"k and v must have the same shape"),
        (
            {"k": torch.randn(1, 63, 2, 16), "v": torch.randn(1, 63, 2, 16)},
            r"k and v must have at least q's seqlen, .* but q is \[1, 64, 2, 16\] and k \[1, 63, 2, 16\]",
        ),
        (
            {"k": torch.randn(2, 64, 2, 16), "v": torch.randn(2, 64, 2, 16)},
            r"k and v must have q's batch and head_dim",
        ),
        (
            {"k": torch.randn(1, 64, 2, 8), "v": torch.randn(1, 64, 2, 8)},
            r"k and v must have q's batch and head_dim",
        ),
        (
            {"q": torch.randn(1, 64, 3, 16)},
            r"heads of q must be a positive multiple of those of k and v, but are 3 and 2",
        ),
        ({"k": torch.randn(1, 64, 0, 16), "v": torch.randn(1, 64, 0, 16)}, r"heads of q must be a positive multiple"),
        ({x: torch.randn(1, 64, 2, 0) for x in "qkv"}, r"head_dim must be at least 1, but is 0"),
        ({"wrap": True, "v": torch.randn(1, 64, 1, 16)}, r"k and v must have the same shape, but are \[1, 64, 2, 16\]"),
        ({x: torch.randn(1, 0, 2, 16) for x in "qkv"}, r"seqlen must be at least 1"),
        (
            {"q": torch.randn(1, 64, 16, 2).transpose(2, 3)},
            r"q's last dimension must be contiguous .* stride 2",
        ),
        (
            {"v": torch.randn(1, 64, 16, 2).transpose(2, 3)},
            r"v's last dimension must be contiguous .* stride 2",
        ),
        ({"group_size": 15}, r"group_size must be a positive even number, but is 15"),
        ({"group_size": 0}, r"group_size must be a positive even number, but is 0"),
        ({"group_size": -2}, r"group_size must be a positive even number, but is -2"),
        ({"first_shifted_head": 3}, r"first_shifted_head must be from 0 to .* 2, but is 3"),
        ({"first_shifted_head": -1}, r"first_shifted_head must be from 0 to .* 2, but is -1"),
        ({"scale": float("nan")}, r"scale must be finite and not negative, but is nan"),
        ({"scale": float("inf")}, r"scale must be finite and not negative, but is inf"),
        ({"doc_start": DOCUMENTS[:, :63]}, r"doc_start must have shape .*\[1, 64\], but is \[1, 63\]"),
        ({"doc_start": DOCUMENTS[0]}, r"doc_start must have shape .*\[1, 64\], but is \[64\]"),
        ({"doc_start": DOCUMENTS.long()}, r"doc_start must be int32, but is Long"),
        ({"wrap": True, "group_size": 48}, r"wrap=True needs a seqlen divisible by .* 64 and 48"),
        ({"wrap": True, "doc_start": DOCUMENTS}, r"wrap=True takes no doc_start"),
        ({"wrap": True, "group_size": 1}, r"wrap=True needs a seqlen divisible by an even group_size"),
        ({"wrap": True, "first_shifted_head": 3}, r"first_shifted_head must be from 0 to .* 2, but is 3"),
        ({"wrap": True, "q": torch.randn(1, 64, 3, 16)}, r"heads of q must be a positive multiple .* 3 and 2"),
        (
            {"wrap": True, "k": torch.randn(1, 80, 2, 16), "v": torch.randn(1, 80, 2, 16)},
            r"wrap=True needs as many keys as queries, but they are 80 and 64",
        ),
        ({"window": 0}, r"window must be at least 1 token, but is 0"),
        ({"window": -5, "sink": True}, r"window must be at least 1 token, but is -5"),
        ({"window": 0, "wrap": True}, r"window must be at least 1 token, but is 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named(device: str, change: dict, message: str) -> None:
    q, k, v = Problem().tensors()
    arguments = {"q": q, "k": k, "v": v, "group_size": 16} | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):  # those above were made before there was a device
            arguments[name] = value.to(device, default_dtype() if value.dtype == torch.float32 else value.dtype)
    with pytest.raises(RuntimeError, match=f"^s2attn: .*{message}"):
        s2attn(**arguments)


@pytest.mark.only("cpu", "looking at values would wait for a GPU; there they are clamped")
@pytest.mark.parametrize(
    ("doc_start", "message"),
    [
        (with_value(DOCUMENTS, 10, 11), r"doc_start\[0, 10\] is 11, but must be 10 .*or 0"),
        (with_value(DOCUMENTS, 10, -1), r"doc_start\[0, 10\] is -1"),
        (with_value(with_value(DOCUMENTS, 10, 10), 20, 5), r"doc_start\[0, 20\] is 5"),
        (with_value(DOCUMENTS, 0, 1), r"doc_start\[0, 0\] is 1, but must be at most 0, the key of the first query"),
    ],
    ids=["future", "negative", "back", "first"],
)
def test_wrong_value_of_doc_start_is_named(doc_start: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^s2attn: .*{message}"):
        s2attn(*Problem().tensors(), 16, doc_start)


@pytest.mark.only("cpu", "looking at values would wait for a GPU; there they are clamped")
def test_wrong_value_of_doc_start_of_the_last_queries_is_named() -> None:
    q, k, v = Problem(seqlen=64, seqlen_k=100).tensors()
    s2attn(q, k, v, 16, with_value(DOCUMENTS, 10, 46))
    for index, value, message in [
        (0, 37, r"doc_start\[0, 0\] is 37, but must be at most 36"),
        (10, 45, r"doc_start\[0, 10\] is 45, but must be 46 .*or 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"^s2attn: {message}"):
            s2attn(q, k, v, 16, with_value(DOCUMENTS, index, value))


@pytest.mark.only("cpu", "looking at values would wait for a GPU; such rows see no sink there")
def test_sink_of_a_document_that_began_before_the_keys_is_refused() -> None:
    before = with_value(DOCUMENTS, 0, -3)
    s2attn(*Problem().tensors(), 16, before)
    with pytest.raises(RuntimeError, match=r"^s2attn: sink=True needs the first token .*doc_start\[0, 0\] is -3: pass"):
        s2attn(*Problem().tensors(), 16, before, sink=True)


def test_devices_must_agree() -> None:
    q, k, v = Problem().tensors()
    with pytest.raises(RuntimeError, match="k must be on q's device"):
        s2attn(q, k.to("meta"), v.to("meta"), 16)


@pytest.mark.only("cpu", "other devices")
@pytest.mark.filterwarnings("ignore:s2attn runs by torch")
@pytest.mark.parametrize("elsewhere", ["cuda", "xpu"])
def test_where_there_are_no_kernels_it_runs_by_torch(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without CUDA kernels, another device; test_strided.py shows what it computes then."""
    seen = []
    monkeypatch.setattr("longlora_ext._attend._why_unsupported", why_unsupported)
    monkeypatch.setattr("longlora_ext._attend.strided", lambda q, *_: seen.append(q.device.type) or (q, None))
    with torch._subclasses.FakeTensorMode():
        s2attn(*(torch.empty(1, 64, 2, 16, device=elsewhere) for _ in range(3)), 16)
    assert seen == [elsewhere]


def test_unknown_device_is_named() -> None:
    """What has no kernel is torch's to refuse, naming the op and the backend."""
    q, k, v = (x.to_sparse() for x in Problem().tensors())
    with pytest.raises((RuntimeError, NotImplementedError), match=r"longlora::s2attn|[Ss]parse"):
        s2attn(q, k, v, 16)


def test_wrong_types_are_torchs_to_refuse() -> None:
    q, k, v = Problem().tensors()
    with pytest.raises((RuntimeError, TypeError), match="group_size"):
        s2attn(q, k, v, 16.5)  # type: ignore[arg-type]


def test_kernels_take_no_negative_scale() -> None:
    q, k, v = Problem().tensors()
    with pytest.raises(RuntimeError, match=r"^s2attn: scale must be finite and not negative, but is -0.25"):
        torch.ops.longlora.s2attn_fwd(q, k, v, 16, 1, None, -0.25, False)


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
def test_backward_checks_its_own_arguments(name: str) -> None:
    q, k, v = Problem().tensors()
    out, lse = torch.ops.longlora.s2attn_fwd(q, k, v, 16, 1, None, 0.25, False)
    arguments = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": lse}
    arguments[name] = arguments[name][:, :1]
    with pytest.raises(RuntimeError, match=f"^s2attn: {name} must"):
        torch.ops.longlora.s2attn_bwd(
            **arguments, group_size=16, first_shifted_head=1, doc_start=None, scale=0.25, deterministic=False
        )
