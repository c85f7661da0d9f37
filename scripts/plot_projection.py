#!/usr/bin/env python3
"""Draw accuracy against the length of training from random, selected and projected weights.

python scripts/plot_projection.py results/ --output docs/projection.png

Each point is a training of its own: vit_half_112/flowers/{random,selected,greedy,project}_EPOCHS/SEED of
scripts/projection.sh, and the same without _EPOCHS, which have the recipe's 20.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import style
from program import InputError, Parser, run_program
from runs import read_run, seed_directories

SETTING = "vit_half_112/flowers"
LINES = {"random init": "random", "weight selection": "selected", "greedy": "greedy", "project": "project"}


def find(out: Path) -> dict:
    """{label: {epochs: accuracies over the seeds}} of the finished runs."""
    lines = {}
    for label, name in LINES.items():
        lengths = [path for path in (out / SETTING).glob(f"{name}_*") if path.name.removeprefix(f"{name}_").isdecimal()]
        found = {}
        for directory in (
            directory for path in [out / SETTING / name, *lengths] for directory in seed_directories(path)
        ):
            run = read_run(directory)
            found.setdefault(run.options["epochs"], []).append(run.accuracy("best"))
        if found:
            lines[label] = dict(sorted(found.items()))
    return lines


def draw(lines: dict):
    figure, (axes,) = style.new_figure()
    for label, line in lines.items():
        style.draw_seeds(axes, list(line), list(line.values()), label)
    axes.set(xscale="log", xlabel="epochs of training on Flowers-102", ylabel=f"Flowers-102 {style.ACCURACY}")
    ticks = sorted({epochs for line in lines.values() for epochs in line})
    axes.set_xticks(ticks, ticks, minor=False)
    axes.minorticks_off()
    axes.legend(title=style.LEGEND, loc="lower right")
    return figure


def get_args_parser() -> Parser:
    parser = Parser("plot_projection.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the runs, SETTING/DATA/NAME/SEED")
    parser.add_argument("--output", required=True, metavar="PNG", type=Path, help="written anew when it exists")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    lines = find(args.out)
    if not lines:
        raise InputError(f"OUT {args.out}: no finished runs {SETTING}/{{{','.join(LINES.values())}}}_EPOCHS/SEED")
    for label, line in lines.items():
        for epochs, values in line.items():
            seeds = f"{min(values):.1f} to {max(values):.1f}, seeds: {len(values)}"
            print(f"{label}, {epochs} epochs: {statistics.fmean(values):.1f} ({seeds})")
    style.save(draw(lines), args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    run_program("plot_projection.py", main)
