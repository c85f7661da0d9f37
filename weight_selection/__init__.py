"""Weight selection (paper, section 3), and what of it options can name. Imports no torch; the modules in here do."""

from weight_selection.errors import InputError
from weight_selection.files import check_directory

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


def check_exclude(method, exclude):
    if exclude:
        raise InputError(
            f"--exclude {exclude[0]}: {method} fits layers to what those before them give, which must not be random; "
            "leave it out, or select by another rule"
        )


def __getattr__(name):
    """``select_weights`` is imported, with torch, when it is asked for."""
    if name == "select_weights":
        from weight_selection.selection import select_weights

        return select_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
