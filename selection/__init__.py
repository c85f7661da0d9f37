"""Weight selection (paper, section 3), and what of it options can name. Imports no torch; the modules in here do."""

LAYER_SELECTION = ("first_n", "mid_n", "last_n", "uniform")
ELEMENT_SELECTION = ("uniform", "consecutive", "random", "random_inconsistent", "l1", "magnitude")
SEEDED = ("random", "random_inconsistent")  # of them, those that --seed changes
FITTED = ("project", "greedy")  # beyond the paper: weights made from the teacher's, fitted to images drawn by --seed
CALIBRATION_IMAGES = 256
NOISE = "noise"  # in place of a directory of images
