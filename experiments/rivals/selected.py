"""This repository's own: the rules of weight selection (2311.18823, section 3.2), and project and greedy."""

from rivals.arms import Pair, without_classifier
from weight_selection import PROJECTION, select_weights


def select(pair: Pair, rule: str) -> dict:
    """Weights by a rule of ``--element_selection``."""
    images = {"calibration": pair.images} if rule in PROJECTION else {}
    return select_weights(pair.teacher, pair.student, element_selection=rule, seed=pair.seed, **images)


def keep(pair: Pair) -> dict:
    """The teacher's own weights, for a student as large: the ceiling."""
    return without_classifier(pair.teacher)
