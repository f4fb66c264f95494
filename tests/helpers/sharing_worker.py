"""One of four processes, two of which share each sequence, that ask a Trainer for the loss of five rows.

    torchrun --nproc_per_node 4 tests/helpers/sharing_worker.py RESULT.json

The first one writes what it found, for test_sharing_trainer.py to judge.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, TrainingArguments

from longlora_ext.data import PackedSequences, pad_rows
from longlora_ext.parallel import SequenceParallelTrainer
from small_decoders import small_config
from tiny_models import VOCABULARY, tiny_model

LENGTHS, BATCH = (31, 9, 24, 5, 17), 2


def rows() -> PackedSequences:
    """Documents of unequal lengths, each a row of its own."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    return PackedSequences(documents, 32, 0, own_rows=True)


def model() -> Any:
    """The same in every process."""
    return tiny_model(dtype=torch.float32)


def trainer(model: Any, size: int = 2, **arguments: Any) -> SequenceParallelTrainer:
    """One in which so many processes share each sequence."""
    args = TrainingArguments(
        output_dir="unused",
        report_to="none",
        use_cpu=True,
        per_device_eval_batch_size=BATCH,
        disable_tqdm=True,
        **arguments,
    )
    collate = partial(pad_rows, pad_token_id=0)
    return SequenceParallelTrainer(
        model=model, args=args, eval_dataset=rows(), data_collator=collate, sequence_parallel_size=size
    )


def refusal(kind: str) -> str:
    """What a Trainer says of a model of this type."""
    hybrid = AutoModelForCausalLM.from_config(small_config(kind), attn_implementation="s2attn")
    try:
        trainer(hybrid)
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    """Write what was found."""
    sharing = trainer(model(), prediction_loss_only=True)
    found: dict[str, Any] = {
        "evaluate": sharing.evaluate()["eval_loss"],
        "predict": sharing.predict(rows()).metrics["test_loss"],
        "falcon_h1": refusal("falcon_h1"),
    }
    try:
        trainer(model()).predict(rows())
    except ValueError as error:
        found["logits"] = str(error)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
