#!/usr/bin/env python3
"""Run weight_selection.py --element_selection project or greedy with one part of the method taken out.

python experiments/ablate_projection.py units --output_dir init/without --element_selection project --calibration ...

Everything after the part goes to weight_selection.py. The parts, with their equations of projection/equations.py:

  least_squares  (7) (10) the fits: layers keep the up maps that need no images
  frame          (2) the rotation's nearness to coordinates: a random rotation of the same space instead
  coordinates    (3) the choice of the stream's coordinates (greedy): evenly spaced ones instead
  weights        (3) the next layers' weights in that choice: the coordinates that explain the others best instead
  units          (4) the choice of hidden units: evenly spaced ones instead
  heads          (5) (6) the low-rank heads: evenly spaced dimensions of queries, keys and values instead
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import torch

from weight_selection.cli import main as select_main
from weight_selection.errors import InputError, run_program
from weight_selection.projection import equations
from weight_selection.projection.symmetries import Symmetries
from weight_selection.rules import uniform_indices

ROTATION, GREEDY, STRONGEST = equations.rotation, equations.greedy, equations.strongest


def turned(normalised, frame, centred):
    """The same rotation, followed by a random one of the student's stream."""
    turn = equations.random_rotation(len(frame), torch.Generator().manual_seed(0), centred)
    return turn.to(normalised.device) @ ROTATION(normalised, frame, centred)


def spaced_coordinates(covariance, weight, count):
    """Evenly spaced coordinates."""
    return uniform_indices(len(weight), count).to(weight.device)


def explaining_coordinates(covariance, weight, count):
    """The coordinates that explain the others best, whatever the next layers do with them."""
    return GREEDY(covariance, torch.eye(len(weight)).to(weight), count)


def spaced_units(variance, outgoing, units, count):
    """Evenly spaced hidden units; heads are still chosen by their strength."""
    if units.shape[1] > 1:
        return STRONGEST(variance, outgoing, units, count)
    return uniform_indices(len(units), count).to(variance.device)


PARTS = {
    "least_squares": (equations, "solve_up_map", lambda across, own, prior, constant: prior),
    "frame": (equations, "rotation", turned),
    "coordinates": (equations, "greedy", spaced_coordinates),
    "weights": (equations, "greedy", explaining_coordinates),
    "units": (equations, "strongest", spaced_units),
    "heads": (Symmetries, "_find_attention", lambda self, name, found, within: None),
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
