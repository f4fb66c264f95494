"""Evaluate a model with a long context: perplexity, passkey retrieval, one needle among several.

    python examples/evaluate.py perplexity --model MODEL --text books/
    python examples/evaluate.py --help

The program reads top to bottom: the options, the model, the task with its cells, the cells one by one, the result.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from app.runs import launch

from app.runs.launch import RANK, WORLD_SIZE, fail, launcher, say  # isort: skip  (first: it prepares what the libraries below look at)
from tqdm import tqdm

from app.evaluation.evaluation_folder import check_folder, claim, finish, finished, keep, kept
from app.evaluation.perplexity_task import SCORES, PerplexityTask
from app.evaluation.prompts import ADJECTIVES, NOUNS
from app.evaluation.retrieval_task import RetrievalTask
from app.models.use_model import add_model_options, add_scaling_options, check_model_options, open_model
from app.runs.command_line import HelpFormatter, Parser, as_program
from app.runs.errors import one_clear_error
from app.runs.processes import be_quiet, gathered, together
from app.runs.provenance import commit, versions
from longlora_ext._processes import on_first_process

DESCRIPTION = """\
Evaluate a base model, a merged model or an adapter on long texts.

  perplexity   with a sliding window over documents, at one or more window lengths
  passkey      find a pass key, over length of the text x depth of the key
  needles      the same with several codes in the text; the question is for one of them

Attention, RoPE, stride, prompts, dtype and versions are printed and saved with the result. A length beyond the one that
the model was trained on is an error unless you pass --beyond_trained_length. To resume a run that was killed, run the
same command. Under torchrun or deepspeed each process holds the whole model and does a part of the work.
"""

EXAMPLES = """\
examples:
  the tiny Llama that ships with the project, which fails beyond its 256 tokens:
    python examples/evaluate.py perplexity --lengths 256 512 1024 --beyond_trained_length

  an adapter on books (PG19: a folder of text files), at three lengths, on eight GPUs:
    torchrun --nproc_per_node 8 examples/evaluate.py perplexity --model finetuned/my-llama-32768/adapter \\
        --text pg19/test/ --lengths 2048 8192 32768

  to compare with the paper's tables, on the data of the original project:
    torchrun --nproc_per_node 8 examples/evaluate.py perplexity --model finetuned/my-llama-32768/adapter \\
        --text pg19/test.bin --lengths 2048 8192 32768 --score all

  what scaling RoPE alone does to a base model:
    python examples/evaluate.py perplexity --model my/llama --context_length 32768 --text pg19/test/

  pass keys over length x depth, ten trials each:
    python examples/evaluate.py passkey --model merged/ --lengths 4096 8192 16384 32768 --trials 10

