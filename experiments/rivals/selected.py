"""This repository's own: the rules of weight selection (2311.18823, section 3.2), and project and greedy."""

from dataclasses import replace
from unittest import mock

from ablate_projection import PARTS
from rivals.arms import Pair, without_classifier
from weight_selection import PROJECTION, select_weights


def select(pair: Pair, rule: str, layers: str = "first_n", count: int | None = None, noise: bool = False) -> dict:
    """Weights by a rule of ``--element_selection``, and of a shallower student one of ``--layer_selection``.

    A projection looks at ``count`` images, by default the pair's number: of the pair, or of noise.
    """
    options = {"element_selection": rule, "layer_selection": layers, "seed": pair.seed}
    if noise:
        options |= {"calibration": "noise", "calibration_images": count or pair.count}
    elif rule in PROJECTION:
        options["calibration"] = replace(pair, count=count or pair.count).images
    return select_weights(pair.teacher, pair.student, **options)


def select_from_others(pair: Pair, rule: str) -> dict:
    """A projection that looks at another data set's images."""
    return select(replace(pair, folder=pair.others), rule)


def select_without(pair: Pair, rule: str, part: str) -> dict:
    """A projection without one of its parts (experiments/ablate_projection.py)."""
    with mock.patch.object(*PARTS[part]):
        return select(pair, rule)


def keep(pair: Pair) -> dict:
    """The teacher's own weights, for a student as large: the ceiling."""
    return without_classifier(pair.teacher)
