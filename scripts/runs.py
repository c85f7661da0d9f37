"""Read the results that runs of main.py leave on disk, and compute statistics over their seeds."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from weight_selection.arguments import Parser
from weight_selection.errors import InputError
from weight_selection.files import parse_json


@dataclass(frozen=True)
class Run:
    """A finished run, of which ``results`` is the content of ``results.json``."""

    results: dict

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def options(self) -> dict:
        """The options of main.py that the run was started with."""
        return self.results["args"]

    def accuracy(self, epoch: str) -> float:
        """Top-1 accuracy on the test set (percent) after the ``best`` or the ``last`` epoch."""
        return self.results[epoch]["acc1"]


def read_run(directory: Path) -> Run:
    """Read a finished run.

    Raises:
        InputError: ``results.json`` cannot be read, or is not one of main.py's.
    """
    path = Path(directory) / "results.json"
    try:
        results = parse_json(path.read_text())
        run = Run(results)
        for epoch in ("best", "last"):
            if not 0 <= run.accuracy(epoch) <= 100:
                raise ValueError(f"{epoch} acc1 is {run.accuracy(epoch)}")
        for key, kind in (("seed", int), ("epochs", int), ("train_images", int), ("data_set", str), ("args", dict)):
            if not isinstance(results[key], kind):
                raise TypeError(f"{key} is {results[key]!r}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); has the run finished?") from error
    except KeyError as error:
        raise InputError(f"{path}: not a whole results.json of main.py ({error} is missing); run it again") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a whole results.json of main.py ({error}); run it again") from error
    return run


def seed_directories(directory: Path) -> list:
    """Directories of the finished runs in ``directory``, which are named by their seeds."""
    found = (path.parent for path in Path(directory).glob("*/results.json"))
    return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name))


def trained_epochs(directory: Path, name: str) -> list:
    """All numbers EPOCHS for which ``directory`` holds a NAME_EPOCHS, in order."""
    found = (path.name.removeprefix(f"{name}_") for path in Path(directory).glob(f"{name}_*"))
    return sorted(int(epochs) for epochs in found if epochs.isdecimal())


def print_lines(lines: dict) -> None:
    """Print the mean and range of accuracies, given as {label: {epochs: accuracies of the seeds}}."""
    for label, line in lines.items():
        for epochs, values in line.items():
            mean, seeds = statistics.fmean(values), len(values)
            print(f"{label}, {epochs} epochs: {mean:.1f} ({min(values):.1f} to {max(values):.1f}, seeds: {seeds})")


def figure_parser(program: str, description: str) -> Parser:
    """Parser of a script that draws a figure from a directory of runs."""
    parser = Parser(program, description)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the runs, SETTING/DATA/NAME/SEED")
    parser.add_argument("--output", required=True, metavar="PNG", type=Path, help="written anew when it exists")
    return parser


def read_curves(directory: Path) -> dict[str, dict[int, float]]:
    """Read ``log.txt``: {column: {epoch, from 1: value}}; a column has only the epochs that have such a value.

    Raises:
        InputError: the file cannot be read, or is not one of main.py's.
    """
    path = Path(directory) / "log.txt"
    try:
        curves = {}
        for row in map(parse_json, path.read_text().splitlines()):
            for column, value in row.items():
                curves.setdefault(column, {})[row["epoch"] + 1] = value
        return curves
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a log.txt of main.py ({error})") from error


def spread(values: list) -> tuple:
    """Mean and sample standard deviation; the latter is nan for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
