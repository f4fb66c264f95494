"""`--check_retrieval`: does the model still find what it found before, at the length it was made for?

Perplexity can improve at every position while a model unlearns to find things. Pass keys at the base model's own length
are asked before the first step, with its own RoPE and with the scaled one, and after the last: the mean nats per token
of the right answer, by one forward pass each, and how many are found. If retrieval did not survive, the program says so
at its end, and whether scaling or training did that. It judges by the median over the keys: one that a model never
finds would hide what became of the others.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
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
from app.runs.wording import listed
from app.training.before_training import AFTER, BEFORE, SCALED, BeforeTraining
from app.training.measure import Measurement
from app.training.options import ModelOptions
from longlora_ext._pattern import dense_layers, sink
from longlora_ext._processes import is_first_process
from longlora_ext.config import context_length, rope_type_of

#: A digit that is guessed costs ln 10 = 2.3 nats. A model at more than this has not found it.
KNOWS = 1.5
#: What a run that kept retrieval may cost: nats per token of the key in the middle, and keys of the eight. In the
#: experiment of docs/extend.md scaling by yarn alone cost 0.26 and 3 keys. With the training, dense or with the first
#: token, it was 0.11 to 0.29 and up to 3 keys after 16 steps, at most 0.21 and none after 32; without the first token
#: 0.32 and 0.44, 3 and 4 keys.
MAY_LOSE, MAY_MISS = 0.25, 1
#: What training may cost beyond scaling: dense or with the first token it was at most 0.04, without it 0.07 and 0.18.
TRAINING_MAY_LOSE = 0.1
#: So many keys fewer, and retrieval is lost.
LOST = 3
WHEN = {BEFORE: "before", SCALED: "with RoPE scaled only", AFTER: "after"}

MORE_STEPS = "take more steps (docs/extend.md: keys that were lost after 16 were found after 32)"


@dataclass(frozen=True)
class Advice:
    """What may help a run that loses retrieval, without what it does already: where training did that, and scaling."""

    training: list[str]
    scaling: list[str]


def advise(options: ModelOptions, steps: int, base_config: PreTrainedConfig, config: PreTrainedConfig) -> Advice:
    """What may help a run, without what its model rules out.

    Args:
        options: Those of the run.
        steps: Its steps.
        base_config: The config before the extension.
        config: The extended one.
    """
    is_dense = options.dense_steps >= steps or len(dense_layers(config)) == config.num_hidden_layers
    may_see = not is_dense and not sink(config) and layers_for_sink(config) > 0
    training = ["let each token see the first one (--sink)"] if may_see else []
    training += ["lower --learning_rate", MORE_STEPS]
    training += [] if is_dense else ["train densely (--dense_steps as many as the steps)"]
    # Of a model that is scaled already the type is given. With ntk the config has another theta and no scaling.
    others = {"linear": "yarn or ntk", "yarn": "ntk"} if rope_type_of(base_config) == "default" else {}
    other = others.get(rope_type_of(config))
    scaling = [f"scale RoPE in another way (--rope_type {other})"] if other else []
    return Advice(training, [*scaling, "lower --context_length", MORE_STEPS])


class RetrievalGuard(BeforeTraining):
    """Asks for pass keys before and after a run, and keeps the results in `retrieval.json`.

    Args:
        folder: The run's output folder.
        tokenizer: The model's.
        base_config: The config before the extension.
        config: The extended config.
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
        config: PreTrainedConfig,
        advice: Advice,
        before: dict[str, Any] | None = None,
    ) -> None:
        self.file = folder / "retrieval.json"
        self.base_config = base_config
        self.advice = advice
        self.length = context_length(base_config)
        self.is_longer = context_length(config) > self.length
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

    def measure_scaled(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        """Ask for them where RoPE is scaled. Collective."""
        if self.is_longer:
            self.measure(model, args, SCALED)

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
        medians = {row: self._median(row) for row in WHEN if row in self.record}
        (before, found_before), (_, found_after) = medians[BEFORE], medians[AFTER]
        said = [f"{nats:.2f} {WHEN[row]}" for row, (nats, _) in medians.items()]
        found = [str(count) for _, count in medians.values()]
        head = (
            f"pass keys at {self.length:,} tokens, the model's own context: {listed(said)} nats per token (median); "
            f"{listed(found)} of {len(self.questions)} found"
        )
        if before > KNOWS and found_before <= MAY_MISS:
            return f"{head}. The base model does not find them either: it had nothing to lose"
        if _keeps(medians[BEFORE], medians[AFTER], MAY_LOSE):
            return f"{head}. Retrieval has survived"
        gained = "Perplexity improved, but retrieval" if perplexity and _improved(perplexity) else "Retrieval"
        became = "did not survive" if found_before - found_after >= LOST or not found_after else "has suffered"
        return f"{head}. {gained} {became}. {self._blame(medians)}"

    def _blame(self, medians: dict[str, tuple[float, int]]) -> str:
        """What took retrieval, scaling or training, as far as that is known; and what may help."""
        if SCALED not in medians:
            return f"What may help: {listed(self.advice.training, 'or')}"
        before, scaled, after = (medians[row] for row in (BEFORE, SCALED, AFTER))
        if _keeps(scaled, after, TRAINING_MAY_LOSE):
            return f"Scaling RoPE did that, not training. What may help: {listed(self.advice.scaling, 'or')}"
        if _keeps(before, scaled, MAY_LOSE):
            return f"Training did that, not scaling RoPE. What may help: {listed(self.advice.training, 'or')}"
        ways = [*self.advice.training, *(way for way in self.advice.scaling if way not in self.advice.training)]
        return f"Scaling RoPE and training did that. What may help: {listed(ways, 'or')}"

    def _median(self, row: str) -> tuple[float, int]:
        """The nats of the key in the middle, and how many were found."""
        nats = map(float, self.record[row]["nats"])  # what is not finite stands in a file as "nan"
        return median(math.inf if math.isnan(value) else value for value in nats), sum(self.record[row]["found"])


def _keeps(before: tuple[float, int], after: tuple[float, int], may_lose: float) -> bool:
    """Whether from one row to another no more is lost than so many nats, and a key."""
    return after[0] <= before[0] + may_lose and before[1] - after[1] <= MAY_MISS


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
        run.folder,
        tokenizer,
        base_config,
        config,
        advise(options, steps, base_config, config),
        run.marker.get("retrieval"),
    )
