#!/usr/bin/env python3
"""Print a table of the paper with the measured accuracies beside its own, as Markdown; also write it as CSV.

python scripts/collect_results.py table03 results/ --csv table03.csv

It reads results/SETTING/DATA/NAME/SEED/results.json. scripts/paper.yaml says what each table holds.
"""

import csv
import math
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import paper
from runs import read_run, seed_directories, spread
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import check_directory, new_file

METRICS = ("mean", "std", "median")
LEGEND = "Test accuracy in %: mean, or median where it says so, ± sample standard deviation over seeds (their number)."
COLUMNS = ["table", "row", "column", "run", "seeds"]
COLUMNS += [f"{epoch}_{name}" for epoch in ("best", "last") for name in METRICS]
COLUMNS += ["statistic", "paper", "difference", "deviations", "command"]


class Measured:
    """The runs that measure one cell of a table.

    Attributes:
        cell: the cell.
        runs: the finished runs, ordered by seed.
        metrics: (mean, standard deviation, median) in percent of the "best" and the "last" epoch; empty without runs.
        difference: measured minus paper, in points; None unless all runs follow the paper's recipe.
        deviations: one line for each way in which runs deviate from the paper's recipe.
        command: the command that measures the cell.
    """

    def __init__(self, table: paper.Table, cell: paper.Cell, out: Path):
        self.cell = cell
        self.runs = [read_run(directory) for directory in seed_directories(out / cell.run)]
        self.metrics = {}
        for epoch in ("best", "last") if self.runs else ():
            accuracies = [run.accuracy(epoch) for run in self.runs]
            self.metrics[epoch] = *spread(accuracies), statistics.median(accuracies)
        self.deviations = _deviations(table, cell, self.runs)
        self.difference = None
        if self.runs and cell.paper is not None and not self.deviations:
            self.difference = self.value("best") - cell.paper
        self.command = f"OUT={shlex.quote(str(out))} bash {table.script} {cell.run.replace('/', ' ')}"

    def value(self, epoch: str) -> float:
        """The accuracy that the table shows for the ``best`` or the ``last`` epoch, in percent."""
        mean, _, median = self.metrics[epoch]
        return median if self.cell.statistic == "median" else mean

    @property
    def complete(self) -> bool:
        """Whether there are runs enough for the cell."""
        return len(self.runs) >= (paper.SEEDS_OF_A_MEDIAN if self.cell.statistic == "median" else 1)


def _deviations(table, cell, runs) -> list:
    if cell.paper is None:
        return []
    setting, data, _ = cell.run.split("/")
    options = paper.recipe(setting, data) if table.recipe is None else table.recipe
    seeds = {}
    for run in runs:
        if differs := paper.deviations(cell.run, run, table.script, options):
            seeds.setdefault(", ".join(differs), []).append(str(run.seed))
    return [f"{cell.run}, seed {' '.join(those)}: {differs}" for differs, those in seeds.items()]


def measure(table: paper.Table, out: Path) -> list:
    """Look up the runs of every cell in ``out``.

    Raises:
        InputError: there is no such directory.
    """
    check_directory(out, "OUT", "name the one that holds SETTING/DATA/NAME/SEED")
    return [Measured(table, cell, out) for cell in table.cells]


def _accuracy(measured, epoch) -> str:
    """``81.2 ± 0.3 (3)``: mean, standard deviation and number of seeds, as far as they exist."""
    if not measured.runs:
        return "-"
    std, count = measured.metrics[epoch][1], len(measured.runs)
    deviation = "" if math.isnan(std) else f" ± {std:.1f}"
    of = "median of " if measured.cell.statistic == "median" else ""
    return f"{measured.value(epoch):.1f}{deviation} ({of}{count})"


def _difference(measured) -> str:
    return "-" if measured.difference is None else f"{round(measured.difference, 1) + 0.0:+.1f}"  # no -0.0


