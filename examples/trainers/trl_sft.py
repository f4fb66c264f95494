"""Extend a model's context with TRL's SFTTrainer, which packs documents itself: `python examples/trainers/trl_sft.py`

It extends the tiny Llama from 256 to 1024 tokens on source code that every Python has, and saves an adapter. A dataset
of conversations (a column `messages`) works alike; `assistant_only_loss=True` then learns from the answers alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from longlora_ext import check_documents_apart, extend_config, lora_config, prepare_model, save_adapter, tile_loss

MODEL = Path(__file__).parents[1] / "tiny_llama"
TEXT = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
CONTEXT_LENGTH = 1024
STEPS = 20


def train(folder: str, dataset: Dataset, tokenizer: Any, **options: Any) -> SFTTrainer:
    """Train an adapter on a dataset of TRL's, and save it. `options` are those of `SFTConfig`."""
    set_seed(0)
    config = extend_config(AutoConfig.from_pretrained(MODEL), CONTEXT_LENGTH, rope_type="yarn", sink=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL, config=config, attn_implementation="s2attn")
    model = prepare_model(base, lora_config(base))  # not TRL's peft_config: embedding and norms are to train in fp32
    tile_loss(model)
    check_documents_apart(model)
    args = SFTConfig(
        output_dir=folder,
        max_length=CONTEXT_LENGTH,
        packing=True,  # documents share rows, told apart by position_ids
        packing_strategy="bfd_split",  # of a document that is longer nothing is dropped
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        warmup_steps=2,
        bf16=torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        **options,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    save_adapter(model, folder, tokenizer)
    return trainer


def main(folder: str = "trl_adapter") -> None:
    """Train on text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    dataset = Dataset.from_list([{"text": file.read_text(encoding="utf-8")} for file in TEXT])
    train(folder, dataset, tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
