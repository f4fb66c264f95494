"""The plot of what `attention.py` measured: rates and time over the length, one curve for each provider.

python benchmarks/draw.py benchmarks/results/attention_cpu.json                            all shapes
python benchmarks/draw.py benchmarks/results/attention_cpu.json head_dim=128 kv_heads=8    some of them
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from providers import PROVIDERS


def style(index: int, name: str) -> dict[str, Any]:
    return {"lw": 2.5 if name == "ours" else 1.2, "color": f"C{index % 10}", "ls": "-" if index < 10 else ":"}


def draw(run: dict[str, Any], path: Path) -> None:
    """Rates of forward and backward, below them the time of both; a column for each dtype, head dim and KV heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = run["points"]
    unit, scale = ("GFLOP/s", 1000) if points[0]["device"] == "cpu" else ("TFLOP/s", 1)
    shapes = list(dict.fromkeys((p["dtype"], p["head_dim"], p["heads"], p["kv_heads"]) for p in points))
    size = (3.4 * len(shapes) + 1.6, 9)
    figure, axes = pyplot.subplots(3, len(shapes), figsize=size, squeeze=False, layout="constrained", sharex=True)
    for column, shape in enumerate(shapes):
        chosen = [p for p in points if (p["dtype"], p["head_dim"], p["heads"], p["kv_heads"]) == shape]
        for axis, direction in zip(axes[:2, column], ("forward", "backward"), strict=True):
            for index, name in enumerate(chosen[0]["results"]):
                curve = [
                    (p["seqlen"], p["results"][name][direction]["tflops"] * scale)
                    for p in chosen
                    if direction in p["results"][name]
                ]
                if curve:
                    axis.plot(*zip(*curve, strict=True), marker=".", **style(index, name), label=PROVIDERS[name].label)
            axis.axhline(run["matmul_tflops"][shape[0]] * scale, color="0.5", ls="--", lw=1, label="torch.mm")
            axis.set(ylim=(0, None))
        for index, name in enumerate(chosen[0]["results"]):
            both = [
                (p["seqlen"], (p["results"][name]["forward"]["ms"] + p["results"][name]["backward"]["ms"]) / p["batch"])
                for p in chosen
                if {"forward", "backward"} <= p["results"][name].keys()
            ]
            if both:
                axes[2, column].plot(*zip(*both, strict=True), marker=".", **style(index, name))
        axes[2, column].set(yscale="log")
        for axis in axes[:, column]:
            axis.set(xscale="log")
            axis.set_xticks([p["seqlen"] for p in chosen], [f"{p['seqlen'] / 1024:g}k" for p in chosen], size="x-small")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title("{}, head dim {}, heads {}/{}".format(*shape), fontsize="medium")
        axes[2, column].set_xlabel("tokens")
    for axis, label in zip(axes[:, 0], (f"forward, {unit}", f"backward, {unit}", "both, ms a row"), strict=True):
        axis.set_ylabel(label)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    machine = f"{run['environment']['device']}, torch {run['environment']['torch']}"
    figure.suptitle(f"rates over attended pairs; {machine}", fontsize="medium")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        sys.exit((__doc__ or "").strip())
    path, *only = arguments
    run = json.loads(Path(path).read_text())
    for key, value in (condition.split("=") for condition in only):
        run["points"] = [point for point in run["points"] if str(point[key]) in value.split(",")]
    draw(run, Path(path).with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
