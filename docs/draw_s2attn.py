"""Draws docs/s2attn.png, the README's picture of S2-Attn, from the reference's own masks.

python docs/draw_s2attn.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from longlora_ext.reference import s2attn_mask

SEQLEN, GROUP_SIZE = 16, 4
PANELS = [
    ("dense causal attention\n(inference)", 2 * SEQLEN, False, "0.75"),
    ("S2-Attn, first half of the heads\n(training)", GROUP_SIZE, False, "tab:blue"),
    ("S2-Attn, second half: shifted by G/2\n(training)", GROUP_SIZE, True, "tab:orange"),
]


def draw(path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    for ax, (title, group_size, shifted, color) in zip(axes, PANELS, strict=True):
        mask = s2attn_mask(SEQLEN, group_size, shifted)
        ax.pcolormesh(mask.int().numpy(), cmap=ListedColormap(["white", color]), edgecolors="0.9", linewidth=0.5)
        ax.set(title=title, xlabel="key", ylabel="query", xticks=[], yticks=[], aspect="equal")
        ax.invert_yaxis()
    figure.suptitle(f"{SEQLEN} tokens, groups of G = {GROUP_SIZE}: information flows between groups through the shift")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("s2attn.png"))
