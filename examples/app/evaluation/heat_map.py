"""How well a model found what it was asked for, over the length of the text and something else, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def heat_map(
    shares: np.ndarray,
    lengths: Sequence[int],
    names: Sequence[float | str],
    path: str | Path,
    title: str,
    *,
    rows: str = "depth of the needle",
    values: str = "answered exactly",
    most: float = 1,
) -> None:
    """Draw a heat map.

    Args:
        shares: Such as the share of right answers, in 0..`most`, [rows, lengths].
        lengths: Tokens of the text, one a column.
        names: What each row is: a name, or the share of the text before the needle.
        path: The PNG to write.
        title: What stands above it.
        rows: What the rows are.
        values: What the colours are.
        most: The value of the last colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, count = len(lengths), len(names)
    size = (max(5, 2.5 + 0.8 * columns), max(3, 1.5 + 0.5 * count))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=most, aspect="auto")
    axes.set(title=title, xlabel="length (tokens)", ylabel=rows)
    axes.set_xticks(range(columns), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(count), [name if isinstance(name, str) else f"{name:.0%}" for name in names])
    for row in range(count):
        for column in range(columns):
            colour = "black" if shares[row, column] > most / 2 else "white"
            axes.text(column, row, f"{shares[row, column]:.2g}", color=colour, ha="center", va="center", fontsize=9)
    figure.colorbar(image, label=values)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
