"""The plot of what `attention.py` measured: rates over the length, one curve for each provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from providers import PROVIDERS


def draw(run: dict[str, Any], path: Path) -> None:
    """Forward above, backward below, a column for each dtype, head dim and number of KV heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = run["points"]
    unit, scale = ("GFLOP/s", 1000) if points[0]["device"] == "cpu" else ("TFLOP/s", 1)
    shapes = list(dict.fromkeys((p["dtype"], p["head_dim"], p["heads"], p["kv_heads"]) for p in points))
    size = (3.4 * len(shapes) + 1.6, 6)
    figure, axes = pyplot.subplots(2, len(shapes), figsize=size, squeeze=False, layout="constrained", sharex=True)
    for column, shape in enumerate(shapes):
        chosen = [p for p in points if (p["dtype"], p["head_dim"], p["heads"], p["kv_heads"]) == shape]
        for axis, direction in zip(axes[:, column], ("forward", "backward"), strict=True):
            for index, name in enumerate(chosen[0]["results"]):
                curve = [
                    (p["seqlen"], p["results"][name][direction]["tflops"] * scale)
                    for p in chosen
                    if direction in p["results"][name]
                ]
                if curve:
                    width = 2.5 if name == "ours" else 1.2
                    axis.plot(*zip(*curve, strict=True), ".-", lw=width, color=f"C{index}", label=PROVIDERS[name].label)
            axis.axhline(run["matmul_tflops"][shape[0]] * scale, color="0.5", ls="--", lw=1, label="torch.mm")
            axis.set(xscale="log", ylim=(0, None))
            axis.set_xticks([p["seqlen"] for p in chosen], [f"{p['seqlen'] / 1024:g}k" for p in chosen])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0, column].set_title("{}, head dim {}, heads {}/{}".format(*shape), fontsize="medium")
        axes[1, column].set_xlabel("tokens")
    for axis, direction in zip(axes[:, 0], ("forward", "backward"), strict=True):
        axis.set_ylabel(f"{direction}, {unit}")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    machine = f"{run['environment']['device']}, torch {run['environment']['torch']}"
    figure.suptitle(f"rates over attended pairs; {machine}", fontsize="medium")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
