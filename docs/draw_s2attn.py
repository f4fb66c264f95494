"""Draws docs/s2attn.png, the README's picture of S2-Attn, from the reference's own masks.

python docs/draw_s2attn.py
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from longlora_ext.reference import s2attn_mask

SEQLEN, GROUP_SIZE, WINDOW = 16, 4, 3
#: By who sees a key: nobody, half of the heads, the shifted half, both; and both, by the sink alone.
COLORS = ["#eceff3", "#4c8fd6", "#f2a03d", "#6b5b95", "#1b9e77"]
WORDS = ["unshifted heads", "shifted heads", "all heads", "the sink"]
PANELS = [
    ("groups\ns2attn(q, k, v, 4)", GROUP_SIZE, {}),
    ("groups and the sink\ns2attn(q, k, v, 4, sink=True)", GROUP_SIZE, {"sink": True}),
    ("a window and the sink\ns2attn(q, k, v, 32, sink=True, window=3)", 2 * SEQLEN, {"sink": True, "window": WINDOW}),
]


def draw(path: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 5), layout="constrained", facecolor="white")
    for ax, (title, group_size, pattern) in zip(axes, PANELS, strict=True):

        def seen(shifted: bool, pattern: dict[str, Any], group_size: int = group_size) -> Tensor:
            return s2attn_mask(SEQLEN, group_size, shifted, **pattern)

        who = seen(False, pattern).int() + 2 * seen(True, pattern).int()
        without = {**pattern, "sink": False}
        who[(who > 0) & ~seen(False, without) & ~seen(True, without)] = 4
        ax.pcolormesh(who.numpy(), cmap=ListedColormap(COLORS), vmin=0, vmax=4, edgecolors="white", linewidth=1.2)
        ax.set_title(title, fontsize=11)
        ax.set(xlabel="key", ylabel="query", xticks=[], yticks=[], aspect="equal")
        ax.invert_yaxis()
        ax.spines[:].set_visible(False)
    patches = [Patch(color=color, label=word) for color, word in zip(COLORS[1:], WORDS, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=11)
    figure.suptitle(f"What each of {SEQLEN} tokens sees: a row is a query, a column a key\n", fontsize=13)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("s2attn.png"))
