"""The weights of a model folder, read one at a time: of files of any size only what is asked for comes into memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files, has_file

#: Of what `cached_file` takes, what `has_file` takes too.
_ASKED = ("cache_dir", "local_files_only", "revision", "token")
_POINTER = b"version https://git-lfs"


class Checkpoint:
    """Tensors by name, out of safetensors files or, mapped into memory, out of those of `torch.save`."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._file_of = {name: str(file) for file in files for name in _open(str(file)).names}
        self._opened: tuple[str, _Opened] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def get(self, name: str) -> Any:
        """The tensor, whose numbers are read when they are looked at, or `None` if there is none of that name."""
        return self._open(name).get(name) if name in self else None

    def like(self, name: str) -> torch.Tensor:
        """A tensor of the same shape and dtype on the meta device: it is not read."""
        return self._open(name).like(name)

    def _open(self, name: str) -> _Opened:
        """The file with that tensor."""
        file = self._file_of[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = file, _open(file)
        return self._opened[1]

    def close(self) -> None:
        """Give back the memory of what was read."""
        self._opened = None


class _Opened(NamedTuple):
    """A file: its tensors' names, what gets one, and what makes one like it on the meta device."""

    names: list[str]
    get: Callable[[str], torch.Tensor]
    like: Callable[[str], torch.Tensor]


def _open(file: str) -> _Opened:
    refuse_pointer(file)
    if file.endswith(".safetensors"):
        tensors = safe_open(file, framework="pt")
        dtypes: dict[str, torch.dtype] = {}  # by their names in the file, of which one tensor each is read

        def like(name: str) -> torch.Tensor:
            stored = tensors.get_slice(name)
            dtype = stored.get_dtype()
            if dtype not in dtypes:
                dtypes[dtype] = tensors.get_tensor(name).dtype
            return torch.empty(stored.get_shape(), dtype=dtypes[dtype], device="meta")

        return _Opened(list(tensors.keys()), tensors.get_tensor, like)
    state = load_pickled(file)
    return _Opened(list(state), state.__getitem__, lambda name: torch.empty_like(state[name], device="meta"))


def load_pickled(file: str | Path) -> dict[str, torch.Tensor]:
    """What `torch.save` wrote: tensors by name and nothing else, which is refused as it might be code."""
    refuse_pointer(file)
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before torch 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or has more in it than tensors, which could run code: it is not loaded"
        ) from error
    except EOFError as error:
        raise ValueError(f"{file} is empty, or cut short") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is no file of tensors by name")
    return state


def refuse_pointer(file: str | Path) -> None:
    """Raise `ValueError` for what git leaves in place of a large file that it has not fetched."""
    with open(file, "rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{file} is a git-LFS pointer, not the file: run git lfs pull")


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    first, more = sorted(names)[:3], len(names) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def weight_files(model: str, **hub_arguments: Any) -> list[str]:
    """The files with the weights of a model folder, or of a model on the hub; none if it has no such files.

    Raises:
        OSError: They are there, and cannot be fetched.
    """
    asked = {name: value for name, value in hub_arguments.items() if name in _ASKED}
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        # Asked first, so that a full disk or a lost connection is not taken for a file that is not there.
        if has_file(model, single, **asked):
            return [str(cached_file(model, single, **hub_arguments))]
        if has_file(model, index, **asked):
            return get_checkpoint_shard_files(model, cached_file(model, index, **hub_arguments), **hub_arguments)[0]
    return []
