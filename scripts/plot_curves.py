#!/usr/bin/env python3
"""Compare groups of runs that differ in their seed: accuracies as a table, and accuracy against epochs as a PNG.

python scripts/plot_curves.py --output curves.png random runs/random-0 runs/random-1 selected runs/selected-0 ...

A word that is no directory starts a group of that name; the directories after it are its runs.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_groups(words):
    """[(name, directories)] from the command line's words."""
    groups = []
    for word in words:
        if Path(word).is_dir():
            if not groups:
                raise SystemExit(f"plot_curves.py: error: {word}: name its group first")
            groups[-1][1].append(Path(word))
        else:
            groups.append((word, []))
    for name, directories in groups:
        if not directories:
            raise SystemExit(f"plot_curves.py: error: {name}: no such directory, or a group without runs")
    return groups


def spread(values):
    """Mean and sample standard deviation (0 for a single run)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def curve(directories):
    """Evaluated epochs (from 1) and the accuracies of every run after each."""
    logs = [[json.loads(line) for line in (path / "log.txt").read_text().splitlines()] for path in directories]
    tested = [{row["epoch"]: row["test_acc1"] for row in log if "test_acc1" in row} for log in logs]
    epochs = sorted(set.intersection(*(set(accuracies) for accuracies in tested)))
    return [epoch + 1 for epoch in epochs], [[accuracies[epoch] for accuracies in tested] for epoch in epochs]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="PNG")
    parser.add_argument("--title", default="")
    parser.add_argument("runs", nargs="+", metavar="NAME DIR")
    args = parser.parse_args()
    groups = read_groups(args.runs)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    print(f"{'weights':<12} {'runs':>4}   best epoch, %    last epoch, %")
    for name, directories in groups:
        results = [json.loads((path / "results.json").read_text()) for path in directories]
        figures = [spread([result[key]["acc1"] for result in results]) for key in ("best", "last")]
        print(f"{name:<12} {len(results):>4}   " + "    ".join(f"{mean:5.1f} ± {std:4.1f}" for mean, std in figures))
        epochs, accuracies = curve(directories)
        (line,) = axes.plot(epochs, [statistics.fmean(values) for values in accuracies], label=name, marker=".")
        axes.fill_between(
            epochs, list(map(min, accuracies)), list(map(max, accuracies)), alpha=0.2, color=line.get_color()
        )
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=args.title)
    axes.grid(alpha=0.3)
    axes.legend(title="mean, and range over seeds")
    figure.savefig(args.output, dpi=150)
    print(f"curves: {args.output}")


if __name__ == "__main__":
    main()
