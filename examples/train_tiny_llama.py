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
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub

import app.runs.launch  # noqa: F401  isort: skip  (must come first: sets variables that libraries read at import)
import torch
import transformers
from transformers import Trainer, TrainingArguments

from app.inputs.corpus import sha256_of_texts, stdlib_documents
from app.runs.checkpoints import CompletionMarker, find_resumable, remove_incomplete, take_over_rotation
from app.runs.command_line import Parser, as_program
from app.runs.errors import one_clear_error
from app.runs.json_files import write_json
from app.runs.launch import fail
from app.tiny.card import model_card
from app.tiny.model import CONTEXT_LENGTH, new_model, save, train_tokenizer
from app.tiny.text import EVAL_LENGTHS, Windows, encode, evaluate, held_out_windows
from longlora_ext._folders import appearing


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


if __name__ == "__main__":
    main()
