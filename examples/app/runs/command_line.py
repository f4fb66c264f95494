"""What the programs' command lines have in common: how they help, and how they end for a mistake."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from transformers import HfArgumentParser

from app.runs import launch
from app.runs.launch import RANK, TRACEBACK, fail, show_traceback

EXAMPLES = Path(__file__).resolve().parents[2]
TINY_LLAMA = EXAMPLES / "tiny_llama"
#: Exit statuses, as of a shell's commands that a signal has ended: SIGINT, SIGPIPE.
INTERRUPTED, CLOSED = 130, 141
#: At the end of each program's help.
FOR_BUG_REPORTS = f"""\
{TRACEBACK}=1 in the environment shows where an error of one line came from; a bug report needs that, and what
`python -m longlora_ext.env` prints"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples stay as they are laid out; defaults are shown, except where the text tells them, and "None"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or "default:" in (action.help or "").lower()
        return action.help if told else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Fails, and helps, on one process only. Options are not abbreviated, and a list of values is given once.

    Attributes:
        typed: What was typed, where more than that is parsed.
    """

    typed: Sequence[str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `parse_args` and subparsers call it. Of two lists argparse would keep the last one, silently."""
        args = sys.argv[1:] if args is None else args
        typed = args if self.typed is None else self.typed
        for action in self._actions:
            if action.nargs == "+" and sum(word.split("=")[0] in action.option_strings for word in typed) > 1:
                option = action.option_strings[0]
                self.error(f"{option} is given more than once: all its values go after one, as in {option} A B")
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        return f"{super().format_help()}\n{FOR_BUG_REPORTS}\n"

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the options)")

    def print_help(self, file: Any = None) -> None:
        if RANK == 0:
            super().print_help(file)


def check_not_empty(parser: argparse.ArgumentParser, option: str, value: Any) -> None:
    """End the program if an option's value, or one of its values, is empty, as a variable that is not set makes it."""
    if any(isinstance(word, str) and not word.strip() for word in (value if isinstance(value, list) else [value])):
        parser.error(f"--{option} is empty")


def is_given(argv: Sequence[str], option: str) -> bool:
    """Whether an option of that name stands in `argv`: `--name VALUE`, `--name=VALUE`, with _ or - within it."""
    spellings = {f"--{option}", f"--{option.replace('_', '-')}"}
    return any(argument.split("=")[0] in spellings for argument in argv)


@contextmanager
def as_program(name: str, stopped: str = "") -> Iterator[None]:
    """What all programs do alike; the decorator of a program's `main`.

    It puts its name into its errors, leaves out what one library warns another of, writes characters that the terminal
    has not as escapes, and ends quietly when the user has enough of it: at Ctrl-C, and when what it prints is no longer
    read (`| head`).

    Args:
        name: The program's.
        stopped: What to say at Ctrl-C.
    """
    launch.program = name
    warnings.filterwarnings("ignore", category=FutureWarning)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        _end(INTERRUPTED, "", *filter(None, [stopped]))  # on a line of its own, after ^C
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written
        _end(CLOSED)


def _is_closed(output: TextIO) -> bool:
    """Whether it is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _end(status: int, *last_words: str) -> NoReturn:
    show_traceback()
    if RANK == 0 and last_words:
        print(*last_words, sep="\n", file=sys.stderr, flush=True)
    sys.exit(status)
