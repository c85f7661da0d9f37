#!/usr/bin/env python3
"""Draw accuracy against the length of training from random, selected and projected weights.

python experiments/plot_projection.py results/ --output docs/projection.png

Each point is a training of its own. The runs are those of experiments/projection.sh at
vit_half_112/flowers/{random,selected,greedy,project}_EPOCHS/SEED, and those without _EPOCHS, which have 20 epochs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import style
from runs import figure_parser, print_lines, read_run, seed_directories, trained_epochs
from weight_selection.errors import InputError, run_program

SETTING = "vit_half_112/flowers"
LINES = {"random init": "random", "weight selection": "selected", "greedy": "greedy", "project": "project"}


def find(out: Path) -> dict:
    """The accuracies of the finished runs: {label: {epochs: accuracies over the seeds}}."""
    lines = {}
    for label, name in LINES.items():
        found = {}
        for path in [name, *(f"{name}_{epochs}" for epochs in trained_epochs(out / SETTING, name))]:
            for run in map(read_run, seed_directories(out / SETTING / path)):
                found.setdefault(run.options["epochs"], []).append(run.accuracy("best"))
        if found:
            lines[label] = dict(sorted(found.items()))
    return lines


def draw(lines: dict):
    """The figure of what ``find`` gives."""
    figure, (axes,) = style.new_figure()
    for label, line in lines.items():
        style.draw_seeds(axes, list(line), list(line.values()), label)
    axes.set(xscale="log", xlabel="epochs of training on Flowers-102", ylabel=f"Flowers-102 {style.ACCURACY}")
    ticks = sorted({epochs for line in lines.values() for epochs in line})
    axes.set_xticks(ticks, ticks, minor=False)
    axes.minorticks_off()
    axes.legend(title=style.LEGEND, loc="lower right")
    return figure


def main(argv=None) -> None:
    args = figure_parser("plot_projection.py", __doc__).parse_args(argv)
    lines = find(args.out)
    if not lines:
        raise InputError(f"OUT {args.out}: no finished runs {SETTING}/{{{','.join(LINES.values())}}}_EPOCHS/SEED")
    print_lines(lines)
    style.save(draw(lines), args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    run_program("plot_projection.py", main)
