"""Train the tiny Llama that the examples start from, from nothing, on text that every Python has.

The result is a complete model folder of less than 8 MB: a byte-level BPE tokenizer, a Llama of 3.5 million
parameters with a context of 256 tokens, the training log and a model card. It is what `examples/tiny_llama`
holds, and what `finetune_llama.py` extends to a longer context. It is a model to test and to learn with,
not one to use.

    python examples/train_tiny_llama.py --output_dir my_tiny_llama

takes 10 to 25 minutes on two CPU cores, and about twice that with `--fp32` or where bfloat16 is slow. An
interrupted run goes on from its last checkpoint when it is started again with the same arguments. With the
same seed, machine and number of threads the weights come out the same. A shorter try, of a minute or two:

    python examples/train_tiny_llama.py --output_dir /tmp/tiny --max_steps 60
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub

import app.runs.launch  # noqa: F401  isort: skip  (must come first: sets variables that libraries read at import)
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from app.inputs.corpus import sha256_of_texts, stdlib_documents
from app.runs.checkpoints import CompletionMarker, find_resumable, remove_incomplete, take_over_rotation
from app.runs.command_line import Parser, as_program
from app.runs.errors import one_clear_error
from app.runs.json_files import write_json
from app.runs.launch import fail
from longlora_ext._folders import appearing

CONTEXT_LENGTH = 256
EVAL_LENGTHS = (256, 512, 1024)
MAX_BYTES = 8_000_000
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

CARD = """\
# A tiny Llama to test with

{parameters:,} parameters, context {context} tokens, trained from scratch by `examples/train_tiny_llama.py`
on the standard library of CPython {python} ({train_tokens:,} tokens of source code and of the language
reference; one twelfth, chosen by module name, is held out: see `examples/app/inputs/corpus.py`). It has
learned what Python source looks like, and nothing else. It exists so that the examples and tests of this
project run everywhere in minutes, without a download or a GPU. Do not use it for anything else.

- Architecture: `LlamaForCausalLM`, {layers} layers, hidden size {hidden}, {heads} heads on {kv_heads} KV
  heads of {head_dim} dimensions, RoPE theta 10000, tied embeddings. The weights are stored in bfloat16 and
  load as float32.
- Tokenizer: byte-level BPE, {vocab:,} tokens, trained on the same text. It can encode any bytes, adds nothing
  to a text, and `{end_of_text}` separates documents.
- Training: {steps:,} steps of {batch} x {context} tokens, seed {seed}, {minutes:.0f} minutes{resumed}; the loss
  curve, the versions and the corpus' SHA-256 are in `training_log.json`.

Perplexity of the stored weights on held-out documents, in windows of the given number of tokens, with dense
attention:

| tokens | RoPE unscaled | RoPE scaled x4, not trained |
|---|---|---|
{table}

It does not extrapolate beyond its {context} tokens, and scaling RoPE alone does not help.
`examples/finetune_llama.py` extends it.

