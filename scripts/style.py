"""The common look of all figures: colours, axes, lines with their range over seeds, matrices as images."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weight_selection.errors import InputError
from weight_selection.files import new_file

# Okabe and Ito's colours, which colour-blind people tell apart; the markers differ too, for a grey printer.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
ACCURACY = "test accuracy, %"
LEGEND = "mean, and range over seeds"


def look(number: int) -> dict[str, str]:
    """The colour and the marker of a line of this number, as arguments of ``draw_seeds``."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def new_figure(panels: int = 1) -> tuple:
    """A figure, and the list of its axes, which are side by side."""
    figure = Figure(figsize=(6 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.set_prop_cycle(color=COLOURS, marker=MARKERS)
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)  # epochs
    return figure, list(axes)


def new_images(rows: int, columns: int) -> tuple:
    """A figure, and an array (rows, columns) of axes for square images."""
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return figure, axes


def draw_signed(axes: Axes, matrix: np.ndarray) -> None:
    """Draw a matrix: 0 is white, positive is red, negative is blue; the 0.5 % furthest from 0 are equally dark."""
    limit = np.quantile(np.abs(matrix), 0.995)  # a few outliers would leave all else white
    axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")


def draw_seeds(axes: Axes, xs: list, values: list, label: str, **line_options) -> None:
    """Draw a line through the means of ``values`` (for each x a list over seeds), in a band over their range."""
    (line,) = axes.plot(xs, list(map(statistics.fmean, values)), label=label, markersize=4, **line_options)
    axes.fill_between(
        xs, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color(), linewidth=0
    )
    if len(xs) > 50:
        line.set_marker("")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the ending of ``path`` names.

    Raises:
        InputError: no such format, or it cannot be written.
    """
    known = sorted(figure.canvas.get_supported_filetypes())
    if Path(path).suffix[1:] not in known:
        raise InputError(f"--output {path}: must end in one of {', '.join(known)}")
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
