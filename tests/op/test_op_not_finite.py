"""Values that are not finite show in all that sees them, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longlora_ext import s2attn
from longlora_ext.reference import s2attn_mask, s2attn_reference
from op_checks import (
    DTYPES,
    Problem,
    outputs_and_grads,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float, dtype: torch.dtype) -> None:
    """An overflow before attention must not vanish in it: the rows that see it become NaN, where the reference's do.

    That is computed in fp32: torch's own product of bfloat16 spreads a NaN on processors with AMX.
    """
    q, k, v = Problem(seqlen=20, group_size=40, dtype=dtype).tensors()
    k[:, 5] = value
    out = s2attn(q.abs(), k, v, 40, first_shifted_head=2)
    wide = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q.abs(), k, v))
    expected, _ = s2attn_reference(*wide, 40, first_shifted_head=2)
    assert expected[:, 5:].isnan().all() and torch.equal(out.isnan(), expected.isnan())


def not_finite(attend: Callable[..., Tensor], inputs: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Which rows of the result and the gradients are not finite, by head; other rows of the batch and KV heads are."""
    out, *gradients = outputs_and_grads(attend, *inputs.values())
    broken = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    broken = {name: ~x.isfinite().all(dim=-1) for name, x in broken.items()}

    for name, there in broken.items():
        of_the_kv_head = 1 if name in ("dk", "dv") else 2
        assert not there[1].any() and not there[:, :, of_the_kv_head:].any(), name
    assert where != "dout" or not broken["out"].any()
    assert where != "v" or not broken["dv"].any()
    return broken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_what_is_not_finite_shows_where_it_is_seen(where: str, value: float, dtype: torch.dtype) -> None:
    """And may show in others that share a tile, earlier ones and of other documents, by way of 0 * NaN; but in no other
    row of the batch and no other KV head."""
    problem = Problem(batch=2, seqlen=300, heads=4, kv_heads=2, group_size=64, documents=True, dtype=dtype)
    doc_start = problem.doc_start()
    inputs = dict(zip("qkv", problem.tensors(), strict=True)) | {"dout": problem.tensors()[0]}
    token, batch, head = 150, 0, 0
    inputs[where][batch, token, head] = value
    broken = not_finite(lambda *qkv: s2attn(*qkv, 64, doc_start), inputs, where)
    for query_head in (0, 1):  # those of the first KV head; neither is shifted
        sees = s2attn_mask(300, 64, False, doc_start)[batch]  # [rows, keys]
        rows = sees[:, token] if where in "kv" else torch.arange(300) == token
        if where in ("q", "dout") and query_head != head:
            continue
        keys = sees[rows].any(dim=0)
        if where != "dout":
            assert broken["out"][batch, rows, query_head].all()
        assert broken["dq"][batch, rows, query_head].all()
        assert broken["dk"][batch, keys, 0].all()
        assert where == "v" or broken["dv"][batch, keys, 0].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_what_is_not_finite_shows_by_way_of_the_sink(where: str, value: float, dtype: torch.dtype) -> None:
    """A document's first key and value reach all rows of it, and each of these reaches their gradients."""
    problem = Problem(batch=2, seqlen=400, heads=4, kv_heads=2, group_size=32, dtype=dtype)
    first = 200  # of the second document
    doc_start = torch.where(torch.arange(400) < first, 0, first).to(torch.int32).expand(2, -1).contiguous()
    inputs = dict(zip("qkv", problem.tensors(), strict=True)) | {"dout": problem.tensors()[0]}
    if where == "q":
        inputs["k"].abs_()  # an infinite score of the sink that is minus infinity weighs nothing
    row = first if where in "kv" else 390  # whose group begins far behind the sink
    inputs[where][0, row, 0] = value
    broken = not_finite(lambda *qkv: s2attn(*qkv, 32, doc_start, sink=True, window=9), inputs, where)
    rows = slice(first, None) if where in "kv" else row
    keys = slice(first, None) if where in "kv" else [first, *range(384, 391)]
    assert where == "dout" or broken["out"][0, rows, 0].all()
    assert broken["dq"][0, rows, 0].all()
    assert broken["dk"][0, keys, 0].all()
    assert where == "v" or broken["dv"][0, keys, 0].all()
