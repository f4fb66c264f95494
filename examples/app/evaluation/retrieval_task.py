"""Retrieval over length and depth: does the model find what is hidden in a long text?

A cell is one length and one depth; in it the model is asked several times, each time for other digits. What it writes,
greedily, is right if the first digits in it are the ones that were asked for. How likely the right answer is to it, in
nats per token, tells more where it is nearly right or nearly wrong.
"""

from __future__ import annotations

import argparse
import bisect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from app.evaluation.answer_nats import answer_ids
from app.evaluation.greedy import Greedy
from app.evaluation.heat_map import heat_map
from app.evaluation.one_reading import answer_and_losses
from app.evaluation.prompts import ADJECTIVES, FILLER, NOUNS, Retrieval, needles, passkey
from app.inputs.prompt import prompt_ids
from app.models.suitable import check_largest_token
from app.models.use_model import OpenedModel

ANSWER_TOKENS = 16  # of the length, kept free for the answer
MIN_FILLER = 4  # sentences; with fewer there is no depth to speak of


class RetrievalTask:
    """Passkey retrieval, or that of one needle among several.

    Args:
        options: `task`, `lengths`, `depths`, `trials`, `seed`; for "needles" also `needles`.
        opened: The model.

    Attributes:
        settings: What the numbers depend on beside the model.
        cells: What there is to compute: a length and a depth by name.

    Raises:
        ValueError: A length too short for the prompt, or beyond what the model was trained on.
    """

    unit = " answers"
    numbers = ("right", "asked", "nats")  # that a cell's result has

    def __init__(self, options: argparse.Namespace, opened: OpenedModel) -> None:
        self.name: str = options.task
        self.count: int = options.needles if self.name == "needles" else 1
        self.opened = opened
        self.greedy = Greedy(opened)
        self.depths: list[float] = options.depths
        self.trials: int = options.trials
        self.seed: int = options.seed
        self._check_tokens()
        # Several prompts: their digits and names differ in the number of tokens.
        shortest = ANSWER_TOKENS + max(self._tokens(self._prompt("probe", 0.5, n, MIN_FILLER)) for n in range(20))
        quarters = (opened.trained_length * part // 4 for part in (1, 2, 3, 4))
        self.lengths: list[int] = options.lengths or [length for length in quarters if length >= shortest]
        if not self.lengths:
            raise ValueError(
                f"{options.model} reads {opened.trained_length:,} tokens, and this prompt has {shortest:,} at least"
            )
        if self.lengths[0] < shortest:
            raise ValueError(f"--lengths {self.lengths[0]}: this prompt and its answer have {shortest:,} at least")
        longest = self.lengths[-1]
        opened.check_length(longest, options.beyond_trained_length, f"a length of {longest:,} tokens is asked for")
        example = self._retrieval(self.lengths[0], self.depths[0], 0)
        self.settings = {
            "task": self.name,
            "needles": self.count,
            "lengths": self.lengths,
            "depths": self.depths,
            "trials": self.trials,
            "seed": self.seed,
            "stops": self.greedy.stops,
            "decoding": f"greedy, {ANSWER_TOKENS} tokens with a KV cache, one prompt at a time",
            "likelihood": "mean nats per token of the right answer, by a forward pass",
            "prompt": [example.instruction, example.needles[0], example.question],
        }
        self.cells = {
            f"length-{length}-depth-{_written(depth)}": (length, depth)
            for length in self.lengths
            for depth in self.depths
        }

    def cost(self, cell: str) -> int:
        """Questions of a cell."""
        return self.trials

    def compute(self, cell: str, progress: Callable[[int], object]) -> dict[str, Any]:
        """Ask all questions of a cell."""
        trials = []
        for trial in range(self.trials):
            trials.append(self._ask(*self.cells[cell], trial))
            progress(1)
        nats = sum(t["nats"] for t in trials) / len(trials)
        return {"right": sum(t["right"] for t in trials), "asked": len(trials), "nats": nats, "trials": trials}

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The share of right answers, and the nats per token of right ones, by cell and in all."""
        right, asked = (sum(result[key] for result in results.values()) for key in ("right", "asked"))
        nats = self.nats(results)
        return {
            "accuracy": right / asked,
            "nats": float(nats.mean()),
            "shares": self.shares(results).tolist(),
            "nats_by_cell": nats.tolist(),
            "asked": asked,
        }

    def shares(self, results: dict[str, dict[str, Any]]) -> np.ndarray:
        """The share of right answers, [depths, lengths]."""
        return self._by_cell([results[cell]["right"] / results[cell]["asked"] for cell in self.cells])

    def nats(self, results: dict[str, dict[str, Any]]) -> np.ndarray:
        """The mean nats per token of the right answer, [depths, lengths]."""
        return self._by_cell([float(results[cell]["nats"]) for cell in self.cells])

    def _by_cell(self, values: list[float]) -> np.ndarray:
        return np.array(values).reshape(len(self.lengths), len(self.depths)).T

    def table(self, results: dict[str, dict[str, Any]]) -> str:
        """The results as text."""
        what = "the pass key" if self.name == "passkey" else f"one of {self.count} codes"
        head = f"{'depth':<8}" + "".join(f"{length:>10,}" for length in self.lengths) + "  tokens"
        lines = [f"share of questions for {what} that were answered exactly, {self.trials} in each cell", "", head]
        for depth, row in zip(self.depths, self.shares(results), strict=True):
            lines.append(f"{depth:<8.0%}" + "".join(f"{share:>10.2f}" for share in row))
        lines += ["", "nats per token of the right answer, the mean of each cell", "", head]
        for depth, row in zip(self.depths, self.nats(results), strict=True):
            lines.append(f"{depth:<8.0%}" + "".join(f"{nats:>10.3f}" for nats in row))
        return "\n".join(lines) + "\n"

    def draw(self, results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
        """Write the heat maps."""
        found, likely = folder / "heat_map.png", folder / "nats.png"
        title = f"{self.name}: {Path(self.opened.description['model']).name}"
        heat_map(self.shares(results), self.lengths, self.depths, found, title)
        nats = self.nats(results)
        most = float(np.nan_to_num(nats).max()) or 1
        heat_map(nats, self.lengths, self.depths, likely, title, values="nats per token of the answer", most=most)
        return [found, likely]

    def _ask(self, length: int, depth: float, trial: int) -> dict[str, Any]:
        """One question, with what was answered."""
        budget = length - ANSWER_TOKENS
        fillers = bisect.bisect_right(
            range(length // 4), budget, key=lambda fillers: self._tokens(self._prompt(length, depth, trial, fillers))
        )
        prompt = self._prompt(length, depth, trial, fillers - 1)
        wanted = self._retrieval(length, depth, trial).answer
        tokenizer = self.opened.tokenizer
        ids = self._ids(prompt)
        right = answer_ids(tokenizer, prompt, f" {wanted}")
        said, losses = answer_and_losses(self.opened, ids, right, self.greedy.up_to(ANSWER_TOKENS))
        answer = str(tokenizer.decode(said, skip_special_tokens=True))
        digits = re.search(r"\d+", answer)
        return {
            "tokens": len(ids),
            "wanted": wanted,
            "answer": answer,
            "nats": float(losses.mean()),
            "right": digits is not None and digits[0] == wanted,
        }

    def _retrieval(self, length: int | str, depth: float, trial: int) -> Retrieval:
        rng = self._rng("text", length, depth, trial)
        return passkey(rng) if self.name == "passkey" else needles(rng, self.count)

    def _prompt(self, length: int | str, depth: float, trial: int, fillers: int) -> str:
        """A prompt with the needle that is asked for at that depth, and the others anywhere."""
        rng = self._rng("places", length, depth, trial)
        places = [depth, *(rng.random() for _ in range(self.count - 1))]
        return self._retrieval(length, depth, trial).prompt(fillers, places)

    def _rng(self, *what: object) -> random.Random:
        """Chance that depends on what is asked alone, not on what was asked before."""
        return random.Random(" ".join(map(str, (self.name, self.seed, *what))))

    def _check_tokens(self) -> None:
        """Raise `ValueError` if the model does not know a token of what it is asked."""
        names = needles(self._rng("names"), len(ADJECTIVES) * len(NOUNS))
        texts = (names.prompt(len(FILLER), [0.5] * len(names.needles)), self._prompt("probe", 0.5, 0, len(FILLER)))
        check_largest_token(self.opened.base.config, max(max(self._ids(text)) for text in texts))

    def _tokens(self, prompt: str) -> int:
        return len(self._ids(prompt))

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids(self.opened.tokenizer, prompt)


def _written(depth: float) -> str:
    """A depth as in the name of a cell: short, and no other one's."""
    return short if float(short := f"{depth:g}") == depth else repr(depth)
