"""What the programs' command lines have in common: how they help, and how they end for a mistake."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from transformers import HfArgumentParser

from runs.launch import RANK, fail

EXAMPLES = Path(__file__).resolve().parents[1]
TINY_LLAMA = EXAMPLES / "tiny_llama"


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


@contextmanager
def one_clear_error(about: str = "") -> Iterator[None]:
    """Turn what libraries raise about bad input into one line that starts with what it is `about`.

    Only for what comes before the work.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError, RuntimeError, SafetensorError) as error:
        fail(about + (" ".join(str(error).split()) or type(error).__name__))
