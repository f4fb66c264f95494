"""How an exception of another library becomes one of ours.

What a library says often leaves out which file or model it is about, and broken files make it raise anything. So the
places that read and write them are within [`naming`] and [`writing`], which say that and raise one kind of exception,
in one line, `from` the library's. The programs print it as it is (examples/app/runs/errors.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

#: What libraries raise with a text that is meant to be read. Of any other exception the kind is named as well.
USUAL = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError, SafetensorError)
_LONGEST = 500  # characters of a library's text: torch lists every tensor that does not fit


def in_one_line(error: BaseException) -> str:
    """The text of an exception, on one line, with its kind before it unless that is usual and the text says it all."""
    said = " ".join(str(error).split())
    if said and isinstance(error, USUAL):
        return said
    return f"{type(error).__name__}{f': {said}' if said else ''}"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in one `ValueError` what could not be loaded."""
    try:
        yield
    except pickle.UnpicklingError as error:  # whose text advises to load what might run code
        raise ValueError(f"cannot load {what}: it is damaged, or has more in it than tensors") from error
    except Exception as error:
        raise ValueError(f"cannot load {what}: {in_one_line(error)[:_LONGEST]}") from error


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Say in one `OSError` what could not be written, whichever library found the disk full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {what}: {in_one_line(error)}") from error
