"""The picture of what the experiment found: a colour for each arm, a marker for each number of steps and rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from extending.arms import ARMS
from extending.show import dtype_of, losses_by_position, thousands

Result = dict[str, Any]
#: The arms that have curves, of which more could not be told apart. All are in the rows below them.
CURVES = ("base", "yarn", "s2", "s2-sink", "short-drawn-alone", "short", "dense")
#: In the order of the rows, in which neighbours are to be compared.
COLOURS = {
    "base": "black",
    "linear": "tab:brown",
    "ntk": "olive",
    "yarn": "tab:gray",
    "s2": "tab:orange",
    "s2-linear": "tomato",
    "s2-sink": "tab:blue",
    "s2-ntk-sink": "teal",
    "s2-sink-dense-steps": "deepskyblue",
    "s2-sink-dense-layers": "navy",
    "window8-sink": "tab:green",
    "window16-sink-dense-steps": "yellowgreen",
    "short-drawn-alone": "tab:purple",
    "short": "orchid",
    "dense": "tab:red",
}


def draw(content: dict[str, Any], path: Path) -> None:
    """A row for each arm; and in a file `_curves` text by position, copying by distance, keys by depth, what training
    took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    setting = content["setting"]
    results = sorted(content["arms"], key=lambda result: list(COLOURS).index(result["arm"]))
    styles = Styles(results)
    what = f"{setting['model']} extended to {setting['context']:,} tokens on {setting['text']}"
    rate = f", trained at {styles.rates[0]:g}" if styles.rates else ""

    curves, ((text, copies), (keys, costs)) = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    curves.suptitle(f"{what}; some arms{rate}: lower is better")
    draw_text(text, results, styles)
    draw_copies(copies, results, styles)
    draw_keys(keys, results, styles)
    draw_costs(costs, results, styles)

    columns = columns_of(results[0])
    rows, axes = pyplot.subplots(1, len(columns), sharey=True, figsize=(13, 6), layout="constrained")
    rows.suptitle(f"{what}; a mark for each seed: further left is better")
    for axis, column in zip(axes, columns, strict=True):
        draw_rows(axis, column, results, styles)
    for figure, name in ((curves, f"{path.stem}_curves.png"), (rows, f"{path.stem}.png")):
        arms = styles.curves(results) if figure is curves else []
        figure.legend(handles=[*arms, *styles.key()], loc="outside lower center", ncols=3 if arms else 5, frameon=False)
        figure.savefig(path.with_name(name), dpi=110)
        pyplot.close(figure)


class Styles:
    """How a result looks: the colour says which arm, the marker how many steps, its filling which rate. Seeds look the
    same."""

    def __init__(self, results: Sequence[Result]) -> None:
        trained = [result["training"] for result in results if result["training"]]
        self.recipes = {(training["steps"], training["learning_rate"]) for training in trained}
        self.steps = sorted({steps for steps, _ in self.recipes}, reverse=True)
        by_rate = [training["learning_rate"] for training in trained]
        self.rates = sorted(set(by_rate), key=by_rate.count, reverse=True)

    def has_curve(self, result: Result) -> bool:
        """Of the rate of most results, which are compared so."""
        training = result["training"]
        return result["arm"] in CURVES and (not training or training["learning_rate"] == self.rates[0])

    def of(self, result: Result) -> dict[str, Any]:
        """For matplotlib."""
        training = result["training"]
        return {"color": COLOURS[result["arm"]]} | (
            self.trained(training["steps"], training["learning_rate"]) if training else {"marker": "D", "ls": ":"}
        )

    def trained(self, steps: int, rate: float) -> dict[str, Any]:
        """But for the colour."""
        place = self.steps.index(steps)
        fill = ("full", "none", "left", "right")[min(self.rates.index(rate), 3)]
        return {"marker": "os^v"[place % 4], "ls": ("-", "--", "-.")[min(place, 2)], "fillstyle": fill}

    def curves(self, results: Sequence[Result]) -> list[Any]:
        """What the colours of the curves mean."""
        from matplotlib.lines import Line2D

        shown = dict.fromkeys(result["arm"] for result in filter(self.has_curve, results))
        return [Line2D([], [], color=COLOURS[arm], lw=3, label=ARMS[arm].says) for arm in shown]

    def key(self) -> list[Any]:
        """What the markers mean."""
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color="0.3", marker="D", ls=":", label="not trained (the dotted line: YaRN alone)")]
        for steps, rate in sorted(self.recipes, reverse=True):
            label = f"{steps} steps at {rate:g}"
            lines.append(Line2D([], [], color="0.3", label=label, **self.trained(steps, rate)))
        return lines


