#!/usr/bin/env python3
"""Compare groups of runs over their seeds: print their accuracies, and draw accuracy against epochs.

python scripts/plot_curves.py --output curves.png random runs/random-0 runs/random-1 selected runs/selected-0 ...

A word that is no directory starts a group of that name. Each directory after it is a run of the group, or holds runs in
directories that are named by their seeds. Figure 3 (a) of the paper:

python scripts/plot_curves.py --output figure03a.png --title "ViT-T on ImageNet-1K" \\
  "random init" results/vit_tiny/imagenet/random "weight selection" results/vit_tiny/imagenet/selected
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import style
from runs import read_curve, read_run, seed_directories, spread
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program


def read_groups(words: list) -> list:
    """Sort the words of the command line into groups: [(name, directories of its runs)].

    Raises:
        InputError: a directory comes before any name, or a group has no runs.
    """
    groups = []
    for word in words:
        if not Path(word).is_dir():
            groups.append((word, []))
        elif not groups:
            raise InputError(f"{word}: name its group first")
        else:
            groups[-1][1].extend(seed_directories(word) or [Path(word)])
    for name, directories in groups:
        if not directories:
            raise InputError(f"{name}: no such directory, or a group without runs")
    return groups


def curve(directories: list) -> tuple:
    """The epochs, from 1, after which every run was evaluated; and for each of them the accuracies of all runs."""
    curves = [read_curve(directory) for directory in directories]
    epochs = sorted(set.intersection(*map(set, curves)))
    if not epochs:
        raise InputError(f"{directories[0]}: no epoch after which each run of its group was evaluated")
    return epochs, [[accuracies[epoch] for accuracies in curves] for epoch in epochs]


def summary(accuracies: list) -> str:
    """Mean and deviation as ``60.9 ±  5.2``; of a single run its accuracy alone."""
    mean, std = spread(accuracies)
    return f"{mean:5.1f}       " if math.isnan(std) else f"{mean:5.1f} ± {std:4.1f}"


def get_args_parser() -> Parser:
    parser = Parser("plot_curves.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", required=True, metavar="PNG", help="written anew when it exists")
    parser.add_argument("--title", default="")
    parser.add_argument("runs", nargs="+", metavar="NAME DIR")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    groups = [(name, directories, *curve(directories)) for name, directories in read_groups(args.runs)]

    figure, (axes,) = style.new_figure()
    width = max(12, *(len(name) for name, *_ in groups))
    print(f"{'weights':<{width}} {'runs':>4}   best epoch, %    last epoch, %")
    for name, directories, epochs, accuracies in groups:
        finished = [read_run(directory) for directory in directories]
        metrics = (summary([run.accuracy(epoch) for run in finished]) for epoch in ("best", "last"))
        print(f"{name:<{width}} {len(finished):>4}   " + "    ".join(metrics).rstrip())
        style.draw_seeds(axes, epochs, accuracies, name)
    axes.set(xlabel="epoch", ylabel=style.ACCURACY, title=args.title)
    axes.legend(title=style.LEGEND)
    style.save(figure, args.output)
    print(f"curves: {args.output}")


if __name__ == "__main__":
    run_program("plot_curves.py", main)
