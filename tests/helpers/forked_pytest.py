"""Runs pytest many times, each in a fork of this process, which has imported what takes three seconds to import.

    python tests/helpers/forked_pytest.py

Each line of the input is a JSON object: the `arguments` of pytest, the `folder` to run in, the `environment` to add,
and the files `out` and `err` that take what is written. The answer to each is a line with pytest's exit code, negative
for the number of a signal. Nothing of this project is imported before a fork, so that each may be of other sources.
"""

from __future__ import annotations

import json
import os
import sys

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401


def run(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """The fork's part: does not return."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder  # as `python -m pytest` has it
    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(code)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
