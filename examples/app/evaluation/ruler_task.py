"""RULER over tasks and lengths: how much of what is asked for does the model find?

A cell is one task at one length; in it the model is asked several times, each time for something else. What it writes,
greedily, is scored by recall: the share of the right answers that are in it.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import random
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.evaluation import ruler
from app.evaluation.greedy import Greedy
from app.evaluation.heat_map import heat_map
from app.inputs.files import load_documents
from app.inputs.prompt import prompt_ids
from app.inputs.template import ChatTemplate
from app.models.suitable import check_largest_token
from app.models.use_model import OpenedModel
from longlora_ext._processes import first_process_first

#: What a chat template takes for today, so that a prompt is the same on every day.
DAY = date(2024, 7, 26)


class RulerTask:
    """The synthetic tasks of RULER.

    Args:
        options: `tasks`, `lengths`, `trials`, `seed`, `haystack`, `text_column`, `chat`.
        opened: The model.

    Attributes:
        settings: What the numbers depend on beside the model.
        cells: What there is to compute: a task and a length by name.

    Raises:
        ValueError, OSError: A length too short for a prompt, or beyond what the model was trained on; no text.
    """

    unit = " answers"
    numbers = ("recall", "asked")  # that a cell's result has

    def __init__(self, options: argparse.Namespace, opened: OpenedModel) -> None:
        self.opened = opened
        self.greedy = Greedy(opened)
        self.tasks: list[str] = options.tasks or list(ruler.TASKS)
        self.trials: int = options.trials
        self.seed: int = options.seed
        template = opened.tokenizer.chat_template if options.chat else None
        self.template = ChatTemplate(opened.tokenizer, DAY) if template else None
        self.haystack, source = self._haystack(options.haystack, options.text_column)
        quarters = [opened.trained_length * part // 4 for part in (1, 2, 3, 4)]
        shortest = {task: self._shortest(task) for task in self.tasks}
        self.lengths: list[int] = options.lengths or [length for length in quarters if length >= max(shortest.values())]
        if not self.lengths or self.lengths[0] < max(shortest.values()):
            raise ValueError(self._too_short(options, shortest))
        longest = self.lengths[-1]
        opened.check_length(longest, options.beyond_trained_length, f"a length of {longest:,} tokens is asked for")
        self.settings = {
            "task": "ruler",
            "tasks": self.tasks,
            "lengths": self.lengths,
            "trials": self.trials,
            "seed": self.seed,
            **source,
            "prompt": "the model's chat template" if self.template else "plain text",
            "score": "recall",
            "stops": self.greedy.stops,
            "decoding": "greedy with a KV cache, one prompt at a time, 30 to 128 tokens by task",
        }
        self.cells = {f"{task}-length-{length}": (task, length) for task in self.tasks for length in self.lengths}
        example = self._ids(self._question(self.tasks[0], self.lengths[0], 0), 1)
        check_largest_token(opened.base.config, max(example))

    def _haystack(self, sources: list[str] | None, column: str) -> tuple[ruler.Haystack, dict[str, str]]:
        """The haystack of noise, or of a text, and what tells it from any other."""
        if not sources:
            return ruler.noise, {"haystack": "noise"}
        documents = first_process_first(lambda: load_documents(sources, column))
        text = " ".join(document for document in documents["text"][:100] if document)
        if not (sentences := ruler.sentences_of(text)):
            raise ValueError(f"--haystack {' '.join(sources)} holds no text")
        digest = hashlib.sha256(text.encode()).hexdigest()
        return ruler.of_text(sentences), {"haystack": " ".join(sources), "haystack_sha256": digest}

    def _shortest(self, task: str) -> int:
        """Tokens of the shortest prompt worth asking with, and its answer. Several: words differ in tokens."""
        kind = ruler.TASKS[task]
        return kind.room + max(len(self._ids(self._question(task, 0, n), kind.least)) for n in range(20))

    def _too_short(self, options: argparse.Namespace, shortest: dict[str, int]) -> str:
        """What is too long for what, and what would do."""
        trained = self.opened.trained_length
        most, task = max((length, task) for task, length in shortest.items())
        room = self.lengths[0] if self.lengths else trained
        what = f"--lengths {room}" if self.lengths else f"{options.model} reads {room:,} tokens"
        said = f"{what}: the longest of these prompts, of {task}, and its answer have {most:,} tokens at least"
        ways = []
        if fitting := [task for task, length in shortest.items() if length <= room]:
            ways.append(f"--tasks {' '.join(fitting)}")
        if most <= trained or options.beyond_trained_length:
            ways.append(f"--lengths {most}")
        elif not fitting:
            least, task = min((length, task) for task, length in shortest.items())
            return f"{said}, the shortest, of {task}, {least:,}"
        return f"{said}; {' or '.join(ways)} would do"

    def cost(self, cell: str) -> int:
        """Questions of a cell."""
        return self.trials

    def compute(self, cell: str, progress: Callable[[int], object]) -> dict[str, Any]:
        """Ask all questions of a cell."""
        trials = []
        for trial in range(self.trials):
            trials.append(self._ask(*self.cells[cell], trial))
            progress(1)
        return {"recall": sum(t["recall"] for t in trials), "asked": len(trials), "trials": trials}

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The recall by cell, and the mean of all tasks at each length."""
        shares = self.shares(results)
        by_length = {str(n): float(mean) for n, mean in zip(self.lengths, shares.mean(0), strict=True)}
        return {"recall": float(shares.mean()), "by_length": by_length, "shares": shares.tolist()}

    def shares(self, results: dict[str, dict[str, Any]]) -> np.ndarray:
        """The mean recall, [tasks, lengths]."""
        by_task = [results[cell]["recall"] / results[cell]["asked"] for cell in self.cells]
        return np.array(by_task).reshape(len(self.tasks), len(self.lengths))

    def table(self, results: dict[str, dict[str, Any]]) -> str:
        """The results as text."""
        shares = self.shares(results)
        lines = [f"RULER: mean recall of what is asked for, {self.trials} questions in each cell", ""]
        lines.append(f"{'task':<18}" + "".join(f"{length:>10,}" for length in self.lengths) + "  tokens")
        for task, row in zip([*self.tasks, "mean"], [*shares, shares.mean(0)], strict=True):
            lines.append(f"{task:<18}" + "".join(f"{share:>10.2f}" for share in row))
        return "\n".join(lines) + "\n"

    def draw(self, results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
        """Write the heat map."""
        path = folder / "heat_map.png"
        title = f"RULER: {Path(self.opened.description['model']).name}"
        heat_map(self.shares(results), self.lengths, self.tasks, path, title, rows="task", values="recall")
        return [path]

    def _ask(self, task: str, length: int, trial: int) -> dict[str, Any]:
        """One question, with what was answered."""
        question, room = self._question(task, length, trial), ruler.TASKS[task].room
        units = bisect.bisect_right(range(length), length - room, key=lambda n: len(self._ids(question, n))) - 1
        ids = torch.tensor([self._ids(question, units)], device=self.opened.model.device)
        self.opened.forget_length()
        said = self.opened.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self.greedy.up_to(room)
        )
        answer = str(self.opened.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
        return {
            "tokens": ids.shape[1],
            "wanted": list(question.answers),
            "answer": answer,
            "recall": ruler.recall(answer, question.answers),
        }

    def _question(self, task: str, length: int, trial: int) -> ruler.Question:
        """What is asked: it depends on nothing but this and the seed."""
        rng = random.Random(" ".join(map(str, ("ruler", self.seed, task, length, trial))))
        return ruler.TASKS[task].make(rng, self.haystack)

    def _ids(self, question: ruler.Question, units: int) -> list[int]:
        """The whole prompt with the beginning of the answer, in the model's chat template if that is used."""
        tokenizer, prompt = self.opened.tokenizer, question.prompt(units)
        if self.template is None:
            return prompt_ids(tokenizer, prompt + question.prefix)
        asked: Any = [{"role": "user", "content": prompt}]
        written = self.template.write(asked, {}, ask=True)
        ids: list[int] = tokenizer(written + question.prefix, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
