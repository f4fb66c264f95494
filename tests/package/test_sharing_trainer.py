"""The Trainer whose processes share sequences: which rows count, and which models it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune_runs import found_by
from longlora_ext.data import pad_rows
from sharing_worker import BATCH, LENGTHS, model, rows, trainer


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("sharing_worker.py", tmp_path_factory.mktemp("sharing"), processes=4)


def loss_of_one_process() -> float:
    """The mean over rows of their batches' losses, as a Trainer has it that is alone."""
    alone, of_rows = model().eval(), []
    for begin in range(0, len(LENGTHS), BATCH):
        batch = pad_rows([rows()[row] for row in range(begin, min(begin + BATCH, len(LENGTHS)))], pad_token_id=0)
        with torch.no_grad():
            loss = alone(**batch, use_cache=False).loss.item()
        of_rows += [loss] * len(batch["input_ids"])
    return sum(of_rows) / len(of_rows)


def test_rows_that_fill_up_the_last_batch_are_not_in_its_loss(found: dict[str, Any]) -> None:
    """Five rows in batches of two, for two groups of processes: three are repeated."""
    assert found["evaluate"] == pytest.approx(loss_of_one_process(), rel=1e-5)


def test_a_test_set_is_shared_as_well(found: dict[str, Any]) -> None:
    assert found["predict"] == pytest.approx(found["evaluate"], rel=1e-6)
    assert "predict their loss alone: set prediction_loss_only=True" in found["logits"]


def test_models_that_mix_tokens_beside_their_attention_are_refused(found: dict[str, Any]) -> None:
    """Falcon-H1 has both in each layer: all layers asked the others, and the loss was wrong without a word."""
    assert "the sequences of FalconH1ForCausalLM cannot be shared: " in found["falcon_h1"]


def test_a_process_that_is_alone_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match="start the program by torchrun or deepspeed"):
        trainer(model(), size=1)