def markdown(table: paper.Table, cells: list) -> str:
    """The table with up to four lines a row, notes on it, and the commands that measure its missing cells."""
    columns = list(dict.fromkeys(measured.cell.column for measured in cells))
    footnotes = [line for measured in cells for line in measured.deviations]
    lines = [["", "", *columns]]
    for start in range(0, len(cells), len(columns)):
        row = cells[start : start + len(columns)]
        marks = ["".join(f" [{footnotes.index(line) + 1}]" for line in measured.deviations) for measured in row]
        best = [_accuracy(measured, "best") + mark for measured, mark in zip(row, marks, strict=True)]
        lines.append([row[0].cell.row, "best epoch", *best])
        lines.append(["", "last epoch", *(_accuracy(measured, "last") for measured in row)])
        if table.is_of_the_paper:
            papers = (measured.cell.paper for measured in row)
            lines.append(["", "paper", *("-" if value is None else f"{value:.1f}" for value in papers)])
            lines.append(["", "best - paper", *map(_difference, row)])
    missing = dict.fromkeys(_missing(measured) for measured in cells if not measured.complete)
    parts = (
        f"**{_heading(table)}**",
        _grid(lines),
        LEGEND,
        _list("Not the paper's recipe, so not compared with it:", [f"[{n}] {x}" for n, x in enumerate(footnotes, 1)]),
        _list("Measured:", [] if table.is_of_the_paper else _protocols(cells)),
        _list("Notes:", table.notes),
        "\n".join(["Missing; to measure it:", "", "```", *missing, "```"]) if missing else "",
    )
    return "\n\n".join(filter(None, parts))


def _list(title, items) -> str:
    return "\n".join([title, "", *(f"- {item}" for item in items)]) if items else ""


def _heading(table) -> str:
    return f"Table {int(table.name.removeprefix('table'))}. {table.title}" if table.is_of_the_paper else table.title


def _missing(measured) -> str:
    found = f"  # {len(measured.runs)} of {paper.SEEDS_OF_A_MEDIAN} seeds so far" if measured.runs else ""
    return measured.command + found


def _grid(lines: list) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * max(3, width) for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(f"{text:<{max(3, width)}}" for text, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _protocols(cells: list) -> list:
    """One line for each protocol (epochs, data set, optimiser, batch) with the runs that were trained by it."""
    names = {}
    for measured in cells:
        for run in measured.runs:
            results, options = run.results, run.options
            facts = f"{results['epochs']} epochs of {results['data_set']} by {options['opt']} at lr {options['lr']}"
            facts += f", batch {options['total_batch_size']} ({results['train_images']} images)"
            names.setdefault(facts, {})[measured.cell.run] = None
    return [f"{facts}: {', '.join(those)}" for facts, those in names.items()]


def csv_row(table: paper.Table, measured: Measured) -> dict:
    """The line of a cell: {column: value}, None for a value that does not exist."""
    cell = measured.cell
    metrics = {
        f"{epoch}_{name}": None if math.isnan(value) else round(value, 3)
        for epoch, values in measured.metrics.items()
        for name, value in zip(METRICS, values, strict=True)
    }
    return metrics | {
        "table": table.name,
        "row": cell.row,
        "column": cell.column,
        "run": cell.run,
        "seeds": " ".join(str(run.seed) for run in measured.runs),
        "statistic": cell.statistic,
        "paper": cell.paper,
        "difference": None if measured.difference is None else round(measured.difference, 3),
        "deviations": "; ".join(measured.deviations),
        "command": measured.command,
    }


def write_csv(path: Path, table: paper.Table, cells: list) -> None:
    """Write a CSV file with one line per cell."""
    with new_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_row(table, measured) for measured in cells)


def get_args_parser() -> Parser:
    parser = Parser("collect_results.py", "Print a table of the paper with the measured accuracies beside its own.")
    parser.add_argument("table", metavar="TABLE", help="such as table03, or 3; or one of our own, evidence_elements")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the runs, SETTING/DATA/NAME/SEED")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the table as CSV too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --csv file")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.overwrite and args.csv is None:
        raise InputError("--overwrite: has no effect without --csv; leave it out")
    if args.csv is not None and args.csv.exists() and not args.overwrite:
        raise InputError(f"--csv {args.csv}: exists; add --overwrite to replace it")
    table = paper.read_table(args.table)
    cells = measure(table, args.out)
    if args.csv is not None:
        write_csv(args.csv, table, cells)
    print(markdown(table, cells))


if __name__ == "__main__":
    run_program("collect_results.py", main)
