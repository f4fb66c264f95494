"""What the programs' command lines have in common: how they help, and how they end for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from transformers import HfArgumentParser

from runs.launch import RANK, fail

EXAMPLES = Path(__file__).resolve().parents[1]
TINY_LLAMA = EXAMPLES / "tiny_llama"
INTERRUPTED = 130  # exit status, as of a shell's commands


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples stay as they are laid out; defaults are shown, except where the text tells them, and "None"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or "Default:" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Fails, and helps, on one process only."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the options)")

    def print_help(self, file: Any = None) -> None:
        if RANK == 0:
            super().print_help(file)


def is_given(argv: Sequence[str], option: str) -> bool:
    """Whether an option of that name stands in `argv`: `--name VALUE`, `--name=VALUE`, with _ or - within it."""
    spellings = {f"--{option}", f"--{option.replace('_', '-')}"}
    return any(argument.split("=")[0] in spellings for argument in argv)


@contextmanager
def one_clear_error(about: str = "") -> Iterator[None]:
    """Turn what libraries raise about bad input into one line that starts with what it is `about`.

    Only for what comes before the work. What is usual there is said as it is; of anything else, which a broken file
    makes of a library, the kind is named too.
    """
    usual = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError, SafetensorError)
    try:
        yield
    except Exception as error:
        kind, said = type(error).__name__, " ".join(str(error).split())
        fail(about + (said if said and isinstance(error, usual) else f"{kind}: {said}" if said else kind))


@contextmanager
def stopped_by_hand(message: str = "") -> Iterator[None]:
    """End the program at Ctrl-C with that line, or with nothing, in place of where it was."""
    try:
        yield
    except KeyboardInterrupt:
        if RANK == 0:
            print(f"\n{message}" if message else "", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
