"""The table and the plots of what the experiment found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from extending.arms import ARMS


def table(content: dict[str, Any]) -> str:
    """A row for each arm, number of steps and seed."""
    setting, arms = content["setting"], content["arms"]
    context = setting["context"]
    bounds = arms[0]["by_position"]["edges"]
    spans = [f"{_k(begin)}-{_k(end)}" for begin, end in pairwise(bounds)]
    far = arms[0]["copying"]["distances"]
    own, new = (arms[0][f"pass_key_{which}"]["length"] for which in ("own", "new"))
    head = [
        "arm",
        "steps",
        "rate",
        *(f"ppl {span}" for span in spans),
        f"ppl of {_k(arms[0]['short']['window'])} alone",
        f"key at {own:,}",
        f"key at {new:,}",
    ]
    head += [*(f"copy {_k(distance)}" for distance in far), "s a step"]
    said = (
        f"{setting['model']} to {context:,} tokens, one sequence of it a step, "
        f"{setting['text']}; dense attention. Perplexity of held-out "
        "documents by position; pass keys: nats per token of the right one, the median over the depths, and how many "
        "are found; copying: nats per token of the repetition."
    )

    def cells(result: dict[str, Any]) -> Iterable[str]:
        yield _name(result)
        yield from (
            f"{result['training'][what]:g}" if result["training"] else "" for what in ("steps", "learning_rate")
        )
        yield from map(_perplexity, [*_by_position(result), result["short"]["nats"]])
        for which in ("own", "new"):
            keys = result[f"pass_key_{which}"]
            yield f"{median(keys['nats']):.3f} ({_found(keys)})"
        yield from (f"{nats:.2f}" for nats in result["copying"]["nats"])
        yield f"{result['training']['seconds_a_step']:.3g}" if result["training"] else ""

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
        f"perplexity, tokens 0 to {_k(first['by_position']['edges'][1])}",
        f"{_k(begin)} to {_k(end)}",
        f"pass keys found at {own:,} tokens (loss)",
        f"at {new:,} (loss)",
        f"copying over {_k(far)} (loss)",
    ]

    def cells(result: dict[str, Any]) -> Iterable[str]:
        yield _name_and_steps(result, with_rate=rate is None)
        by_position = _by_position(result)
        yield from map(_perplexity, (by_position[0], by_position[-1]))
        for which in ("own", "new"):
            keys = result[f"pass_key_{which}"]
            yield f"{_found(keys)} ({median(keys['nats']):.2f})"
        yield f"{result['copying']['nats'][-2]:.2f}"

    return _rows(head, map(cells, results))


def draw(content: dict[str, Any], path: Path) -> None:
    """Perplexity over position, copying over distance, pass keys over depth, and what was gained over time spent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((text, copies), (keys, costs)) = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for index, result in enumerate(content["arms"]):
        style = {"color": f"C{index % 10}", "ls": "-" if result["training"] else ":", "marker": "o", "ms": 4}
        bounds = result["by_position"]["edges"]
        middles = [(begin + end) / 2 for begin, end in pairwise(bounds)]
        text.plot(middles, _by_position(result), label=_name_and_steps(result), **style)
        copies.plot(result["copying"]["distances"], result["copying"]["nats"], **style)
        keys.plot(result["pass_key_new"]["depths"], result["pass_key_new"]["nats"], **style)
        if result["training"]:
            spent = result["training"]["processor_seconds_a_step"] * result["training"]["steps"] / 60
            costs.plot(spent, median(result["pass_key_own"]["nats"]), **style)
    new = content["arms"][0]["pass_key_new"]["length"]
    text.set(title="text by position", xlabel="position (tokens)", ylabel="nats per token", ylim=(0, 6))
    copies.set(title="copying", xlabel="distance (tokens)", ylabel="nats per token of the repetition", xscale="log")
    keys.set(title=f"pass key at {new:,} tokens", xlabel="depth", ylabel="nats per token of the key")
    costs.set(
        title="pass keys at the model's own length",
        xlabel="minutes of a processor in training",
        ylabel="nats per token",
    )
    figure.legend(*text.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _rows(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def _name(result: dict[str, Any]) -> str:
    says = ARMS[result["arm"]].says
    return f"{says} (seed {result['seed']})" if result["seed"] else says


def _name_and_steps(result: dict[str, Any], with_rate: bool = True) -> str:
    if not (training := result["training"]):
        return _name(result)
    rate = f" at {training['learning_rate']:g}" if with_rate else ""
    return f"{_name(result)}, {training['steps']} steps{rate}"


def _by_position(result: dict[str, Any]) -> list[float]:
    """Nats per token by position, the mean over the documents."""
    return list(map(fmean, zip(*result["by_position"]["nats"].values(), strict=True)))


def _perplexity(nats: float) -> str:
    return f"{math.exp(min(nats, 99)):.2f}"


def _found(keys: dict[str, Any]) -> str:
    return f"{sum(keys['found'])} of {len(keys['found'])}"


def _k(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens else str(tokens)
