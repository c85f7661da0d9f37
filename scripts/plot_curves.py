#!/usr/bin/env python3
"""Compare runs, or groups of runs over their seeds: print their accuracies, and draw accuracy and loss against epochs.

python scripts/plot_curves.py --output curves.png runs/a runs/b runs/c
python scripts/plot_curves.py --output curves.png --baseline runs/random runs/selected   # and how far they are apart
python scripts/plot_curves.py --output curves.png random runs/random-0 runs/random-1 selected runs/selected-0 ...

A word that is no directory starts a group of that name. Each directory after it is a run of the group, or holds runs in
directories that are named by their seeds. A directory before any name is a group by itself. Figure 3 (a) of the paper:

python scripts/plot_curves.py --output figure03a.png --title "ViT-T on ImageNet-1K" \\
  "random init" results/vit_tiny/imagenet/random "weight selection" results/vit_tiny/imagenet/selected
"""

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import style
from runs import read_curves, read_run, seed_directories, spread
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program


@dataclass
class Group:
    """Runs that differ in their seeds."""

    name: str
    directories: list[Path]  # of its runs

    def __post_init__(self):
        self.runs = [read_run(directory) for directory in self.directories]
        self.curves = [read_curves(directory) for directory in self.directories]

    def curve(self, metric: str) -> dict[int, list[float]]:
        """{epoch, from 1: the values of all runs} of a column of ``log.txt``, where every run has one.

        Raises:
            InputError: there is no such epoch.
        """
        columns = [curves.get(metric, {}) for curves in self.curves]
        epochs = sorted(set.intersection(*map(set, columns)))
        if not epochs:
            raise InputError(f"{self.directories[0]}: no epoch after which each run of its group was evaluated")
        return {epoch: [column[epoch] for column in columns] for epoch in epochs}

    def accuracies(self, epoch: str) -> list[float]:
        """The accuracy of each run, in percent, after its ``best`` or its ``last`` epoch."""
        return [run.accuracy(epoch) for run in self.runs]


def read_groups(words: list[str]) -> list[Group]:
    """Sort the words of the command line into groups.

    Raises:
        InputError: a group has no runs, or a run cannot be read.
    """
    groups = []  # (name, directories), or (None, directory) of a directory before any name
    for word in words:
        if not Path(word).is_dir():
            groups.append((word, []))
        elif not groups or groups[-1][0] is None:
            groups.append((None, [word]))
        else:
            groups[-1][1].append(word)
    for name, found in groups:
        if not found:
            raise InputError(f"{name}: no such directory, or a group without runs")
    alone = [found[0] for name, found in groups if name is None]
    names = dict(zip(alone, short_names(alone), strict=True))
    return [Group(name or names[found[0]], expand(found)) for name, found in groups]


def short_names(directories: list[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(directory).absolute().parts for directory in directories]
    for count in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return directories


def expand(directories: list[str]) -> list[Path]:
    """Directories of runs; one that holds runs in directories named by their seeds stands for these."""
    return [path for directory in directories for path in seed_directories(directory) or [Path(directory)]]


def with_baseline(groups: list[Group], directory: str) -> tuple[list[Group], Group]:
    """The groups and the one that the others are compared with, which is the first of them if none of them is it."""
    directories = expand([directory])
    for group in groups:
        if group.directories == directories:
            return groups, group
    baseline = Group(Path(directory).absolute().name, directories)
    return [baseline, *groups], baseline


def summary(accuracies: list) -> str:
    """Mean and deviation as ``60.9 ±  5.2``; of a single run its accuracy alone."""
    mean, std = spread(accuracies)
    return f"{mean:5.1f}       " if math.isnan(std) else f"{mean:5.1f} ± {std:4.1f}"


def print_table(groups: list[Group], baseline: Group | None) -> None:
    """Print the accuracies of each group, and by how many points their means differ from the baseline's."""
    width = max(12, *(len(group.name) for group in groups))
    gaps = "" if baseline is None else f"    gap to {baseline.name}: best, last"
    print(f"{'weights':<{width}} {'runs':>4}   best epoch, %    last epoch, %{gaps}")
    for group in groups:
        line = "    ".join(summary(group.accuracies(epoch)) for epoch in ("best", "last"))
        if baseline is not None and group is not baseline:
            means = [[statistics.fmean(g.accuracies(e)) for g in (group, baseline)] for e in ("best", "last")]
            line += "    " + "  ".join(f"{ours - theirs:+5.1f}" for ours, theirs in means)
        print(f"{group.name:<{width}} {len(group.runs):>4}   {line.rstrip()}")


def draw_curves(axes: Axes, groups: list[Group], metric: str, **line) -> None:
    """Draw a column of ``log.txt`` against epochs; ``line`` changes how the lines look."""
    for number, group in enumerate(groups):
        curve = group.curve(metric)
        style.draw_seeds(axes, list(curve), list(curve.values()), group.name, **style.look(number) | line)


def draw_gaps(axes: Axes, groups: list[Group], baseline: Group) -> None:
    """Draw how far the accuracies of the other groups are above the baseline's mean, epoch by epoch.

    Raises:
        InputError: a group has no epoch in common with the baseline.
    """
    base = {epoch: statistics.fmean(values) for epoch, values in baseline.curve("test_acc1").items()}
    for number, group in enumerate(groups):
        if group is baseline:
            continue
        curve = {epoch: values for epoch, values in group.curve("test_acc1").items() if epoch in base}
        if not curve:
            raise InputError(f"{group.directories[0]}: evaluated after no epoch after which {baseline.name} was")
        gaps = [[value - base[epoch] for value in values] for epoch, values in curve.items()]
        style.draw_seeds(axes, list(curve), gaps, group.name, **style.look(number))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="epoch", ylabel=f"gap to {baseline.name}, points")


def get_args_parser() -> Parser:
    parser = Parser("plot_curves.py", __doc__)
    parser.add_argument("--output", required=True, metavar="PNG", help="written anew when it exists")
    parser.add_argument("--title", default="")
    parser.add_argument("--baseline", metavar="RUN", help="show by how many points the others are above this run")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run or of its seeds; or NAME RUN ...")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.baseline is not None and not Path(args.baseline).is_dir():
        raise InputError(f"--baseline {args.baseline}: no such directory")
    groups, baseline = read_groups(args.runs), None
    if args.baseline is not None:
        groups, baseline = with_baseline(groups, args.baseline)

    figure, axes = style.new_figure(2 if baseline is None else 3)
    draw_curves(axes[0], groups, "test_acc1")
    draw_curves(axes[1], groups, "test_loss")
    draw_curves(axes[1], groups, "train_loss", marker="", linestyle="--")
    if baseline is not None:
        draw_gaps(axes[2], groups, baseline)
    print_table(groups, baseline)
    axes[0].set(xlabel="epoch", ylabel=style.ACCURACY, title=args.title)
    axes[1].set(xlabel="epoch", ylabel="loss on test images; dashed: in training")
    axes[0].legend(title=style.LEGEND)
    style.save(figure, args.output)
    print(f"curves: {args.output}")


if __name__ == "__main__":
    run_program("plot_curves.py", main)
