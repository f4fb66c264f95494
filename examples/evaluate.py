"""Evaluate a model with a long context: perplexity, passkey retrieval, one needle among several, RULER.

    python examples/evaluate.py perplexity --model MODEL --text books/
    python examples/evaluate.py --help

The program reads top to bottom: the options, the model, the task with its cells, the cells one by one, the result.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from app.runs.launch import RANK, WORLD_SIZE, launcher, say  # isort: skip  (must come first: sets variables that libraries read at import)
from tqdm import tqdm

from app.evaluation.evaluation_folder import NotWritten, keep, kept_cells, open_folder, read_results, write_results
from app.evaluation.options import parse
from app.evaluation.perplexity_task import PerplexityTask
from app.evaluation.position_task import PositionTask
from app.evaluation.retrieval_task import RetrievalTask
from app.evaluation.ruler_task import RulerTask
from app.models.use_model import open_model
from app.runs.command_line import as_program
from app.runs.errors import one_clear_error
from app.runs.processes import be_quiet, gathered, together
from app.runs.provenance import commit, versions
from longlora_ext._processes import on_first_process

TASKS: dict[str, Any] = {
    "perplexity": PerplexityTask,
    "passkey": RetrievalTask,
    "needles": RetrievalTask,
    "ruler": RulerTask,
}


@as_program("evaluate.py", stopped="stopped; the same command goes on")
def main(argv: Sequence[str]) -> None:
    """The whole evaluation. What can be refused is refused before anything is computed."""
    options = parse(argv)
    be_quiet()
    with together():
        with one_clear_error(f"--model {options.model}: "):
            opened = open_model(options, options.attention, options.group_size)
        with one_clear_error():
            by_position = options.task == "perplexity" and options.by_position
            task = (PositionTask if by_position else TASKS[options.task])(options, opened)
        settings = task.settings | opened.description | {"versions": versions()}
        with one_clear_error():
            folder = on_first_process(lambda: open_folder(options.output, default_name(options), settings))
        say(banner(settings, folder))
        results = compute(task, folder)
        if RANK == 0:
            content = read_results(folder, task.cells, task.numbers) or {
                "summary": task.summary(results),
                "settings": settings,
                "made": {
                    "command": f"{launcher()} {shlex.join([sys.argv[0], *argv])}",
                    "commit": commit(),
                    "processes": WORLD_SIZE,
                    "device": ", ".join(sorted({str(weight.device) for weight in opened.model.parameters()})),
                    "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                },
                "cells": results,
            }
            with one_clear_error(only=NotWritten):
                pictures = write_results(folder, task.table(results), partial(task.draw, results), content)
            say("", task.table(results), *map(str, [folder / "results.json", *pictures]))


def compute(task: Any, folder: Path) -> dict[str, Any]:
    """Compute what is not there yet, each process its part.

    Returns:
        On the first process, the results of all cells.
    """
    with one_clear_error():
        computed = on_first_process(
            lambda: (
                (read_results(folder, task.cells, task.numbers) or {}).get("cells") or kept_cells(folder, task.numbers)
            )
        )
    done = {cell: result for cell, result in computed.items() if cell in task.cells}
    if len(done) == len(task.cells):
        say(f"{folder} is complete: nothing is computed again")
    elif done:
        say(f"going on: {len(done)} of {len(task.cells)} parts are computed")
    mine = [cell for cell in task.cells if cell not in done][RANK::WORLD_SIZE]
    new = {}
    what = "evaluating" if WORLD_SIZE == 1 else f"evaluating (1 of {WORLD_SIZE} processes)"
    total = sum(map(task.cost, mine))
    bar = tqdm(total=total, desc=what, unit=task.unit, unit_scale=True, disable=RANK != 0 or not total)
    with one_clear_error(only=NotWritten), bar:  # the bar ends before the error is shown
        for cell in mine:
            new[cell] = task.compute(cell, bar.update)
            keep(folder, cell, new[cell])
    results = done | gathered(new)
    return {cell: results[cell] for cell in task.cells if cell in results}  # in their order


def default_name(options: argparse.Namespace) -> str:
    """What to call the output folder: the trainer's folders are called adapter, merged or model themselves."""
    path = Path(options.model).resolve()
    if options.gguf_file:
        path = path / Path(options.gguf_file).stem
    name = path.parent.name if path.name in ("adapter", "merged", "model") else path.name
    return f"{name}-{options.task}"


def banner(settings: dict[str, Any], folder: Path) -> str:
    """What is about to be measured, and how, a line for each thing."""
    rows = {name: value for name, value in settings.items() if name not in ("weights", "sha256")}
    lines = []
    for name, value in {**rows, "output": folder}.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = ", ".join(map(repr, value)) if name == "prompt" else " ".join(map(str, value))
        lines.append(f"{name.replace('_', ' ') + ':':<26}{value}")
    return "\n".join(["", *lines, ""])


if __name__ == "__main__":
    main(sys.argv[1:])
