#!/usr/bin/env python3
"""Draw docs/method.png: the three steps of weight selection."""

import sys
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

TEACHER, STUDENT, REST = "#8ecae6", "#fb8500", "#e9eef2"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "", size: float = 8
) -> None:
    """A filled rectangle with its text in the middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#44546a", linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, linewidth=0.9, color="#44546a"))


def panel(axes: Axes, title: str) -> None:
    """Set up the axes of one step."""
    axes.set(xlim=(0, 10), ylim=(0, 10), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.axis("off")
    axes.text(2.25, 9.45, "teacher", ha="center", fontsize=8)
    axes.text(8.0, 9.45, "student", ha="center", fontsize=8)


def rows(axes: Axes, names: Sequence[str], selected: int) -> None:
    """A box of the teacher for each name, the lowest first; the first ones are ``selected`` for the student."""
    for i, name in enumerate(names):
        y = 0.6 + 1.45 * i
        box(axes, 0.5, y, 3.5, 1.05, TEACHER if i < selected else REST, name)
        if i < selected:
            box(axes, 7.0, y, 2.0, 1.05, STUDENT, name)
            arrow(axes, (4.1, y + 0.52), (6.9, y + 0.52))


def layers(axes: Axes) -> None:
    """Step 1: the first layers of the teacher are selected."""
    panel(axes, "1. Select layers: the first N")
    rows(axes, [f"layer {i}" for i in range(6)], 3)


def components(axes: Axes) -> None:
    """Step 2: each component of a layer is matched with the one of the same name."""
    panel(axes, "2. Match components by name")
    rows(axes, ("fc2", "fc1", "norm2", "proj", "qkv", "norm1"), 6)


def elements(axes: Axes) -> None:
    """Step 3: evenly spaced elements of each tensor are selected."""
    panel(axes, "3. Select elements: evenly spaced")
    rows, columns, side = 8, 6, 0.72
    for row in range(rows):
        for column in range(columns):
            kept = row % 2 == 0 and column % 2 == 0
            y = 8.3 - side * (row + 1) + side / 2
            box(axes, 0.1 + side * column, y, side, side, STUDENT if kept else REST)
    for row in range(rows // 2):
        for column in range(columns // 2):
            box(axes, 6.9 + side * column, 6.5 - side * (row + 1), side, side, STUDENT)
    arrow(axes, (4.7, 5.1), (6.7, 5.1))
    words = "the same neurons in every tensor:\nwhat residual connections add up still matches"
    axes.text(5.0, 1.2, words, ha="center", fontsize=8)


def main() -> None:
    figure = Figure(figsize=(10.5, 3.7), layout="constrained")
    for draw, panel_axes in zip((layers, components, elements), figure.subplots(1, 3), strict=True):
        draw(panel_axes)
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "docs/method.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
