"""Perplexity by position: how well a token is predicted with little before it, and with much.

Each document is read in windows of one length that do not overlap, each by itself, and the losses of its tokens are
averaged by their position in the window. A model that uses its context has a lower perplexity at later positions.
A cell is one window. A document's end that fills no window is left out, so that all positions have the same texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from app.evaluation.perplexity import Window, losses_by_position, perplexity_of
from app.evaluation.perplexity_task import PerplexityTask
from app.models.use_model import OpenedModel


class PositionTask(PerplexityTask):
    """Perplexity of a text by position.

    Args:
        options: As for `PerplexityTask`, and `by_position`: in how many parts of equal length.
        opened: The model.

    Raises:
        ValueError, OSError: As there, or more than one length, or too many parts.
    """

    def __init__(self, options: argparse.Namespace, opened: OpenedModel) -> None:
        length, *others = options.lengths or [opened.trained_length]
        if others:
            raise ValueError("--by_position reads windows of one length: give one --lengths")
        most = 2 * length // 3  # of more, the first part would be the first token alone, which nothing predicts
        if options.by_position > most:
            raise ValueError(
                f"--by_position {options.by_position} is too many parts for windows of {length} tokens: at most {most}"
            )
        super().__init__(options, opened)
        self.edges = [round(part * length / options.by_position) for part in range(options.by_position + 1)]
        del self.settings["stride"]
        self.settings |= {"score": "all tokens of windows that do not overlap", "by_position": self.edges}
        windows = {
            f"document-{number}-tokens-{begin}": Window(number, begin, begin + length, length - 1)
            for number, document in enumerate(self.documents)
            for begin in range(0, len(document) - length + 1, length)
        }
        self.cells = {cell: [window] for cell, window in windows.items()}

    def compute(self, cell: str, progress: Callable[[int], object]) -> dict[str, Any]:
        """Score a window."""
        (window,) = self.cells[cell]
        self.opened.forget_length()
        losses = losses_by_position(self.opened.model, self.documents, window, device=self.opened.model.device)
        progress(window.scored)
        # The first token is predicted by nothing: losses[i] is that of position i + 1.
        parts = np.split(losses, [edge - 1 for edge in self.edges[1:-1]])
        return {
            "negative_log_likelihood": float(losses.sum()),
            "scored": len(losses),
            "by_position": [float(part.sum()) for part in parts],
        }

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """By part of the window, perplexity and how many tokens were scored."""
        columns = zip(*(r["by_position"] for r in results.values()), strict=True)
        losses = [sum(map(float, column)) for column in columns]  # what is not finite stands in a file as "nan"
        begins = [1, *self.edges[1:-1]]
        scored = [len(results) * (end - begin) for begin, end in zip(begins, self.edges[1:], strict=True)]
        names = [f"{begin}-{end}" for begin, end in zip(self.edges, self.edges[1:], strict=False)]
        perplexity = [perplexity_of(*pair) for pair in zip(losses, scored, strict=True)]
        return {
            "perplexity": dict(zip(names, perplexity, strict=True)),
            "scored": dict(zip(names, scored, strict=True)),
            "windows": len(results),
        }

    def table(self, results: dict[str, dict[str, Any]]) -> str:
        """The results as text."""
        summary = self.summary(results)
        lines = [f"perplexity by position in {summary['windows']} windows of {self.lengths[0]:,} tokens", ""]
        lines.append(f"{'positions':<20}{'scored':>12}{'perplexity':>12}")
        for name, value in summary["perplexity"].items():
            lines.append(f"{name:<20}{summary['scored'][name]:>12,}{value:>12.3f}")
        return "\n".join(lines) + "\n"

    def draw(self, results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
        """Write the curve."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        path = folder / "by_position.png"
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        axes.stairs(list(self.summary(results)["perplexity"].values()), self.edges, baseline=None, lw=2)
        axes.set(xlabel="position in the window (tokens)", ylabel="perplexity")
        axes.set_title(Path(self.opened.description["model"]).name)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return [path]
