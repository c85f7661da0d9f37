"""What the script of a table would run: the options of main.py, and those that the first weights are selected by."""

import os
import shlex
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from training.options import Options, complete_warmup, parse_args, share_batch
from weight_selection.cli import get_args_parser
from weight_selection.errors import InputError

ROOT = Path(__file__).parents[1]
OUT = Path("out")


@dataclass(frozen=True)
class Planned:
    """One run of main.py.

    Attributes:
        options: of main.py, with the micro-batch that follows from the total batch.
        selection: options of weight_selection.py for the file of ``--initialize``; None if there is none.
    """

    options: Options
    selection: Namespace | None


@cache
def planned_runs(script: str, **environment: str) -> dict:
    """{SETTING/DATA/NAME: ``Planned``} of a script, with its first seed.

    Args:
        script: relative to the repository, such as scripts/table03.sh.
        **environment: variables that the script reads, such as EPOCHS.

    Raises:
        InputError: the script fails.
    """
    variables = {"PATH": os.environ["PATH"], "PYTHON": "python", "DRY_RUN": "1", "OUT": str(OUT)} | environment
    run = subprocess.run(["bash", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    if run.returncode:
        raise InputError(f"{script}: fails in a dry run: {run.stderr.strip()[-300:]}")
    selections, runs = {}, {}
    for line in run.stdout.splitlines():
        _, program, *words = shlex.split(line)
        if program == "weight_selection.py":
            selection = get_args_parser().parse_args(words)
            selections[selection.output_dir] = selection
        elif program == "main.py":
            options = complete_warmup(share_batch(parse_args([_from_root(word) for word in words]), 1))
            path = Path(options.output_dir).relative_to(OUT).parent
            runs.setdefault(str(path), Planned(options, selections.get(options.initialize)))
    return runs


def _from_root(word):
    """A word of a command, in which the path of a recipe does not depend on the working directory."""
    return str(ROOT / word) if (ROOT / word.partition(":")[0]).is_file() else word
