"""The whole of it in one file to copy: extend the context of a model, train it, save it, load it, use it.

    python examples/minimal.py            # about half a minute on two CPU cores
    python examples/minimal.py FOLDER     # where to write the adapter, in place of minimal_adapter
    torchrun --nproc_per_node 2 examples/minimal.py      # on two GPUs; by python set CUDA_VISIBLE_DEVICES=0

It extends the tiny Llama of this folder from 256 to 1024 tokens, on source code that every Python has. For a model and
a text of your own, change the names in capitals. finetune_llama.py does the same with everything that a long run needs:
checkpoints, several GPUs, many formats of text, an evaluation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from longlora_ext.adapter import load, lora_config, prepare_model, save_adapter
from longlora_ext.config import extend_config
from longlora_ext.data import PackedSequences
from longlora_ext.independence import check_documents_apart
from longlora_ext.loss import tile_loss

MODEL = Path(__file__).parent / "tiny_llama"
TEXT = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]  # modules of the standard library, a document each
CONTEXT_LENGTH = 1024
STEPS = 20


def train(folder: str) -> None:
    """Extend the model's context, train an adapter for it, and save that."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # Positions are scaled in the config, before the model is built. In training a token sees its group and the
    # first token of its document, on which pretrained models rest.
    config = extend_config(AutoConfig.from_pretrained(MODEL), CONTEXT_LENGTH, rope_type="yarn", sink=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL, config=config, attn_implementation="s2attn")
    # LoRA on the attention; embedding and norms are trained too, which a longer context needs.
    model = prepare_model(base, lora_config(base))
    tile_loss(model)  # the logits of a long sequence would take more memory than all else
    check_documents_apart(model)  # or an error: packed documents must not see each other

    documents = [tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"] for file in TEXT]
    ended = [[*document, tokenizer.eos_token_id] for document in documents]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            warmup_steps=2,
            bf16=torch.cuda.is_available(),
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=PackedSequences(ended, CONTEXT_LENGTH, pad_token_id=tokenizer.eos_token_id),
    )
    trainer.train()  # in groups: a module in training mode computes S2-Attn
    save_adapter(model, folder, tokenizer)


def use(folder: str) -> str:
    """Continue a text that is longer than the model could read before."""
    model: Any = load(folder)  # the extended model, in eval mode: its attention is dense
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT[0].read_text(encoding="utf-8"), verbose=False, return_tensors="pt")["input_ids"]
    prompt = tokens[:, : CONTEXT_LENGTH - 32].to(model.device)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False)
    read = prompt.shape[1]
    return f"after {read} tokens of {TEXT[0].name} it goes on: {tokenizer.decode(output[0, read:])!r}"


def main(folder: str = "minimal_adapter") -> None:
    if Path(folder).exists():
        sys.exit(f"{folder} exists, and nothing is overwritten: name another folder")
    set_seed(0)
    train(folder)
    print(use(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
