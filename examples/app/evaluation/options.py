"""The command line of `evaluate.py`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from app.evaluation.evaluation_folder import check_folder
from app.evaluation.perplexity_task import SCORES
from app.evaluation.prompts import ADJECTIVES, NOUNS
from app.evaluation.ruler import TASKS as RULER
from app.models.use_model import add_model_options, add_scaling_options, check_model_options
from app.runs import launch
from app.runs.command_line import HelpFormatter, Parser, check_not_empty
from app.runs.errors import one_clear_error

DESCRIPTION = """\
Evaluate a base model, a merged model or an adapter on long texts.

  perplexity   with a sliding window over documents, at one or more window lengths
  passkey      find a pass key, over length of the text x depth of the key
  needles      the same with several codes in the text; the question is for one of them
  ruler        the synthetic tasks of RULER: needles of four kinds, variables, common and frequent words

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

  how perplexity falls with the position in a window:
    python examples/evaluate.py perplexity --model merged/ --text pg19/test/ --lengths 32768 --by_position 16

  RULER, in the model's chat template where it has one:
    torchrun --nproc_per_node 8 examples/evaluate.py ruler --model merged/ --lengths 4096 8192 16384 32768 --trials 20

`evaluate.py TASK --help` lists the options of a task. The output folder (default: evaluated/MODEL-TASK) holds
results.json, results.txt, settings.json and pictures.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, on every process alike.

    Raises:
        SystemExit: On a mistake, after saying what it is; and after --help.
    """
    usage = "python examples/evaluate.py TASK [OPTIONS]   (or torchrun or deepspeed in place of python)"
    parser = Parser(
        prog=launch.program, usage=usage, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    tasks = parser.add_subparsers(
        dest="task", metavar="TASK", required=True, help="perplexity, passkey, needles or ruler"
    )
    for name, help_text in (
        ("perplexity", "perplexity by a sliding window over documents"),
        ("passkey", "a pass key in a long text, over length x depth"),
        ("needles", "one of several codes in a long text, over length x depth"),
        ("ruler", "the synthetic tasks of RULER, over task x length"),
    ):
        prog = f"python examples/{launch.program} {name}"
        task = tasks.add_parser(name, prog=prog, description=help_text, formatter_class=HelpFormatter)
        _add_options(task, name)
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _add_options(parser: argparse.ArgumentParser, task: str) -> None:
    group = parser.add_argument_group("task")
    default = "the model's trained length" if task == "perplexity" else "four quarters of the model's trained length"
    group.add_argument("--lengths", type=int, nargs="+", help=f"tokens of the context, one or more; default: {default}")
    if task == "perplexity":
        _add_perplexity(group)
    else:
        group.add_argument("--trials", type=int, default=5, help="questions of each cell, each another one")
        group.add_argument("--seed", type=int, default=0, help="seed of the digits, names and places")
        parser.set_defaults(attention="dense", group_size=None)
    if task in ("passkey", "needles"):
        group.add_argument(
            "--depths",
            type=float,
            nargs="+",
            default=[0.0, 0.25, 0.5, 0.75, 1.0],
            help="where the needle is: 0 at the start of the text, 1 at its end",
        )
    if task == "needles":
        group.add_argument("--needles", type=int, default=4, help="codes in the text")
    if task == "ruler":
        group.add_argument(
            "--tasks", nargs="+", choices=tuple(RULER), metavar="TASK", help=f"of {', '.join(RULER)}; default: all"
        )
        group.add_argument(
            "--haystack",
            type=os.path.expanduser,
            nargs="+",
            help="text to hide needles and chains in, in the forms of perplexity's --text but for .bin; default: "
            "RULER's noise",
        )
        group.add_argument("--text_column", default="text", help="column of JSON, Parquet and hub datasets")
        group.add_argument(
            "--plain",
            dest="chat",
            action="store_false",
            help="ask without the chat template of the tokenizer; default: with it, where there is one",
        )
    add_model_options(parser)
    add_scaling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=os.path.expanduser,
        help="folder to write; default: evaluated/MODEL-TASK, with a number "
        "after it where that holds another evaluation",
    )


def _add_perplexity(group: argparse._ArgumentGroup) -> None:
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
    group.add_argument("--batch_tokens", type=int, help="tokens per batch, at least one window; default: 8192")
    group.add_argument(
        "--attention",
        choices=("dense", "s2"),
        default="dense",
        help="s2: S2-Attn at test time, as in training: a comparison of the paper",
    )
    group.add_argument("--group_size", type=int, help="tokens of a group of S2-Attn; default: as in training")
    group.add_argument(
        "--by_position",
        type=int,
        nargs="?",
        const=8,
        metavar="PARTS",
        help="perplexity by position in windows that do not overlap, in so many parts of the window; without a "
        "number: 8",
    )


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, whatever model and text are."""
    for name in ("text", "haystack", "output"):
        check_not_empty(parser, name, getattr(options, name, None))
    for name in ("stride", "max_documents", "batch_tokens", "trials", "by_position"):
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
        without_effect = {
            "stride": options.stride,
            "score": options.score != "last",
            "keep_short": options.keep_short,
            "batch_tokens": options.batch_tokens,
        }
        for name, given in without_effect.items():
            if options.by_position and given:
                windows = "whole windows that do not overlap, one at a time"
                parser.error(f"--{name} has no effect with --by_position, which reads {windows}")
    elif options.task == "ruler":
        options.tasks = options.tasks and list(dict.fromkeys(options.tasks))
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
