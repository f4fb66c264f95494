"""How often a model found what it was asked for, over the length of the text and the depth of the needle, as a
picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def heat_map(shares: np.ndarray, lengths: Sequence[int], depths: Sequence[float], path: str | Path, title: str) -> None:
    """Draw a heat map.

    Args:
        shares: Share of right answers in 0..1, [depths, lengths].
        lengths: Tokens of the text, one a column.
        depths: Share of the text before the needle, one a row.
        path: The PNG to write.
        title: What stands above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, rows = len(lengths), len(depths)
    size = (max(5, 2.5 + 0.8 * columns), max(3, 1.5 + 0.5 * rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set(title=title, xlabel="length (tokens)", ylabel="depth of the needle")
    axes.set_xticks(range(columns), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(rows), [f"{depth:.0%}" for depth in depths])
    for row in range(rows):
        for column in range(columns):
            colour = "black" if shares[row, column] > 0.5 else "white"
            axes.text(column, row, f"{shares[row, column]:.2g}", color=colour, ha="center", va="center", fontsize=9)
    figure.colorbar(image, label="answered exactly")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
