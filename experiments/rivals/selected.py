"""This repository's own: the rules of weight selection (2311.18823, section 3.2), and project and greedy."""

from rivals.arms import Pair, without_classifier
from weight_selection import PROJECTION, select_weights


def select(pair: Pair, rule: str, layers: str = "first_n") -> dict:
    """Weights by a rule of ``--element_selection``, and of a shallower student one of ``--layer_selection``."""
    options = {"element_selection": rule, "layer_selection": layers, "seed": pair.seed}
    if rule in PROJECTION:
        options["calibration"] = pair.images
    return select_weights(pair.teacher, pair.student, **options)


def keep(pair: Pair) -> dict:
    """The teacher's own weights, for a student as large: the ceiling."""
    return without_classifier(pair.teacher)
