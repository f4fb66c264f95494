"""The table and the plots of what the experiment found."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from extending.measures import mean


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
        *(f"ppl {span}" for span in spans),
        f"ppl of {_k(arms[0]['short']['window'])} alone",
        f"key at {own:,}",
        f"key at {new:,}",
    ]
    head += [*(f"copy {_k(distance)}" for distance in far), "s a step"]
    lines = [
        f"{setting['model']} to {context:,} tokens, one sequence of it a step, "
        f"learning rate {setting['learning_rate']:g}, {setting['text']}; dense attention. Perplexity of held-out "
        "documents by position; pass keys and copied tokens: nats per token of what is right, and how many keys are "
        "found.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for result in arms:
        positions = zip(*result["by_position"]["nats"].values(), strict=True)
        cells = [f"{result['says']}" + (f" (seed {result['seed']})" if result["seed"] else "")]
        cells.append(f"{result['training']['steps']}" if result["training"] else "")
        cells += [f"{math.exp(min(mean(part), 99)):.2f}" for part in positions]
        cells.append(f"{math.exp(result['short']['nats']):.2f}")
        for which in ("own", "new"):
            keys = result[f"pass_key_{which}"]
            cells.append(f"{mean(keys['nats']):.3f} ({sum(keys['found'])} of {len(keys['found'])})")
        cells += [f"{nats:.2f}" for nats in result["copying"]["nats"]]
        cells.append(f"{result['training']['seconds_a_step']:.3g}" if result["training"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(content: dict[str, Any]) -> str:
    """The few columns of it that tell the most, for `README.md`."""
    first = content["arms"][0]
    begin, end = first["by_position"]["edges"][-2:]
    far = first["copying"]["distances"][-2]
    own, new = (first[f"pass_key_{which}"]["length"] for which in ("own", "new"))
    head = [
        "SmolLM2-135M",
        f"perplexity, tokens {_k(begin)} to {_k(end)}",
        f"pass keys found at {own:,} tokens (nats)",
        f"at {new:,} (nats)",
        f"copying over {_k(far)} (nats)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in content["arms"]:
        steps = f", {result['training']['steps']} steps" if result["training"] else ""
        cells = [result["says"] + steps]
        cells.append(f"{math.exp(min(mean([part[-1] for part in result['by_position']['nats'].values()]), 99)):.2f}")
        for which in ("own", "new"):
            keys = result[f"pass_key_{which}"]
            cells.append(f"{sum(keys['found'])} of {len(keys['found'])} ({mean(keys['nats']):.2f})")
        cells.append(f"{result['copying']['nats'][-2]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
        positions = [mean(part) for part in zip(*result["by_position"]["nats"].values(), strict=True)]
        steps = f", {result['training']['steps']} steps" if result["training"] else ""
        text.plot(middles, positions, label=result["says"] + steps, **style)
        copies.plot(result["copying"]["distances"], result["copying"]["nats"], **style)
        keys.plot(result["pass_key_new"]["depths"], result["pass_key_new"]["nats"], **style)
        if result["training"]:
            spent = result["training"]["processor_seconds_a_step"] * result["training"]["steps"] / 60
            costs.plot(spent, mean(result["pass_key_own"]["nats"]), **style)
    new = content["arms"][0]["pass_key_new"]["length"]
    text.set(title="text by position", xlabel="position (tokens)", ylabel="nats per token", ylim=(0, 6))
    copies.set(title="copying", xlabel="distance (tokens)", ylabel="nats per token of the repetition", xscale="log")
    keys.set(title=f"pass key at {new:,} tokens", xlabel="depth", ylabel="nats per token of the key")
    costs.set(
        title="pass key at the model's own length", xlabel="minutes of a processor in training", ylabel="nats per token"
    )
    figure.legend(*text.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def _k(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens else str(tokens)
