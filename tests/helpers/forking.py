"""Runs Python programs in forks of this process, which has imported what takes each of them seconds to import.

    python tests/helpers/forking.py MODULE...

A line of the input asks for processes of one program, by a JSON object: the `words` behind `python`, which begin with a
script, with -m and a module, or with -c and code; the `folder` to run in; the whole environment of each process; and
the files `out` and `err`, to which all of them write. When they have ended the answer is a line with the exit code of
the first that failed, negative for the number of a signal, or 0. The modules are other people's: nothing of this
project is imported before a fork, so that each may be of other sources.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def become(words: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Make this fork the process that the words would start."""
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, how in ((0, os.devnull, os.O_RDONLY), (1, out, appending), (2, err, appending)):
        os.dup2(os.open(path, how), number)
    first = folder if words[0] in ("-m", "-c") else str(Path(words[0]).parent)
    ours, its = (variables.get("PYTHONPATH", "").split(os.pathsep) for variables in (os.environ, environment))
    sys.path[:] = [first, *filter(None, its), *(entry for entry in sys.path[1:] if entry not in ours)]
    sys.argv = {"-m": words[1:], "-c": ["-c", *words[2:]]}.get(words[0], words)
    sys.stdin = open(0)  # noqa: SIM115 - it stays open, without what was read ahead of the next jobs
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def first_failure(processes: set[int]) -> int:
    """Wait for all. When one fails the others are ended, as a launcher does it."""
    code = 0
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if code == 0 and (code := os.waitstatus_to_exitcode(status)):
            for other in processes:
                os.kill(other, signal.SIGTERM)
    return code


def serve() -> list[str]:
    """Returns in the forks alone, with the words of the program to run. This process ends with its input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # imports may print
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy all that was imported
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        processes = set()
        for environment in job.pop("environments"):
            if (process := os.fork()) == 0:
                answers.close()
                become(**job, environment=environment)
                return job["words"]
            processes.add(process)
        print(first_failure(processes), file=answers)
    sys.exit()


if __name__ == "__main__":
    kind, *rest = serve()
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")