def draw_text(axis: Any, results: Sequence[Result], styles: Styles) -> None:
    """Losses by position, from the lowest to 0.8 above it, where all that is of use lies."""
    lowest = min(min(losses_by_position(result)) for result in results)
    top = lowest + 0.8
    beyond = []
    for result in filter(styles.has_curve, results):
        losses = losses_by_position(result)
        middles = [(begin + end) / 2 for begin, end in pairwise(result["by_position"]["edges"])]
        axis.plot(middles, losses, **styles.of(result))
        if max(losses) > top:
            beyond.append(f"{ARMS[result['arm']].says}: cut off, it rises to {max(losses):.1f}")
    context = results[0]["by_position"]["edges"][-1]
    own = results[0]["pass_key_own"]["length"] * 128 // 125  # of which keys are asked for, so that an answer fits
    axis.axvline(own, color="0.6", lw=1, zorder=0)
    axis.text(own, lowest - 0.08, f"the model is made for {own:,} ", ha="right", size="small", color="0.4")
    axis.set(title="text by position", xlabel="position (tokens)", ylabel="nats per token")
    axis.set(ylim=(lowest - 0.1, top), xlim=(0, context), xticks=[context * part // 8 for part in range(0, 9, 2)])
    axis.xaxis.set_major_formatter(lambda tokens, _: thousands(int(tokens)))
    axis.grid(alpha=0.3)
    axis.text(0.02, 0.98, "\n".join(beyond), transform=axis.transAxes, va="top", size="small")


def draw_copies(axis: Any, results: Sequence[Result], styles: Styles) -> None:
    """Losses of copies by distance. Those of one distance can be compared: each has places of its own."""
    distances = results[0]["copying"]["distances"]
    for result in filter(styles.has_curve, results):
        axis.plot(distances, result["copying"]["nats"], **styles.of(result))
    first = median(result["copying"]["first_time"] for result in results)
    axis.axhline(first, color="0.6", lw=1)
    axis.text(distances[0], first + 0.1, "tokens that come for the first time", size="small", color="0.4")
    axis.set(title="copying random tokens (compare arms, not distances)", xlabel="distance (tokens)", xscale="log")
    axis.set_xticks(distances, map(thousands, distances))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set(ylabel="nats per token of the repetition", ylim=(0, None))


def draw_keys(axis: Any, results: Sequence[Result], styles: Styles) -> None:
    """Losses of the pass keys at the new length by depth; what is beyond 5 is cut off."""
    for result in filter(styles.has_curve, results):
        axis.plot(result["pass_key_new"]["depths"], result["pass_key_new"]["nats"], **styles.of(result))
    length = results[0]["pass_key_new"]["length"]
    axis.set(title=f"pass keys at {length:,} tokens by depth", xlabel="share of the text before the key")
    axis.set(ylabel="nats per token of the key", yscale="log", ylim=(0.05, 5))
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def draw_costs(axis: Any, results: Sequence[Result], styles: Styles) -> None:
    """What copying became for the time that a processor spent on the training. By the clock, arms that ran beside other
    work could not be compared, nor can those of another dtype than most. Arms with curves are above the others."""
    dtypes = list(map(dtype_of, results))
    dtype = max(dtypes, key=dtypes.count)
    of_dtype = [result for result in results if dtype_of(result) == dtype]
    for result in sorted(of_dtype, key=lambda result: result["arm"] in CURVES):
        cost = result["training"]
        spent = cost["processor_seconds_a_step"] * cost["steps"] / 60 if cost else 0
        if cost or result["arm"] == "yarn":
            size = 7 if result["arm"] in CURVES else 11
            axis.plot(spent, result["copying"]["nats"][-2], **styles.of(result) | {"ls": "", "ms": size})
    far = thousands(results[0]["copying"]["distances"][-2])
    axis.set(title=f"copying over {far} by time spent (all arms in {dtype})", ylabel="nats per token of the repetition")
    axis.set(xlabel="minutes of a processor in training")
    axis.grid(alpha=0.3)


class Column(NamedTuple):
    """What the rows show, of which less is better."""

    title: str
    unit: str
    value: Callable[[Result], float]


def columns_of(result: Result) -> list[Column]:
    """Those of the summary's table."""
    begin, end = map(thousands, result["by_position"]["edges"][-2:])
    far = thousands(result["copying"]["distances"][-2])
    own, new = (result[f"pass_key_{which}"]["length"] for which in ("own", "new"))
    return [
        Column(f"text, tokens {begin} to {end}", "perplexity", lambda r: math.exp(min(losses_by_position(r)[-1], 99))),
        Column(f"pass keys at {own:,} tokens", "nats per token, median", lambda r: median(r["pass_key_own"]["nats"])),
        Column(f"pass keys at {new:,} tokens", "nats per token, median", lambda r: median(r["pass_key_new"]["nats"])),
        Column(f"copying over {far}", "nats per token", lambda r: r["copying"]["nats"][-2]),
    ]


def draw_rows(axis: Any, column: Column, results: Sequence[Result], styles: Styles) -> None:
    """A row for each arm; what is far worse than YaRN and all trained ones stands at the edge, with its number."""
    names = [name for name in COLOURS if any(result["arm"] == name for result in results)]
    of_all = [column.value(result) for result in results]
    compared = [column.value(result) for result in results if result["training"] or result["arm"] == "yarn"] or of_all
    room = 0.1 * (max(compared) - min(of_all)) or 0.1 * max(of_all)
    left, right = min(of_all) - room, max(compared) + room
    for result in results:
        row, value, style = names.index(result["arm"]), column.value(result), styles.of(result) | {"ls": "", "ms": 8}
        if value <= right:
            axis.plot(value, row + _below(result, results), **style)
        else:
            axis.annotate(
                f"{value:.3g} →", (right, row), (-4, 0), textcoords="offset points", ha="right", va="center",
                color=style["color"], weight="bold", bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
        if result["arm"] == "yarn":
            axis.axvline(value, color=style["color"], ls=":", zorder=0)
    axis.set(xlabel=column.unit, xlim=(left, right), ylim=(len(names) - 0.5, -0.5))
    axis.set_title(column.title, size="medium")
    axis.set_yticks(range(len(names)), [ARMS[name].says.replace(", ", ",\n") for name in names])
    for tick, name in zip(axis.get_yticklabels(), names, strict=False):  # none where another column has them
        tick.set_color(COLOURS[name])
    axis.grid(alpha=0.3)


def _below(result: Result, results: Sequence[Result]) -> float:
    """How far below the middle of its row a result stands: most steps above it, fewer below, all on it if there are no
    others."""
    steps = {other["training"]["steps"] for other in results if other["arm"] == result["arm"] and other["training"]}
    if len(steps) < 2:
        return 0
    return -0.16 if result["training"]["steps"] == max(steps) else 0.16
