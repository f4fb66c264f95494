"""How an exception becomes the one line that a user reads.

The rule: parts raise, and `one_clear_error` ends the program.

- A part that knows more than the library below it raises an exception of its own `from` the library's
  (longlora_ext/_errors.py, `full_disk.py`). Its text says what was wrong, what the value was, and what it may be.
- `one_clear_error`, around the steps of a program, prints that text as one line and ends with exit status 2. While
  options, model and text are read it takes every exception, because bad input makes libraries raise anything. Later it
  takes only the kinds it names: any other is a bug, whose traceback is shown.
- `fail` by itself is for what a program finds without an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from app.runs.launch import TRACEBACK, fail
from longlora_ext._errors import USUAL, in_one_line


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
        hint = "" if isinstance(error, USUAL) and str(error).strip() else f" ({TRACEBACK}=1 shows where)"
        fail(f"{about}{in_one_line(error)}{hint}")
