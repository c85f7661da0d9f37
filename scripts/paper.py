"""The paper's tables and recipes, from paper.yaml."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from runs import Run
from weight_selection.errors import InputError

SEEDS_OF_A_MEDIAN = 3


@dataclass(frozen=True)
class Cell:
    """One accuracy of a table.

    Attributes:
        row, column: their labels.
        run: SETTING/DATA/NAME of the runs that measure it.
        paper: the paper's accuracy in percent; None for a table of our own.
        statistic: ``mean`` or ``median`` of the runs.
    """

    row: str
    column: str
    run: str
    paper: float | None
    statistic: str


@dataclass(frozen=True)
class Table:
    """A table of the paper, or of our own. ``recipe``: options that take the place of the data set's recipe."""

    name: str
    title: str
    script: str
    cells: tuple
    notes: tuple
    recipe: dict | None

    @property
    def is_of_the_paper(self) -> bool:
        return any(cell.paper is not None for cell in self.cells)


@cache
def contents() -> dict:
    """All of paper.yaml."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())


def read_table(name: str) -> Table:
    """A table by its name: table03, table3, 03 and 3 are the same.

    Raises:
        InputError: there is none of that name.
    """
    tables = contents()["tables"]
    number = name.removeprefix("table")
    key = f"table{int(number):02}" if number.isdecimal() else name
    if key not in tables:
        raise InputError(f"TABLE {name}: there is none; choose from {', '.join(tables)}")
    table = tables[key]
    return Table(
        name=key,
        title=table["title"],
        script=table["script"],
        cells=tuple(cell for row in table["rows"] for cell in _cells(table["columns"], row)),
        notes=tuple(table.get("notes", ())),
        recipe=table.get("recipe"),
    )


def _cells(columns: dict, row: dict):
    runs = row["run"] if isinstance(row["run"], list) else [row["run"]] * len(columns)
    values = row.get("paper", [None] * len(columns))
    for (column, path), run, value in zip(columns.items(), runs, values, strict=True):
        yield Cell(row["row"], column, path.format(row=run), value, row.get("statistic", "mean"))


def recipe(setting: str, data: str) -> dict:
    """The paper's options of main.py for a setting on a data set."""
    changes = contents()["recipes"][setting]
    return contents()["basic_recipe"] | changes["all"] | changes[data]


def deviations(path: str, run: Run, options: dict) -> list:
    """How a run at SETTING/DATA/NAME differs from ``options`` and from DATA, in words: ``epochs 3 (paper: 300)``."""
    data = path.split("/")[1]
    wanted = {"data_set": contents()["data_sets"].get(data, data)} | options
    pairs = [(name, run.options.get(name), value) for name, value in wanted.items()]
    return [f"{name} {mine} (paper: {value})" for name, mine, value in pairs if not _same(mine, value)]


def _same(mine, value) -> bool:
    return mine.lower() == value.lower() if isinstance(mine, str) and isinstance(value, str) else mine == value
