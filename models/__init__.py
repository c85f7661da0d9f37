"""What training adds to timm's models. This file imports no torch: the options need only the names in it."""

SCHEMES = ("timm", "xavier", "kaiming", "mimetic")  # random initialisations
