"""Weight selection (paper, section 3), and what of it options can name. Imports no torch; the modules in here do."""

from files import check_directory
from program import InputError

LAYER_SELECTION = ("first_n", "mid_n", "last_n", "uniform", "quadratic")  # the last: beyond the paper
ELEMENT_SELECTION = ("uniform", "consecutive", "random", "random_inconsistent", "l1", "magnitude")
SEEDED = ("random", "random_inconsistent")  # of them, those that --seed changes
FITTED = ("project", "greedy")  # beyond the paper: weights made from the teacher's, fitted to images drawn by --seed
CALIBRATION_IMAGES = 256
NOISE = "noise"  # in place of a directory of images


def check_calibration(source, count: int | None, side: int | None) -> None:
    """Raise InputError unless images can come from there: ``noise``, a directory or None; ``side`` is in pixels."""
    if source is not None and str(source) != NOISE:
        check_directory(source, "--calibration", f"name one of images, or {NOISE}")
    if count is not None and count < 1:
        raise InputError(f"--calibration_images {count}: give a number from 1 up")
    if side is not None and side < 1:
        raise InputError(f"--calibration_size {side}: give a number of pixels from 1 up")
