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
        run: SETTING/DATA/NAME of the runs that measure this cell.
        paper: the paper's accuracy in percent; None for a table of our own.
        statistic: whether the cell is the ``mean`` or the ``median`` of the runs.
    """

    row: str
    column: str
    run: str
    paper: float | None
    statistic: str


@dataclass(frozen=True)
class Table:
    """A table of the paper, or of our own. Its ``recipe``, if any, replaces the recipes of its data sets."""

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
    """The content of paper.yaml."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text())


def read_table(name: str) -> Table:
    """The table of a name; table03, table3, 03 and 3 all name Table 3.

    Raises:
        InputError: there is no such table.
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
    """The options of main.py with which the paper trains a setting on a data set."""
    changes = contents()["recipes"][setting]
    return contents()["basic_recipe"] | changes["all"] | changes[data]


def deviations(path: str, run: Run, options: dict) -> list:
    """How a run deviates from the paper, in words such as ``epochs 3 (paper: 300)``.

    Args:
        path: SETTING/DATA/NAME of the run; its data set must be DATA's.
        run: the run.
        options: the paper's options of main.py.
    """
    data = path.split("/")[1]
    wanted = {"data_set": contents()["data_sets"].get(data, data)} | options
    pairs = [(name, run.options.get(name), value) for name, value in wanted.items()]
    return [f"{name} {mine} (paper: {value})" for name, mine, value in pairs if not _same(mine, value)]


def _same(mine, value) -> bool:
    return mine.lower() == value.lower() if isinstance(mine, str) and isinstance(value, str) else mine == value
