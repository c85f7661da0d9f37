"""No teacher: timm's own initialisation, and He et al.'s (1502.01852, equation 10), as main.py --init has them."""

from models.initialization import initialize
from rivals.arms import Pair, without_classifier


def random(pair: Pair, scheme: str) -> dict:
    """Random weights by ``scheme``, timm or kaiming."""
    initialize(pair.student, scheme)
    return without_classifier(pair.student)
