"""The table of what the experiment found, and the few columns of it that pages show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from extending.arms import ARMS

COSTS = ("seconds_a_step", "processor_seconds_a_step", "tokens_a_second")


def table(content: dict[str, Any]) -> str:
    """A row for each arm, number of steps and seed."""
    setting, arms = content["setting"], content["arms"]
    context = setting["context"]
    bounds = arms[0]["by_position"]["edges"]
    spans = [f"{thousands(begin)}-{thousands(end)}" for begin, end in pairwise(bounds)]
    far = arms[0]["copying"]["distances"]
    own, new = (arms[0][f"pass_key_{which}"]["length"] for which in ("own", "new"))
    head = [
        "arm",
        "steps",
        "rate",
        *(f"ppl {span}" for span in spans),
        f"ppl of {thousands(arms[0]['short']['window'])} alone",
        f"key at {own:,}",
        f"key at {new:,}",
    ]
    head += [f"copy {thousands(distance)}" for distance in far]
    head += ["s a step", "s of a core", "tokens a s", "peak GiB"]
    said = (
        f"{setting['model']} to {context:,} tokens, one sequence of it a step, "
        f"{setting['text']}; dense attention. Perplexity of held-out documents by position; pass keys: nats per token "
        "of the right one, the median over the depths, and how many are found; copying: nats per token of the "
        "repetition, the mean over the spans ± its standard error, where those of each span were kept. Seconds a step "
        "are by the clock, which other programs disturb, and of the process on its cores. The peak of memory is the "
        "training's on a GPU, and on a CPU the process's, with all that it did before."
    )

    def cells(result: dict[str, Any]) -> Iterable[str]:
        yield _name(result)
        yield from (
            f"{result['training'][what]:g}" if result["training"] else "" for what in ("steps", "learning_rate")
        )
        yield from map(_perplexity, [*losses_by_position(result), result["short"]["nats"]])
        for which in ("own", "new"):
            keys = result[f"pass_key_{which}"]
            yield f"{median(keys['nats']):.3f} ({_found(keys)})"
        yield from _copies(result["copying"])
        cost = result["training"]
        yield from (f"{cost[what]:.3g}" if cost else "" for what in COSTS)
        yield f"{cost['peak_memory'] / 2**30:.2f}" if cost else ""

    return f"{said}\n\n{_rows(head, map(cells, arms))}"


def summary(content: dict[str, Any], arms: str | None = None, rate: str | None = None) -> str:
    """The few columns of it that tell the most.

    Args:
        content: A file of results.
        arms: Which, in this order, with commas between them; None: all.
        rate: The learning rate of those that are trained; None: any.
    """
    wanted = arms.split(",") if arms else list(ARMS)
    if missing := set(wanted) - {*ARMS}:
        raise ValueError(f"no arms of extension.py: {sorted(missing)}")
    results = [
        result
        for name in wanted
        for result in content["arms"]
        if result["arm"] == name
        and (rate is None or not result["training"] or result["training"]["learning_rate"] == float(rate))
    ]
    first = results[0]
    begin, end = first["by_position"]["edges"][-2:]
    far = first["copying"]["distances"][-2]
    own, new = (first[f"pass_key_{which}"]["length"] for which in ("own", "new"))
    head = [
        "SmolLM2-135M",
        f"perplexity, tokens 0 to {thousands(first['by_position']['edges'][1])}",
        f"{thousands(begin)} to {thousands(end)}",
        f"pass keys found at {own:,} tokens (loss)",
        f"at {new:,} (loss)",
        f"copying over {thousands(far)} (loss)",
    ]

    def cells(result: dict[str, Any]) -> Iterable[str]:
        yield _name_and_steps(result, with_rate=rate is None)
        by_position = losses_by_position(result)
        yield from map(_perplexity, (by_position[0], by_position[-1]))
        for which in ("own", "new"):
            keys = result[f"pass_key_{which}"]
            yield f"{_found(keys)} ({median(keys['nats']):.2f})"
        yield f"{result['copying']['nats'][-2]:.2f}"

    return _rows(head, map(cells, results))


def _rows(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def dtype_of(result: dict[str, Any]) -> str:
    """In which it was computed. Older results do not say."""
    return str(result["made"].get("dtype", "bfloat16"))


def _name(result: dict[str, Any]) -> str:
    dtype = dtype_of(result)
    differs = [f"seed {result['seed']}"] * bool(result["seed"]) + [dtype] * (dtype != "bfloat16")
    says = ARMS[result["arm"]].says
    return f"{says} ({', '.join(differs)})" if differs else says


def _name_and_steps(result: dict[str, Any], with_rate: bool = True) -> str:
    if not (training := result["training"]):
        return _name(result)
    rate = f" at {training['learning_rate']:g}" if with_rate else ""
    return f"{_name(result)}, {training['steps']} steps{rate}"


def losses_by_position(result: dict[str, Any]) -> list[float]:
    """Nats per token by position, the mean over the documents."""
    return list(map(fmean, zip(*result["by_position"]["nats"].values(), strict=True)))


def _copies(copying: dict[str, Any]) -> Iterable[str]:
    """The mean of each distance, and its standard error where the spans' own were kept, which older results lack."""
    spans = copying.get("of_each", [[]] * len(copying["nats"]))
    for nats, of_each in zip(copying["nats"], spans, strict=True):
        yield f"{nats:.2f} ± {stdev(of_each) / math.sqrt(len(of_each)):.2f}" if len(of_each) > 1 else f"{nats:.2f}"


def _perplexity(nats: float) -> str:
    return f"{math.exp(min(nats, 99)):.2f}"


def _found(keys: dict[str, Any]) -> str:
    return f"{sum(keys['found'])} of {len(keys['found'])}"


def thousands(tokens: int) -> str:
    """Tokens in words: 8k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens else str(tokens)
