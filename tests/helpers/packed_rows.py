"""Rows with padding and with packed documents, in every way that models are told."""

import torch
from transformers import DataCollatorWithFlattening

from tiny_models import tokens


def packed(lengths: list[int], **options: object) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    documents = [tokens(1, length, seed=length) for length in lengths]
    features = [{"input_ids": document[0].tolist()} for document in documents]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    batch.pop("labels")
    return batch, documents


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids, masks = [], []
    for row in rows:
        missing = longest - row.shape[1]
        widths = (missing, 0) if side == "left" else (0, missing)
        ids.append(torch.nn.functional.pad(row, widths))
        masks.append(torch.nn.functional.pad(torch.ones_like(row), widths))
    return torch.cat(ids), torch.cat(masks)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
