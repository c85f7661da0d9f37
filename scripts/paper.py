"""The paper's tables and recipes, from paper.yaml."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from datasets import DATA_SETS
from planned import planned_runs
from runs import Run
from training.options import CANNOT_CHANGE_RESULT, OPTIONS
from weight_selection.errors import InputError
from weight_selection.options import KEEP, PARTS

SEEDS_OF_A_MEDIAN = 3
IMAGENET_IMAGES = (1_281_167, 50_000)  # to train, to test


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


def data_set(data: str) -> str:
    """main.py's --data_set for the DATA of a run."""
    name = contents()["data_sets"].get(data, data)
    return next(known for known in DATA_SETS if known.lower() == name.lower())


def images(data: str) -> tuple:
    """The numbers of images that DATA has to train and to test on."""
    return DATA_SETS[data_set(data)].images or IMAGENET_IMAGES


def deviations(path: str, run: Run, script: str, options: dict, **environment: str) -> list:
    """How a run deviates from what the table's script runs, in words such as ``epochs 3 (paper: 300)``.

    All options count but those that cannot change a result, and the seed. So do the numbers of images, and how the
    first weights were made. Where the paper gives a value, the word is "paper", else "recipe".

    Args:
        path: SETTING/DATA/NAME of the run; its data set must be DATA's.
        run: the run.
        script: that measures the run.
        options: the paper's options of main.py.
        **environment: variables of the script.
    """
    data = path.split("/")[1]
    wanted = {"data_set": data_set(data)} | options
    found = [_difference(name, run.options.get(name), value, "paper") for name, value in wanted.items()]
    for name, value in zip(("train_images", "test_images"), images(data), strict=True):
        found.append(_difference(name, run.results.get(name), value, "paper"))
    runs = planned_runs(script, **environment)
    if path not in runs:
        return [*filter(None, found), f"{script} has no such run"]
    planned = runs[path]
    for name, value in planned.options.plain().items():
        if name in wanted or name in CANNOT_CHANGE_RESULT | APART or (value is None and name in DECIDED):
            continue
        found.append(_difference(name, run.options.get(name, OPTIONS[name].default), value, "recipe"))
    return [*filter(None, found), *_first_weights(run, planned)]


# Compared as first weights; the file of a teacher, as its name says which it is; what follows from the total batch.
APART = {"seed", "initialize", "finetune", "teacher_path", "update_freq"}
DECIDED = {"device", "amp_dtype", "world_size"}  # by the program, unless they are given


def _first_weights(run, planned):
    """How the weights that a run started from deviate from those that the script makes."""
    for name in ("initialize", "finetune"):
        mine, wanted = run.options.get(name), getattr(planned.options, name)
        if (mine is None) != (wanted is None):
            return [f"{name} {mine} (recipe: {wanted and 'a file'})"]
    if planned.selection is None:
        return []
    made, wanted = run.results.get("first_weights"), dict(vars(planned.selection))
    if made is None:
        return ["first weights of unknown origin (no provenance beside --initialize)"]
    teacher = made["teacher"]
    name = "model" if teacher.get("model") == wanted["pretrained_model"] else "name"  # an old name of the same model
    mine = {"fused_qkv": PARTS, "dtype": KEEP} | made["options"]
    mine |= {"pretrained_model": teacher.get(name), "student": made["student"]["name"]}
    mine |= {f"{who}_kwargs": made[who].get("kwargs", {}) for who in ("teacher", "student")}
    # Each seed draws a selection of its own; of a rule that draws nothing, the seed does not count.
    wanted["seed"] = mine["seed"] if wanted["seed"] is None else run.seed
    return [*filter(None, (_difference(name, mine[name], wanted.get(name), "recipe") for name in sorted(mine)))]


def _difference(name, mine, value, whose):
    return None if mine == value else f"{name} {mine} ({whose}: {value})"
