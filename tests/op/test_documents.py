"""doc_start from what trainers have."""

import pytest
import torch

from longlora_ext import doc_start_from_cu_seqlens, doc_start_from_mask, doc_start_from_position_ids

pytestmark = pytest.mark.usefixtures("device")
looks_at_values = pytest.mark.only("cpu", "on a GPU a device-side assertion says so, which ends the process")


def test_position_ids() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [5, 6, 7, 8, 9, 10, 11]])
    expected = [[0, 0, 0, 3, 3, 5, 6], [0, 0, 0, 0, 0, 0, 0]]
    doc_start = doc_start_from_position_ids(position_ids)
    assert doc_start.dtype == torch.int32 and doc_start.tolist() == expected


def test_position_ids_of_left_padding() -> None:
    """transformers fills the padding's positions with a constant: each such token is alone."""
    assert doc_start_from_position_ids(torch.tensor([[1, 1, 1, 0, 1, 2]])).tolist() == [[0, 1, 2, 3, 3, 3]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mask(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 2, 2, 2], [0, 0, 0, 3, 3], [0, 1, 1, 3, 3], [0] * 5, [0] * 5]
    assert doc_start_from_mask(mask.to(dtype)).tolist() == expected


@looks_at_values
def test_mask_with_a_hole_is_refused() -> None:
    with pytest.raises(ValueError, match="padding between tokens is not supported, but row 1 has 2 runs"):
        doc_start_from_mask(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]))


@looks_at_values
def test_mask_with_a_hole_is_refused_when_compiled() -> None:
    compiled = torch.compile(doc_start_from_mask, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([[0, 1, 1, 0]])).tolist() == [[0, 1, 1, 3]]
    with pytest.raises(RuntimeError, match="padding between tokens"):
        compiled(torch.tensor([[1, 0, 1, 0]]))


def test_cu_seqlens() -> None:
    doc_start = doc_start_from_cu_seqlens(torch.tensor([0, 3, 3, 5, 9], dtype=torch.int32), 9)
    assert doc_start.dtype == torch.int32 and doc_start.tolist() == [[0, 0, 0, 3, 3, 5, 5, 5, 5]]


@looks_at_values
@pytest.mark.parametrize(
    ("cu_seqlens", "seqlen"),
    [
        # The boundaries that the original makes of L = 4274 and G = 2048: they run back.
        ([0, 2048, 4096, 4274, 5298, 7346, 9394, 8548], 8548),
        ([1, 5], 5),
        ([0, 3, 5], 6),
    ],
)
def test_wrong_cu_seqlens_are_refused(cu_seqlens: list[int], seqlen: int) -> None:
    with pytest.raises(
        ValueError, match=rf"cu_seqlens must begin with 0, .* length {seqlen}, but is \[{cu_seqlens[0]}, "
    ):
        doc_start_from_cu_seqlens(torch.tensor(cu_seqlens), seqlen)


def test_rank_of_cu_seqlens_is_checked() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \[documents \+ 1\], but is \[1, 2\]"):
        doc_start_from_cu_seqlens(torch.tensor([[0, 5]]), 5)


@looks_at_values
def test_additive_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must hold 0 and 1, but holds \[-inf, 0.0\]"):
        doc_start_from_mask(torch.tensor([[float("-inf"), 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool], ids=str)
def test_dtype_of_position_ids_is_checked(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="position_ids must be int32 or int64, but is"):
        doc_start_from_position_ids(torch.zeros(1, 4, dtype=dtype))


@pytest.mark.parametrize("function", [doc_start_from_position_ids, doc_start_from_mask])
def test_rank_is_checked(function) -> None:
    with pytest.raises(ValueError, match=r"must have shape \[batch, seqlen\], but is \[5\]"):
        function(torch.arange(5))