`evaluate.py TASK --help` lists the options of a task. The output folder (default: evaluated/MODEL-TASK) holds
results.json, results.txt, settings.json and, for retrieval, heat_map.png.
"""

TASKS: dict[str, Any] = {"perplexity": PerplexityTask, "passkey": RetrievalTask, "needles": RetrievalTask}


@as_program("evaluate.py", stopped="stopped; the same command goes on")
def main(argv: Sequence[str]) -> None:
    """The whole evaluation. What can be refused is refused before anything is computed."""
    options = parse(argv)
    be_quiet()
    with together():
        with one_clear_error(f"--model {options.model}: "):
            opened = open_model(options, options.attention, options.group_size)
        with one_clear_error():
            task = TASKS[options.task](options, opened)
        settings = task.settings | opened.description | {"versions": versions()}
        with one_clear_error():
            folder = on_first_process(lambda: claim(options.output, default_name(options), settings))
        say(banner(settings, folder))
        results = compute(task, folder)
        if RANK == 0:
            content = finished(folder, task.cells, task.numbers) or {
                "summary": task.summary(results),
                "settings": settings,
                "made": {
                    "command": f"{launcher()} {shlex.join([sys.argv[0], *argv])}",
                    "commit": commit(),
                    "processes": WORLD_SIZE,
                    "device": ", ".join(sorted({str(weight.device) for weight in opened.model.parameters()})),
                    "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                },
                "cells": results,
            }
            try:
                (folder / "results.txt").write_text(task.table(results), encoding="utf-8")
                pictures = task.draw(results, folder)
                finish(folder, content)
            except OSError as error:
                fail(cannot_be_written_to(folder, error))
            say("", task.table(results), *map(str, [folder / "results.json", *pictures]))


def compute(task: Any, folder: Path) -> dict[str, Any]:
    """Compute what is not there yet, each process its part.

    Returns:
        On the first process, the results of all cells.
    """
    with one_clear_error():
        there = on_first_process(
            lambda: finished(folder, task.cells, task.numbers) or {"cells": kept(folder, task.numbers)}
        )["cells"]
    done = {cell: result for cell, result in there.items() if cell in task.cells}
    if len(done) == len(task.cells):
        say(f"{folder} is complete: nothing is computed again")
    elif done:
        say(f"going on: {len(done)} of {len(task.cells)} parts are computed")
    mine = [cell for cell in task.cells if cell not in done][RANK::WORLD_SIZE]
    new = {}
    what = "evaluating" if WORLD_SIZE == 1 else f"evaluating (1 of {WORLD_SIZE} processes)"
    total = sum(map(task.cost, mine))
    with tqdm(total=total, desc=what, unit=task.unit, unit_scale=True, disable=RANK != 0 or not total) as bar:
        for cell in mine:
            new[cell] = task.compute(cell, bar.update)
            try:
                keep(folder, cell, new[cell])
            except OSError as error:
                bar.close()  # or the error stands behind it on its line
                fail(cannot_be_written_to(folder, error))
    results = done | gathered(new)
    return {cell: results[cell] for cell in task.cells if cell in results}  # in their order


def cannot_be_written_to(folder: Path, error: OSError) -> str:
    """What is said when the disk is full, whichever part of the result is written."""
    kept = "What is computed so far is kept; the same command goes on from there"
    return f"{folder} cannot be written to: {error.strerror}. {kept}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, on every process alike.

    Raises:
        SystemExit: On a mistake, after saying what it is; and after --help.
    """
    layout: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
    usage = "python examples/evaluate.py TASK [OPTIONS]   (or torchrun or deepspeed in place of python)"
    parser = Parser(prog=launch.program, usage=usage, description=DESCRIPTION, epilog=EXAMPLES, **layout)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True, help="perplexity, passkey or needles")
    for name, help_text in (
        ("perplexity", "perplexity by a sliding window over documents"),
        ("passkey", "a pass key in a long text, over length x depth"),
        ("needles", "one of several codes in a long text, over length x depth"),
    ):
        task = tasks.add_parser(name, prog=f"python examples/{launch.program} {name}", description=help_text, **layout)
        _add_options(task, name)
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _add_options(parser: argparse.ArgumentParser, task: str) -> None:
    group = parser.add_argument_group("task")
    default = "the model's trained length" if task == "perplexity" else "four quarters of the model's trained length"
    group.add_argument("--lengths", type=int, nargs="+", help=f"tokens of the context, one or more; default: {default}")
    if task == "perplexity":
        group.add_argument(
            "--text",
            type=os.path.expanduser,
            nargs="+",
            help="files (.txt .md .rst .py: one document each; .jsonl .json .parquet: one document per row; also "
            "compressed as .gz or .zst), folders, glob patterns, or hub datasets OWNER/NAME[:CONFIG[:SPLIT]]; .bin: "
            "16-bit token ids, one document per file, as published by the original project; default: the held-out "
            "part of Python's standard library",
        )
        group.add_argument("--text_column", default="text", help="column of JSON, Parquet and hub datasets")
        group.add_argument(
            "--stride",
            type=int,
            help="tokens that the window moves by; default: 256 as in the paper, or half of the shortest length if "
            "that is less",
        )
        group.add_argument(
            "--score",
            choices=tuple(SCORES),
            default="last",
            help="last: score each token once, with the most context; all: score all tokens of each window, as the "
            "paper's program does",
        )
        group.add_argument(
            "--keep_short",
            action="store_true",
            help="also measure documents shorter than the longest length, with as much context as they have",
        )
        group.add_argument("--max_documents", type=int, help="measure the first documents only")
        group.add_argument("--max_tokens", type=int, help="measure the first tokens of each document only")
        group.add_argument("--batch_tokens", type=int, default=8192, help="tokens per batch; at least one window")
        group.add_argument(
            "--attention",
            choices=("dense", "s2"),
            default="dense",
            help="s2: S2-Attn at test time, as in training: a comparison of the paper",
        )
        group.add_argument("--group_size", type=int, help="tokens of a group of S2-Attn; default: as in training")
    else:
        group.add_argument(
            "--depths",
            type=float,
            nargs="+",
            default=[0.0, 0.25, 0.5, 0.75, 1.0],
            help="where the needle is: 0 at the start of the text, 1 at its end",
        )
        group.add_argument("--trials", type=int, default=5, help="questions per length and depth, each with new digits")
        group.add_argument("--seed", type=int, default=0, help="seed of the digits, names and places")
        parser.set_defaults(attention="dense", group_size=None)
    if task == "needles":
        group.add_argument("--needles", type=int, default=4, help="codes in the text")
    add_model_options(parser)
    add_scaling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=os.path.expanduser,
        help="folder to write; default: evaluated/MODEL-TASK, with a number "
        "after it where that holds another evaluation",
    )


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, whatever model and text are."""
    for name in ("stride", "max_documents", "batch_tokens", "trials"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    for name, values in (("lengths", options.lengths or []), ("max_tokens", [getattr(options, "max_tokens", None)])):
        for value in values:
            if value is not None and value < 2:
                parser.error(f"--{name} must be 2 or more, got {value}")
    if options.lengths:
        options.lengths = sorted(set(options.lengths))
    if options.task == "perplexity":
        if options.group_size is not None and options.attention != "s2":
            parser.error("--group_size is for --attention s2")
        if options.group_size is not None and (options.group_size < 2 or options.group_size % 2):
            parser.error(f"--group_size must be even and at least 2, got {options.group_size}")
    else:
        for depth in options.depths:
            if not 0 <= depth <= 1:
                parser.error(f"--depths must be in 0..1, got {depth:g}")
        options.depths = sorted(set(options.depths))
    most = len(ADJECTIVES) * len(NOUNS)
    if options.task == "needles" and not 2 <= options.needles <= most:
        parser.error(f"--needles must be in 2..{most}, got {options.needles}")
    check_model_options(parser, options)
    if options.output is not None:
        with one_clear_error():
            check_folder(Path(options.output))


def default_name(options: argparse.Namespace) -> str:
    """What to call the output folder: the trainer's folders are called adapter, merged or model themselves."""
    path = Path(options.model).resolve()
    if options.gguf_file:
        path = path / Path(options.gguf_file).stem
    name = path.parent.name if path.name in ("adapter", "merged", "model") else path.name
    return f"{name}-{options.task}"


def banner(settings: dict[str, Any], folder: Path) -> str:
    """What is about to be measured, and how, a line for each thing."""
    rows = {name: value for name, value in settings.items() if name not in ("weights", "sha256")}
    lines = []
    for name, value in {**rows, "output": folder}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = ", ".join(map(repr, value)) if name == "prompt" else " ".join(map(str, value))
        lines.append(f"{name.replace('_', ' ') + ':':<26}{value}")
    return "\n".join(["", *lines, ""])


if __name__ == "__main__":
    main(sys.argv[1:])
