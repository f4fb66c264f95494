"""Which learning rate suits an arm: the loss of the same first steps at each, the same effort for every arm.

A step's loss is taken before the step learns from it, and no text comes twice: it is a loss on text that the model
has not seen, with the attention that the arm is trained with. So rates compare within an arm, not arms with each other.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from extending.arms import ARMS
from extending.training import WARMUP, Recipe


def searched(arm: str, recipe: Recipe, history: list[dict[str, float]]) -> dict[str, Any]:
    """What the first steps of an arm say, of which the log may hold more."""
    first = history[: recipe.steps]
    return {
        "arm": arm,
        "seed": recipe.seed,
        "training": {
            "learning_rate": recipe.learning_rate,
            "steps": recipe.steps,
            "loss": [entry["loss"] for entry in first],
            "gradient_norm": [entry["grad_norm"] for entry in first],
        },
    }


def search_table(content: dict[str, Any]) -> str:
    """Markdown: a row for each arm, a column for each rate, the lowest loss of a row in bold."""
    found = {(entry["arm"], entry["training"]["learning_rate"]): entry["training"] for entry in content["search"]}
    losses = {place: fmean(training["loss"][WARMUP:]) for place, training in found.items()}
    rates = sorted({rate for _, rate in found})
    steps = content["search"][0]["training"]["steps"]
    head = [f"mean loss of steps {WARMUP + 1} to {steps} (largest gradient norm)", *(f"{rate:g}" for rate in rates)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in (name for name in ARMS if any(place[0] == name for place in found)):
        best = min(loss for place, loss in losses.items() if place[0] == arm)
        cells = [ARMS[arm].says]
        for rate in rates:
            if (arm, rate) not in found:
                cells.append("")
                continue
            loss = losses[arm, rate]
            norm = max(found[arm, rate]["gradient_norm"][WARMUP:])
            cells.append(f"{f'**{loss:.3f}**' if loss == best else f'{loss:.3f}'} ({norm:.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
