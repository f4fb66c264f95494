"""`doc_start`: the one description of documents that the op understands, made from what trainers have.

`doc_start` is int32 [batch, seqlen] and holds, for each token, the index within its row of the first token of its
document. Two of them combine by `torch.maximum`: a token's document begins where the later of the two does.
None of these functions waits for a GPU.
"""

import torch
from torch import Tensor

__all__ = ["doc_start_from_cu_seqlens", "doc_start_from_mask", "doc_start_from_position_ids"]


def _from_begins(begins: Tensor) -> Tensor:
    """`begins` is bool [B, N], True where a document begins; the first token of a row always begins one."""
    index = torch.arange(begins.shape[1], device=begins.device, dtype=torch.int32)
    return torch.where(begins, index, 0).cummax(dim=1).values.to(torch.int32)


def _begins_where(changed: Tensor) -> Tensor:
    """[B, N - 1] comparisons of neighbours to [B, N] beginnings."""
    return torch.nn.functional.pad(changed, (1, 0), value=True)


def _check_2d(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape [batch, seqlen], but is {list(tensor.shape)}")


def check_zeros_and_ones(attention_mask: Tensor) -> None:
    """Raise `ValueError` if a mask holds anything but 0 and 1. On a GPU this stops the next synchronisation instead."""
    right = ((attention_mask == 0) | (attention_mask == 1)).all()
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(right, "attention_mask must hold 0 and 1")
    elif not right:
        raise ValueError(
            f"attention_mask must hold 0 and 1, but holds {attention_mask.unique()[:5].tolist()}; packed documents are "
            "told by position_ids"
        )


def doc_start_from_position_ids(position_ids: Tensor) -> Tensor:
    """Documents from positions: one begins wherever a position is not its predecessor's plus one.

    Args:
        position_ids: Integers [B, N]. Packed rows restart at every document; where counting starts does not matter, so
            a row in the middle of a long text is one document.

    Returns:
        int32 [B, N].

    Raises:
        ValueError: If `position_ids` is not two-dimensional, or not int32 or int64.
    """
    _check_2d("position_ids", position_ids)
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"position_ids must be int32 or int64, but is {position_ids.dtype}")
    return _from_begins(_begins_where(position_ids[:, 1:] != position_ids[:, :-1] + 1))


def doc_start_from_mask(attention_mask: Tensor) -> Tensor:
    """Documents from a padding mask: the tokens of a row are one, the padding before and after are others.

    Args:
        attention_mask: [B, N], bool or numbers; 1 marks a token, 0 padding, on either side.

    Returns:
        int32 [B, N].

    Raises:
        ValueError: If `attention_mask` is not two-dimensional, or (on a CPU, where looking costs nothing) holds other
            values than 0 and 1, or has padding between tokens. On a GPU either stops the next synchronisation with a
            device-side assertion.
    """
    _check_2d("attention_mask", attention_mask)
    check_zeros_and_ones(attention_mask)
    is_token = attention_mask != 0
    changed = is_token[:, 1:] != is_token[:, :-1]
    runs = is_token[:, 0] + (changed & is_token[:, 1:]).sum(dim=1)
    hole = "attention_mask must hold one unbroken run of tokens per row: padding between tokens is not supported"
    if is_token.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (runs > 1).nonzero()
        if len(bad):
            raise ValueError(f"{hole}, but row {int(bad[0])} has {int(runs[bad[0]])} runs")
    else:
        torch._assert_async((runs <= 1).all(), hole)
    return _from_begins(_begins_where(changed))


def doc_start_from_cu_seqlens(cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """Documents from FlashAttention's cumulative lengths, for one packed row.

    Args:
        cu_seqlens: Integers [documents + 1]: 0, then the end of each document.
        seqlen: N, the row's length, at which the last document ends.

    Returns:
        int32 [1, N].

    Raises:
        ValueError: If `cu_seqlens` is not one-dimensional, or (on a CPU, where looking costs nothing) does not begin
            with 0, decreases, or does not end at `seqlen`. On a GPU this stops the next synchronisation with a
            device-side assertion.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [documents + 1], but is {list(cu_seqlens.shape)}")
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == seqlen) & (cu_seqlens.diff() >= 0).all()
    wrong = f"cu_seqlens must begin with 0, never decrease and end at the row's length {seqlen}"
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        if not right:
            raise ValueError(f"{wrong}, but is {cu_seqlens.tolist()}")
    else:
        torch._assert_async(right, wrong)
    token = torch.arange(seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return cu_seqlens[document].to(torch.int32)[None]