The text it was trained on is part of CPython, under the PSF License Agreement. The model has the licence of
this project.
"""


class Windows(Dataset):
    """`count` windows of `length` tokens out of one stream; every pass over it is cut at another offset."""

    def __init__(self, stream: torch.Tensor, length: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts: list[int] = []
        while len(starts) < count:
            offset = int(torch.randint(length, (), generator=generator))
            blocks = torch.arange(offset, len(stream) - length, length)
            starts += blocks[torch.randperm(len(blocks), generator=generator)].tolist()
        self.stream, self.length, self.starts = stream, length, starts[:count]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.stream[self.starts[index] : self.starts[index] + self.length]
        return {"input_ids": window, "labels": window}


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `vocab_size` tokens, 256 bytes and two special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3.5 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[torch.Tensor]:
    """Each document's tokens, with the end-of-text token after the last."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def held_out_windows(encoded: list[torch.Tensor], length: int, count: int) -> torch.Tensor:
    """At most `count` windows [count, length], none across two documents, spread evenly over them."""
    windows = torch.cat([tokens[: len(tokens) // length * length].view(-1, length) for tokens in encoded])
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, windows: torch.Tensor, length: int) -> float:
    """Perplexity of `windows` [count, n] where the model sees pieces of `length` tokens of them."""
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.double()
        for batch in windows.reshape(-1, length).split(max(1, 4096 // length))
    ]
    return math.exp(torch.stack(losses).mean())


def evaluate(folder: Path, windows: torch.Tensor) -> dict[str, dict[str, float]]:
    """Perplexities of the model stored in `folder`: as it is, and with RoPE scaled to the longest length."""
    result: dict[str, dict[str, float]] = {}
    for name, factor in (("unscaled", 1.0), ("scaled_x4", max(EVAL_LENGTHS) / CONTEXT_LENGTH)):
        config = LlamaConfig.from_pretrained(folder)
        if factor != 1:
            config.rope_parameters = dict(config.rope_parameters or {}, rope_type="linear", factor=factor)
        model = LlamaForCausalLM.from_pretrained(folder, config=config).eval()
        result[name] = {str(length): round(perplexity(model, windows, length), 3) for length in EVAL_LENGTHS}
    return result


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (in bfloat16), config and tokenizer so that plain transformers loads them."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Half the size on disk, full precision in use: dtype "auto" means float32 for this model.
    _edit_json(folder / "config.json", dtype="float32", use_cache=True)
    # The class name that every version of transformers knows.
    _edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"model.safetensors has {size:,} bytes, and at most {MAX_BYTES:,} may be shipped")


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="the model folder to write; it must not exist yet")
    add("--max_steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="windows of 256 tokens in a step (default: %(default)s)")
    add("--learning_rate", type=float, default=3e-3, help="the highest rate, of AdamW (default: %(default)s)")
    add("--vocab_size", type=int, default=2048, help="tokens in the vocabulary (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    add("--fp32", action="store_true", help="compute in float32; the default is bfloat16 autocast")
    add("--save_steps", type=int, default=200, help="steps between two checkpoints (default: %(default)s)")
    add("--max_documents", type=int, help="use only so many documents of each part (for a quick try)")
    add("--eval_windows", type=int, default=64, help="held-out windows of 1024 tokens (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    for name in ("max_steps", "batch_size", "save_steps", "max_documents", "eval_windows"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, and must be at least 1")
    if not 300 <= parsed.vocab_size <= 4096:
        parser.error(f"--vocab_size is {parsed.vocab_size}, and must be from 300 (all bytes and more) to 4096")
    if parsed.output_dir.exists():
        parser.error(f"--output_dir {parsed.output_dir} exists, and nothing is overwritten: choose another")
    return parsed


def partial_folder(options: argparse.Namespace) -> Path:
    """The folder of the unfinished run, next to the output; it belongs to one set of arguments."""
    folder = options.output_dir.with_name(options.output_dir.name + ".partial")
    wanted = {name: value for name, value in sorted(vars(options).items()) if name != "output_dir"}
    record = folder / "arguments.json"
    if record.exists() and (found := json.loads(record.read_text())) != wanted:
        fail(f"{folder} holds an unfinished run with other arguments; remove it first: {found}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, wanted)
    return folder


@as_program("train_tiny_llama.py")
def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with one_clear_error(only=FileNotFoundError):
        train_documents, held_out_documents = (part[: options.max_documents] for part in stdlib_documents())
    partial = partial_folder(options)
    started = time.time()

    transformers.set_seed(options.seed)
    tokenizer = train_tokenizer(train_documents, options.vocab_size)
    stream = torch.cat(encode(tokenizer, train_documents))
    held_out = held_out_windows(encode(tokenizer, held_out_documents), max(EVAL_LENGTHS), options.eval_windows)
    if not len(held_out) or len(stream) < 2 * CONTEXT_LENGTH:
        fail(f"--max_documents {options.max_documents} leaves too little text; allow more documents")
    model = new_model(tokenizer)
    windows = options.max_steps * options.batch_size
    print(
        f"{model.num_parameters():,} parameters; {len(stream):,} training tokens in {len(train_documents)} "
        f"documents, read {windows * CONTEXT_LENGTH / len(stream):.1f} times",
        flush=True,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(partial),
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, options.max_steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=True,  # so that the result is the same with and without a GPU
            bf16=not options.fp32,
            logging_steps=min(20, options.max_steps),
            save_steps=options.save_steps,
            save_total_limit=2,
            seed=options.seed,
            report_to="none",
        ),
        train_dataset=Windows(stream, CONTEXT_LENGTH, windows, options.seed),
    )
    trainer.add_callback(CompletionMarker(take_over_rotation(trainer.args), dict))
    remove_incomplete(partial)
    checkpoint = find_resumable("latest", partial)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    with appearing(options.output_dir) as finished:
        save(model, tokenizer, finished)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        log = {
            "perplexity": evaluate(finished, held_out),
            "perplexity_windows": len(held_out),
            "arguments": json.loads((partial / "arguments.json").read_text()),
            "parameters": model.num_parameters(),
            "train_tokens": len(stream),
            "train_sha256": sha256_of_texts(train_documents),
            "held_out_sha256": sha256_of_texts(held_out_documents),
            "seconds": round(time.time() - started),
            "resumed_from": checkpoint and checkpoint.name,
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "loss": [{"step": entry["step"], "loss": round(float(entry["loss"]), 4)} for entry in history],
        }
        (finished / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
        (finished / "README.md").write_text(model_card(model, log))
    print(json.dumps(log["perplexity"], indent=1))
    print(f"wrote {options.output_dir}; the checkpoints are still in {partial}")


def model_card(model: LlamaForCausalLM, log: dict) -> str:
    config, arguments, found = model.config, log["arguments"], log["perplexity"]
    columns = [[f"{found[name][str(length)]:.1f}" for length in EVAL_LENGTHS] for name in found]
    rows = zip(map(str, EVAL_LENGTHS), *columns, strict=True)
    return CARD.format(
        parameters=log["parameters"],
        context=CONTEXT_LENGTH,
        python=log["versions"]["python"],
        train_tokens=log["train_tokens"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        end_of_text=END_OF_TEXT,
        steps=arguments["max_steps"],
        batch=arguments["batch_size"],
        seed=arguments["seed"],
        minutes=log["seconds"] / 60,
        resumed=f" from {log['resumed_from']} on" if log["resumed_from"] else "",
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
    )


if __name__ == "__main__":
    main()
