"""Draw `method.png`, the picture of the method: python docs/method.py"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Okabe and Ito's colours, which colour-blind readers tell apart.
FROZEN, TASKS = "#DCE3EA", ("#0072B2", "#D55E00", "#009E73")
INK, GREY = "#222222", "#667788"


def box(axes, x, y, width, height, text, face, *, edge=INK, colour=INK, size=10):
    """Draw a box with text in its middle; x and y are its lower left corner."""
    shape = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=face, ec=edge, lw=1.2))
    middle = x + width / 2, y + height / 2
    axes.text(*middle, text, ha="center", va="center", color=colour, size=size, linespacing=1.4)


def arrow(axes, start, end, colour=INK, **style):
    """Draw an arrow between two points."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.4, "color": colour} | style
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def mask(axes, x, y, colour, seed):
    """Draw a mask as a small grid of shades."""
    shades = np.random.default_rng(seed).uniform(0.15, 1, (4, 4))
    for (row, column), shade in np.ndenumerate(shades):
        corner = x + 0.2 * column, y + 0.2 * row
        axes.add_patch(plt.Rectangle(corner, 0.2, 0.2, fc=colour, alpha=shade, ec="white", lw=0.6))


def main():
    """Draw the picture beside this file."""
    figure, axes = plt.subplots(figsize=(10, 4.5), dpi=140)
    axes.set(xlim=(0, 14), ylim=(0.3, 6.6))
    axes.axis("off")

    box(axes, 0.1, 2.3, 1.3, 1.0, "image x", "white")
    arrow(axes, (1.4, 2.8), (2.1, 2.8))
    box(axes, 2.1, 2.1, 3.0, 1.4, "first layers of the\nfrozen ViT θ", FROZEN)
    arrow(axes, (5.1, 2.8), (6.0, 2.8))
    box(axes, 6.0, 2.1, 3.4, 1.4, "last layers with  θ ⊙ $m_t$\nand prompts of task t", FROZEN)
    arrow(axes, (9.4, 2.8), (10.2, 2.8))
    box(axes, 10.2, 2.1, 1.7, 1.4, "classifier", "white")
    arrow(axes, (11.9, 2.8), (12.5, 2.8))
    axes.text(12.6, 2.8, "class", va="center", size=11, color=INK)

    axes.text(6.0, 6.3, "What a task trains and keeps: a mask m and prompts", size=11, color=INK)
    for number, colour in enumerate(TASKS, 1):
        x = 6.0 + 2.3 * (number - 1)
        mask(axes, x, 4.75, colour, number)
        for k in range(3):
            axes.add_patch(
                plt.Rectangle((x + 1.0, 4.85 + 0.22 * k), 0.42, 0.16, fc=colour, ec="none")
            )
        axes.text(x, 5.75, f"task {number}", color=colour, size=10, weight="bold")
    arrow(axes, (7.7, 4.65), (7.7, 3.5), TASKS[0])
    axes.text(7.9, 4.1, "of the task that is named", size=9.5, color=GREY, va="center")

    box(
        axes, 2.1, 4.3, 3.0, 1.3, "which task?\nnearest key, ∂H/∂α,\nor statistics of q(x)", "white"
    )
    arrow(axes, (3.6, 3.5), (3.6, 4.3), GREY, linestyle="--")
    axes.text(3.75, 3.9, "q(x): all layers, unchanged", size=9.5, color=GREY, va="center")
    arrow(axes, (5.1, 4.95), (5.85, 4.95))

    axes.text(
        0.1,
        1.15,
        "θ never changes, and no later task changes an older one's mask or prompt. What goes\n"
        "wrong is mostly the name of the task: here, each image is given to a task by itself.",
        size=10.5,
        color=INK,
        va="center",
        linespacing=1.5,
    )
    target = Path(__file__).with_suffix(".png")
    figure.savefig(target, facecolor="white", bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
