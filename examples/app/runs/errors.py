"""How an exception becomes the one line that a user reads.

Parts raise, and the program ends in one place. A part that knows more than the library below it raises an exception of
its own `from` the library's, with what was wrong, what it was and what it may be. `one_clear_error`, around the steps
of a program, prints the text of whatever arrives as one line and ends with exit status 2. `fail` itself is for what a
program finds without an exception.

Which exceptions that is depends on the step. While options, model and text are looked at, everything counts: bad input
makes libraries raise anything. Later, only those that are said to be expected: any other is a mistake in the program,
and its traceback is to be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from app.runs.launch import TRACEBACK, fail

#: What libraries raise with a text that is meant to be read. Of any other the kind is named as well.
USUAL = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError, SafetensorError)


@contextmanager
def one_clear_error(about: str = "", only: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """End the program with one line for an exception of what is done within.

    Args:
        about: What the line begins with, such as the option that names the input.
        only: The kinds of exceptions to do so for.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads what was printed, which is no mistake
        raise
    except only as error:
        kind, said = type(error).__name__, " ".join(str(error).split())
        if said and isinstance(error, USUAL):
            fail(about + said)
        fail(f"{about}{kind}{f': {said}' if said else ''} ({TRACEBACK}=1 shows where)")
