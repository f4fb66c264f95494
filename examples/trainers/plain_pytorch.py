"""Extend a model's context in a loop of your own, with torch alone: `python examples/trainers/plain_pytorch.py`

It extends the tiny Llama from 256 to 1024 tokens on source code that every Python has, and saves an adapter.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from longlora_ext import check_documents_apart, extend_config, lora_config, prepare_model, save_adapter, tile_loss
from longlora_ext.data import PackedSequences

MODEL = Path(__file__).parents[1] / "tiny_llama"
TEXT = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
CONTEXT_LENGTH = 1024
STEPS = 20


def main(folder: str = "plain_adapter") -> list[float]:
    """Train, save, and return the loss of each step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = extend_config(AutoConfig.from_pretrained(MODEL), CONTEXT_LENGTH, rope_type="yarn", sink=True)
    base = AutoModelForCausalLM.from_pretrained(
        MODEL, config=config, dtype=dtype, attn_implementation="s2attn", device_map=device
    )
    model = prepare_model(base, lora_config(base))
    tile_loss(model)
    check_documents_apart(model)
    model.train()  # S2-Attn; in eval mode attention is dense

    documents = [tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"] for file in TEXT]
    sequences = PackedSequences(documents, CONTEXT_LENGTH, pad_token_id=tokenizer.eos_token_id)
    rows = DataLoader(sequences, batch_size=1, shuffle=True)  # input_ids, labels, and position_ids that tell documents
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

    losses: list[float] = []
    while len(losses) < STEPS:
        for row in rows:
            loss = model(**{name: tensor.to(device) for name, tensor in row.items()}, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {len(losses)}: loss {losses[-1]:.3f}")
            if len(losses) == STEPS:
                break
    save_adapter(model, folder, tokenizer)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
