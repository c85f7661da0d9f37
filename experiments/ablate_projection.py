#!/usr/bin/env python3
"""weight_selection.py --element_selection project or greedy, with one of its parts taken out.

python scripts/ablate_projection.py reads --output_dir init/no_reads --element_selection project --calibration ...

Everything after the part goes to weight_selection.py. The parts, by the equations of selection/projection.py:

  reads        (7) the least squares: layers read as they would without images
  frame        (2) the rotation's nearness to coordinates: a random one in the same space
  coordinates  (3) the choice of the stream's coordinates (greedy): evenly spaced ones
  weights      (3) the readers' weights in that choice: coordinates that explain the rest, whoever reads it
  units        (4) the choice of hidden units: evenly spaced ones
  heads    (5) (6) the low-rank heads: evenly spaced dimensions of queries, keys and values
"""

import sys
from pathlib import Path
from unittest import mock

from weight_selection.cli import main as select_main
from weight_selection.projection import equations

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import torch

from weight_selection.errors import InputError, run_program
from weight_selection.projection.symmetries import Structure
from weight_selection.rules import uniform_indices

ROTATION, GREEDY, STRONGEST = equations.rotation, equations.greedy, equations.strongest


def turned(normalised, frame):
    """The rotation, in another frame of the student's stream orthogonal to ones."""
    turn = equations.random_rotation(len(frame), torch.Generator().manual_seed(0))
    return turn.to(normalised.device) @ ROTATION(normalised, frame)


def spaced_coordinates(covariance, weight, count):
    """Evenly spaced coordinates."""
    return uniform_indices(len(weight), count).to(weight.device)


def explaining_coordinates(covariance, weight, count):
    """The coordinates that explain most of all others."""
    return GREEDY(covariance, torch.eye(len(weight)).to(weight), count)


def spaced_units(variance, outgoing, groups, count):
    """Evenly spaced hidden units; of heads, the strongest as ever."""
    if groups.shape[1] > 1:
        return STRONGEST(variance, outgoing, groups, count)
    return uniform_indices(len(groups), count).to(variance.device)


PARTS = {
    "reads": (equations, "read_through", lambda across, own, prior, constant: prior),
    "frame": (equations, "rotation", turned),
    "coordinates": (equations, "greedy", spaced_coordinates),
    "weights": (equations, "greedy", explaining_coordinates),
    "units": (equations, "strongest", spaced_units),
    "heads": (Structure, "_attention", lambda self, name, heads, local: None),
}


def main(argv=None) -> None:
    part, *rest = sys.argv[1:] if argv is None else argv or ["--help"]
    if part in ("-h", "--help"):
        print(__doc__)
        return
    if part not in PARTS:
        raise InputError(f"{part}: no part of projection; choose one of {', '.join(PARTS)}")
    with mock.patch.object(*PARTS[part]):
        select_main(rest)


if __name__ == "__main__":
    run_program("ablate_projection.py", main)
