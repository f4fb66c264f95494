"""`--check_retrieval`: does the model still find what it found before, at the length it was made for?

Perplexity can improve at every position while a model unlearns to find things. Pass keys at the base model's own length
are asked before the first step, with its own RoPE, and after the last: the mean nats per token of the right answer, by
one forward pass each, and how many are found. If retrieval did not survive, the program says so at its end. It judges
by the median over the keys: one that a model never finds would hide what became of the others.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from app.evaluation.answer_nats import answer_ids, answer_losses
from app.evaluation.prompts import DEPTHS, passkey
from app.models.windows import layers_for_sink
from app.runs.json_files import write_json
from app.runs.launch import say
from app.runs.run import Run
from app.training.before_training import AFTER, BEFORE, BeforeTraining
from app.training.measure import Measurement
from app.training.options import ModelOptions
from longlora_ext._pattern import dense_layers, sink
from longlora_ext._processes import is_first_process
from longlora_ext.config import context_length

#: A digit that is guessed costs ln 10 = 2.3 nats. A model at more than this has not found it.
KNOWS = 1.5
#: What a run that kept retrieval may cost: nats per token of the key in the middle, and keys of the eight. Two seeds of
#: the recipe that kept it (docs/extend.md) cost 0.15 and 0.20, and none; without the first token it was 0.31 to 0.44,
#: and 3 or 4.
MAY_LOSE, MAY_MISS = 0.25, 1
#: So many keys fewer, and retrieval is lost.
LOST = 3


def advice(options: ModelOptions, steps: int, config: PreTrainedConfig) -> str:
    """What may help a run that loses retrieval, without what it does already or what its model's layers rule out."""
    is_dense = options.dense_steps >= steps or len(dense_layers(config)) == config.num_hidden_layers
    may_see = not is_dense and not sink(config) and layers_for_sink(config) > 0
    ways = ["let each token see the first one (--sink)"] if may_see else []
    more = "take more steps (docs/extend.md: keys that were lost after 16 were found after 32)"
    ways += ["lower --learning_rate", more]
    ways += [] if is_dense else ["train densely (--dense_steps as many as the steps)"]
    return f"{', '.join(ways[:-1])}, or {ways[-1]}" if len(ways) > 2 else " or ".join(ways)


class RetrievalGuard(BeforeTraining):
    """Asks for pass keys before and after a run, and keeps the results in `retrieval.json`.

    Args:
        folder: The run's output folder.
        tokenizer: The model's.
        base_config: The config before the extension.
        advice: What may help if retrieval is lost.
        before: The `record` of the run up to the checkpoint that this one goes on from, if it does.

    Attributes:
        record: What was asked and found so far: what the file holds.

    Raises:
        ValueError: The model's own context is too short for a pass key.
    """

    what = "pass keys are not asked for"

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        base_config: PreTrainedConfig,
        advice: str,
        before: dict[str, Any] | None = None,
    ) -> None:
        self.file = folder / "retrieval.json"
        self.base_config = base_config
        self.advice = advice
        self.length = context_length(base_config)
        self.questions = [self._question(tokenizer, depth) for depth in DEPTHS]
        self.record: dict[str, Any] = {"length": self.length, "depths": list(DEPTHS), **(before or {})}

    def _question(self, tokenizer: PreTrainedTokenizerBase, depth: float) -> tuple[list[int], list[int]]:
        """Prompt and answer in tokens, together as long as the model's own context or a little shorter."""
        question = passkey(random.Random(f"guard {depth}"))

        def tokens_of(fillers: int) -> tuple[list[int], list[int]]:
            return answer_ids(tokenizer, question.prompt(fillers, [depth]), f" {question.answer}")

        bare, hundred = (sum(map(len, tokens_of(fillers))) for fillers in (0, 100))
        fillers = int((self.length - bare) / ((hundred - bare) / 100))
        while fillers >= 4 and sum(map(len, tokens_of(fillers))) > self.length:
            fillers -= 1
        if fillers < 4:  # sentences; with fewer there is no depth to speak of
            raise ValueError(f"--check_retrieval: a pass key needs more than the model's own {self.length} tokens")
        return tokens_of(fillers)

    def measure(self, model: torch.nn.Module, args: TrainingArguments, row: str) -> None:
        """Ask for all pass keys. Collective: each process asks for all, as ZeRO-3 needs."""
        say(f"asking for pass keys: {row}")
        training = model.training
        model.eval()
        answers = [answer_losses(model, *question, device=args.device) for question in self.questions]
        model.train(training)
        self.record[row] = {
            "nats": [float(losses.mean()) for losses, _ in answers],
            "found": [found for _, found in answers],
        }
        if is_first_process():
            write_json(self.file, self.record)

    def verdict(self, perplexity: Measurement | None = None) -> str:
        """What became of retrieval, in words."""
        if BEFORE not in self.record or AFTER not in self.record:
            return f"pass keys at {self.length:,} tokens were not asked for before training: nothing to compare"
        (before, found_before), (after, found_after) = (self._median(row) for row in (BEFORE, AFTER))
        missed = found_before - found_after
        head = (
            f"pass keys at {self.length:,} tokens, the model's own context: {before:.2f} nats per token before "
            f"(median), {after:.2f} after; {found_before} and {found_after} of {len(self.questions)} found"
        )
        if before > KNOWS and not found_before:
            return f"{head}. The base model does not find them either: it had nothing to lose"
        if missed <= MAY_MISS and after <= before + MAY_LOSE:
            return f"{head}. Retrieval has survived"
        gained = "Perplexity improved, but retrieval" if perplexity and _improved(perplexity) else "Retrieval"
        became = "did not survive" if missed >= LOST or not found_after else "has suffered"
        return f"{head}. {gained} {became}. What may help: {self.advice}"

    def _median(self, row: str) -> tuple[float, int]:
        """The nats of the key in the middle, and how many were found."""
        nats = map(float, self.record[row]["nats"])  # what is not finite stands in a file as "nan"
        return median(math.inf if math.isnan(value) else value for value in nats), sum(self.record[row]["found"])


def _improved(perplexity: Measurement) -> bool:
    """Whether the longest context is read better than by the model as it came."""
    longest = str(perplexity.lengths[-1])
    rows = perplexity.rows
    return BEFORE in rows and AFTER in rows and rows[AFTER][longest] < rows[BEFORE][longest]


def make_guard(
    options: ModelOptions,
    steps: int,
    tokenizer: PreTrainedTokenizerBase,
    base_config: PreTrainedConfig,
    config: PreTrainedConfig,
    run: Run,
) -> RetrievalGuard | None:
    """The guard of a run that asks for one. It goes on with what the run's checkpoint has asked before.

    Raises:
        ValueError: The model's own context is too short for a pass key.
    """
    if not options.check_retrieval:
        return None
    return RetrievalGuard(
        run.folder, tokenizer, base_config, advice(options, steps, config), run.marker.get("retrieval")
    )
